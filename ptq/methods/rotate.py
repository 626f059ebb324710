"""Rotation (QuaRot, Ashkboos et al. 2024, arXiv 2404.00456): a basis in which activations have no outliers.

Three rotations leave the model's function as it is. R1 turns the residual stream: norm gains move into the linears that
read the stream; embedding, readers, writers and head are multiplied by Q. R2 turns attention values head by head,
between v and o. Both are merged into weights. R4 transforms the input of down while the model runs, because what makes
it (a product, a nonlinearity) does not commute with a rotation; likewise the input of the output projection where
values are fused in a way that R2 cannot turn. R3 transforms queries and keys after the rotary embedding, where the KV
cache is quantized. LayerNorm models keep their norms: Q leaves the mean in place, see
`ptq.numerics.rotation`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from calibration.architectures import ArchitectureSpec, Balance, BlockSpec, Residual
from calibration.errors import Problem, ToolkitError
from calibration.walk.context import Context
from calibration.walk.cost import BlockShape, Work
from calibration.walk.passes import Pass, Phase, PlanView, Read, Transform
from calibration.walk.segment import Segment
from ptq.linears import ModelLayout
from ptq.numerics.hadamard import block_size, hadamard_transform, odd_order
from ptq.numerics.objective import row_chunks
from ptq.numerics.rotation import CHUNK, Kind, Rotation, make_rotation

ONLINE = ("hadamard", "key_hadamard")


@dataclass(frozen=True)
class Rotate(Pass):
    """Turn the residual stream, the values, and the inputs that only a transform at run time can turn.

    Attributes:
        residual: R1.
        values: R2, one rotation for all heads.
        online: R4, and R3 where the scheme quantizes the KV cache; only native files hold them.
        kind: randomized Hadamard matrices, or uniformly distributed orthogonal ones (R1 and R2).
        seed: of both.
    """

    residual: bool = True
    values: bool = True
    online: bool = True
    kind: Kind = "hadamard"
    seed: int = 0

    name: ClassVar[str] = "rotate"
    summary: ClassVar[str] = "rotates the residual stream so that no channel stands out"
    default_scheme: ClassVar[str | None] = "w4a4"
    phases: ClassVar[tuple[Phase, ...]] = (Phase.TRANSFORM,)

    @property
    def parts(self) -> tuple[str, ...]:
        return ONLINE if self.online else ()

    def check(self, view: PlanView[ModelLayout]) -> Iterable[Problem]:
        if not (self.residual or self.values or self.online):
            yield Problem("rotate", "residual, values and online are all off", "leave rotate out")

    def refusals(self, architecture: ArchitectureSpec) -> Iterable[Problem]:
        if self.residual and isinstance(architecture.residual, str):
            works = "residual = false in a recipe keeps the rotations of values and of the inputs of down (R2, R4)"
            reason = f"the residual stream of {architecture.family} cannot be rotated exactly: {architecture.residual}"
            yield Problem("rotate.residual", reason, works)

    def remarks(self, view: PlanView[ModelLayout]) -> Iterable[str]:
        architecture = view.spec
        shapes = {linear.name: linear.shape for linear in view.layout.linears}
        for index in range(architecture.n_blocks):
            spec, prefix = architecture.block(index), architecture.prefix(index)
            offline = [("residual stream", shapes[prefix + spec.linears[0]][1])] if self.residual else []
            offline += [("attention values", g.heads.width) for g in _value_groups(spec) if g.heads and self.values]
            for what, size in offline:
                if self.kind == "hadamard" and odd_order(size) is None:
                    yield f"rotate: no Hadamard matrix of order {size} ({what}): a random orthogonal one is used"
            schemes = {n.name[len(prefix) :]: n.scheme for n in view.layout.quantized if n.block == index}
            online = [(f"input of {n}", shapes[prefix + n][1]) for n in self.input_transforms(spec, list(schemes))]
            maker = schemes.get(spec.inputs[0].linears[0])
            if self.online and maker is not None and maker.cache is not None:
                online += [("queries and keys", g.heads.width) for g in _value_groups(spec)[:1] if g.heads]
            for what, size in online:
                if block_size(size) != size:
                    blocks = f"{size // block_size(size)} blocks of {block_size(size)}"
                    yield f"rotate: no Hadamard matrix of order {size} ({what}): {blocks} are used"

    def config_changes(self, config: Any) -> Mapping[str, Any]:
        """The head takes the gain of the final norm, so it cannot stay tied to the embedding."""
        return {"tie_word_embeddings": False} if self.residual and config.tie_word_embeddings else {}

    def input_transforms(self, spec: BlockSpec, quantized: Collection[str]) -> Mapping[str, Transform]:
        if not self.online:
            return {}
        values = {consumer for group in _value_groups(spec) for consumer in group.consumers}
        return dict.fromkeys((n for n in spec.writes if n in quantized and n not in values), _online)

    def outside(self, architecture: ArchitectureSpec, names: Collection[str]) -> Mapping[str, Callable[[Read], Any]]:
        around = architecture.residual
        if not self.residual:
            return {}
        assert isinstance(around, Residual), "a plan with this family was not refused"
        table, norm, head = f"{around.embeddings[0]}.weight", around.final_norm, f"{around.head}.weight"
        source = head if head in names else table
        bias = f"{norm}.bias" if f"{norm}.bias" in names else None
        offset = architecture.offset(norm)

        def turn(tensor: torch.Tensor) -> torch.Tensor:
            return self._stream_rotation(architecture, tensor.shape[-1])(tensor)

        def gain(read: Read) -> torch.Tensor:
            return read(f"{norm}.weight").double() + offset

        def turned(name: str) -> Callable[[Read], Any]:
            return lambda read: turn(read(name))

        def turned_head(read: Read) -> torch.Tensor:
            matrix, fused = read(source), gain(read)
            rotation = self._stream_rotation(architecture, matrix.shape[-1])
            return _by_rows(lambda rows: rotation(rows.double() * fused), matrix)

        made = {f"{name}.weight": turned(f"{name}.weight") for name in around.embeddings}
        made[head] = turned_head
        made[f"{norm}.weight"] = lambda read: torch.full_like(read(f"{norm}.weight"), 1.0 - offset)
        if bias is not None:
            made[bias] = lambda read: turn(unscaled_bias(read(bias).double(), gain(read), norm)).to(read(bias).dtype)
        return made

    def _stream_rotation(self, architecture: ArchitectureSpec, size: int) -> Rotation:
        return make_rotation(size, self.kind, self.seed, keep_mean=architecture.norm == "layer")

    def cost(self, block: BlockShape) -> list[Work]:
        """Every weight turned in float64, and the transform that two forward passes make of the input of down."""
        weights = float(sum(rows * n for rows, n in block.linears))
        widest = max(block.inputs, key=lambda shared: shared.width)
        values = 2.0 * widest.tokens * widest.width if self.online else 0.0
        return [Work(fresh=60.0 * weights + 8.0 * values, exact=300.0 * values)]

    def apply(self, segment: Segment, context: Context) -> None:
        assert context.forwards == 0, "statistics were gathered before the basis changed"
        if self.residual:
            self._turn_residual(segment)
        if self.values:
            for group in _value_groups(segment.spec):
                self._turn_values(segment, group)
        for linear in self.input_transforms(segment.spec, segment.schemes):
            w = segment.weight(linear)
            block = block_size(w.shape[1])
            segment.set_weight(linear, _by_rows(lambda rows: _online(rows.double()), w), exact=True)
            segment.parts.setdefault(linear, {})["hadamard"] = torch.tensor([block], dtype=torch.int32)
            segment.transform_input(linear)
        self._turn_keys(segment)

    def _turn_keys(self, segment: Segment) -> None:
        """R3 changes no weight: the first linear of the block tells the runtime of it."""
        widths = [group.heads.width for group in _value_groups(segment.spec) if group.heads]
        linear = segment.spec.inputs[0].linears[0]
        scheme = segment.schemes.get(linear)
        if self.online and widths and scheme is not None and scheme.cache is not None:
            block = torch.tensor([block_size(widths[0])], dtype=torch.int32)
            segment.parts.setdefault(linear, {})["key_hadamard"] = block

    def _turn_residual(self, segment: Segment) -> None:
        for group in segment.spec.balance:
            if group.kind == "norm" and group.producer not in segment.spec.inner_norms:
                fuse_gain(segment, group)
                turn = self._stream_rotation(segment.architecture, segment.weight(group.consumers[0]).shape[1])
                for linear in group.consumers:
                    segment.set_weight(linear, turn(segment.weight(linear)), exact=True)
                bias = f"{group.producer}.bias"
                if bias in segment.masters:
                    segment.replace(bias, turn(segment.masters[bias]))
        for linear in segment.spec.writes:
            w, bias = segment.weight(linear), f"{linear}.bias"
            turn = self._stream_rotation(segment.architecture, w.shape[0])
            segment.set_weight(linear, turn(w.T).T, exact=True)
            if bias in segment.masters:
                segment.replace(bias, turn(segment.masters[bias]))

    def _turn_values(self, segment: Segment, group: Balance) -> None:
        heads = group.heads
        assert heads is not None
        turn = make_rotation(heads.width, self.kind, self.seed + 1)
        rows = slice(*group.rows) if group.rows else slice(None)
        w = segment.weight(group.producer).clone()
        by_head = w[rows].view(heads.key_value, heads.width, -1).transpose(1, 2)
        w[rows] = turn(by_head).transpose(1, 2).reshape(w[rows].shape)
        segment.set_weight(group.producer, w, exact=True)
        name = f"{group.producer}.bias"
        if name in segment.masters:
            bias = segment.masters[name].clone()
            bias[rows] = turn(bias[rows].view(heads.key_value, heads.width)).flatten()
            segment.replace(name, bias)
        for linear in group.consumers:
            o = segment.weight(linear)
            turned = turn(o.reshape(o.shape[0], heads.query, heads.width)).reshape(o.shape)
            segment.set_weight(linear, turned, exact=True)


def _online(x: torch.Tensor) -> torch.Tensor:
    """What `ptq.runtime.linear.QuantLinear` does with its input, for the forward passes of a run."""
    return hadamard_transform(x, block_size(x.shape[-1]))


def _by_rows(change: Callable[[torch.Tensor], torch.Tensor], matrix: torch.Tensor) -> torch.Tensor:
    """What ``change`` makes of the rows of a large matrix, in its dtype. (Float64 copies of all of it would be four
    times as large as a head in 16 bits, each.)"""
    made = torch.empty_like(matrix)
    for rows in row_chunks(*matrix.shape, size=4 * CHUNK):
        made[rows] = change(matrix[rows]).to(matrix.dtype)
    return made


def _value_groups(spec: BlockSpec) -> list[Balance]:
    return [group for group in spec.balance if group.kind == "value"]


def fuse_gain(segment: Segment, group: Balance) -> None:
    """Move a norm's gain g into the columns of its consumers: ``W <- W diag(g)``, and let it multiply by one.

    Its bias moves into the consumers' biases, ``b <- b + W bias``, where all of them have one. Else it stays a bias of
    the norm, as bias / g: no stock class has room for biases that a family lacks.
    """
    gain, name = segment.gain(group.producer).double(), f"{group.producer}.bias"
    beta = segment.masters[name].double() if name in segment.masters else None
    if beta is not None:
        biases = {linear: f"{linear}.bias" for linear in group.consumers}
        if all(bias in segment.masters for bias in biases.values()):
            for linear, bias in biases.items():
                moved = segment.masters[bias].double() + segment.weight(linear).double() @ beta
                segment.replace(bias, moved)
            segment.replace(name, torch.zeros_like(segment.masters[name]))
        else:
            segment.replace(name, unscaled_bias(beta, gain, segment.full_name(group.producer)))
    for linear in group.consumers:
        fused = _by_rows(lambda rows: rows.double() * gain, segment.weight(linear))
        segment.set_weight(linear, fused, exact=True)
    segment.remove_gain(group.producer)


def unscaled_bias(beta: torch.Tensor, gain: torch.Tensor, norm: str) -> torch.Tensor:
    """beta / gain ``[channels]``: the bias of a norm whose gain moved behind it.

    Raises:
        ToolkitError: a channel has a bias but no gain.
    """
    lost = (gain == 0) & (beta != 0)
    if bool(lost.any()):
        raise ToolkitError(
            f"{norm}: {int(lost.sum())} channels have a bias but gain 0, and the linears behind it have no bias",
            "set residual = false for rotate in a recipe: this norm's gain cannot be moved",
        )
    return torch.where(gain == 0, 0.0, beta / gain)
