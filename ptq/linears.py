"""What a plan decides for every linear of a model, and what exporters and the runtime need to know of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from calibration.architectures import ArchitectureSpec
from calibration.model.headers import TensorInfo
from ptq.scheme import QuantScheme


@dataclass(frozen=True)
class PlannedLinear:
    """One linear of the decoder blocks.

    Attributes:
        name: full name in the checkpoint without ``.weight``, e.g. ``model.layers.0.self_attn.q_proj``.
        block: index of its decoder block.
        shape: ``(out, in)`` of W, also where the file stores it transposed.
        scheme: None where it stays in float.
        why: the reason where it stays in float, else an empty string.
        conv1d: GPT-2's ``Conv1D``: the float checkpoint stores W transposed, ``[in, out]``.
        expert: index of the expert it belongs to, or None outside mixtures of experts.
        bias: whether the checkpoint has a bias beside it.
        part_bits: bits of tensors stored beside its codes.
    """

    name: str
    block: int
    shape: tuple[int, int]
    scheme: QuantScheme | None
    why: str = ""
    conv1d: bool = False
    expert: int | None = None
    bias: bool = False
    part_bits: int = 0

    @property
    def numel(self) -> int:
        return self.shape[0] * self.shape[1]


def float_linears(spec: ArchitectureSpec, infos: Mapping[str, TensorInfo]) -> Iterator[PlannedLinear]:
    """Every linear of the decoder blocks, in float, for a plan to give schemes to.

    The shape is that of its float weight in the headers ``infos``; (0, 0) where there is none.
    """
    for index in range(spec.n_blocks):
        prefix, block = spec.prefix(index), spec.block(index)
        experts = {name: shared.expert for shared in block.inputs for name in shared.linears}
        for name in block.linears:
            info = infos.get(f"{prefix}{name}.weight")
            rows, columns = info.shape if info is not None and len(info.shape) == 2 else (0, 0)
            yield PlannedLinear(
                name=prefix + name,
                block=index,
                shape=(columns, rows) if spec.conv1d else (rows, columns),
                scheme=None,
                conv1d=spec.conv1d,
                expert=experts[name],
                bias=f"{prefix}{name}.bias" in infos,
            )


@dataclass(frozen=True)
class ModelLayout:
    """Everything a format must know to accept or refuse a model, and to describe it.

    Attributes:
        config: ``config.json`` of the float checkpoint.
        linears: every linear of the decoder blocks, in checkpoint order.
        other_linears: full names of linears outside that list that a format may have to name as left alone
            (``lm_head``, routers).
        blocks: module path of the list of decoder blocks, e.g. ``model.layers``.
        parts: names of tensors that some linears have beside their codes, see `ptq.quantized.PARTS`.
        reordered: some linear has groups that follow an activation order (a ``group_index``).
        dtype: dtype of the float checkpoint, ``"bfloat16"`` and so on.
        outside: embedding and head where they are quantized; their ``block`` is -1.
    """

    config: dict[str, Any]
    linears: tuple[PlannedLinear, ...]
    other_linears: tuple[str, ...]
    blocks: str
    reordered: bool
    dtype: str
    parts: tuple[str, ...] = ()
    outside: tuple[PlannedLinear, ...] = ()

    def with_schemes(self, schemes: Mapping[str, QuantScheme]) -> ModelLayout:
        """The layout with other schemes for the linears of these full names."""
        linears = (
            replace(linear, scheme=schemes[linear.name]) if linear.name in schemes else linear
            for linear in self.linears
        )
        return replace(self, linears=tuple(linears))

    @property
    def quantized_bits(self) -> float:
        """Bits of all quantized weights, with everything stored beside the codes."""
        return sum(linear.numel * self.bits_per_weight(linear) for linear in self.quantized)

    @property
    def quantized(self) -> tuple[PlannedLinear, ...]:
        return tuple(linear for linear in self.linears if linear.scheme is not None)

    def bits_per_weight(self, linear: PlannedLinear) -> float:
        """Everything stored for a quantized linear, over its number of weights."""
        assert linear.scheme is not None
        reordered = self.reordered and linear.block >= 0  # embedding and head are rounded to nearest
        return linear.scheme.bits_per_weight(*linear.shape, reordered) + linear.part_bits / linear.numel

    @property
    def left(self) -> tuple[PlannedLinear, ...]:
        return tuple(linear for linear in self.linears if linear.scheme is None)
