"""Collects the operations of a step, places in its workspace, and what they point to."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ptq.runtime.decoding.native import Inputs, Matrix, Op, code_matrix, float_matrix, pointer, set_mask, word_matrix
from ptq.runtime.linear import QuantLinear
from sparsity.decode import DecodeLinear, MaskedLinear, Phase
from sparsity.kernels.kernel import Mask
from sparsity.kernels.native import NATIVE

LINEAR, GATED, ROTATE, ATTEND, NORM = range(5)
"""Kinds of an `Op`."""

Norm = tuple[torch.Tensor, float]
"""Weight ``[width]`` float32 and epsilon of an RMS norm."""


class Unsupported(Exception):
    """Why a model has no list of operations."""


def part(module: Any, name: str) -> Any:
    """A submodule or attribute that a known model has.

    Raises:
        Unsupported: this one has it not.
    """
    found = getattr(module, name, None)
    if found is None:
        raise Unsupported(f"a {type(module).__name__} has no {name}")
    return found


def fitting(linear: Any, inputs: int, outputs: int) -> None:
    """Raw memory is read by these widths: they must be those of the places around.

    Raises:
        Unsupported: the linear is of another shape.
    """
    found = part(linear, "in_features"), part(linear, "out_features")
    if found != (inputs, outputs):
        raise Unsupported(f"a linear of {found[0]} inputs and {found[1]} outputs where {inputs} and {outputs} fit")


def activation(function: Any) -> int:
    """The kind of an activation, found out by what it does.

    Raises:
        Unsupported: it does something else than SiLU, the two kinds of GELU and ReLU.
    """
    x = torch.linspace(-4, 4, 33)
    gelu = nn.functional.gelu
    known = (nn.functional.silu(x), gelu(x), gelu(x, approximate="tanh"), nn.functional.relu(x))
    found = function(x)
    for kind, expected in enumerate(known):
        if torch.allclose(found, expected, atol=1e-6):
            return kind
    raise Unsupported(f"an activation is a {type(function).__name__}")


class Builder:
    """Operations as they are added.

    Attributes:
        ops: so far.
        size: floats of the workspace.
        kept: tensors whose memory operations read.
    """

    def __init__(self, dtype: torch.dtype, phase: Phase | None = None, inputs: Inputs = "int15") -> None:
        """
        Args:
            phase: of a model with thresholds, which its layers must share.
            inputs: to what those of integer codes are rounded.
        """
        self.dtype, self.phase, self.inputs = dtype, phase, inputs
        self.ops: list[Op] = []
        self.kept: list[torch.Tensor] = []
        self.size = 0
        self._places: dict[str, tuple[int, int]] = {}

    def place(self, name: str, width: int) -> int:
        """Where in the workspace so many floats lie under this name; anew where an earlier block had fewer."""
        start, room = self._places.get(name, (0, 0))
        if width > room:
            start, self.size = self.size, self.size + -(-width // 16) * 16
            self._places[name] = start, width
        return start

    def keep(self, tensor: torch.Tensor) -> torch.Tensor:
        self.kept.append(tensor)
        return tensor

    def matrix(self, module: nn.Module) -> Matrix:
        """The weight of a linear, where it lies.

        Raises:
            Unsupported: a layer that does more, or that another kernel computes.
        """
        if isinstance(module, DecodeLinear):
            return self._decoding(module)
        if isinstance(module, MaskedLinear):
            matrix, mask = self.matrix(module.inner), Mask(module.threshold, module.center)
            return self._pruned(matrix, mask) if self.masked(module.phase) else matrix
        if isinstance(module, QuantLinear):
            return self._codes(module)
        if type(module) is not nn.Linear:
            raise Unsupported(f"a linear is a {type(module).__name__}")
        if module.weight.dtype not in (torch.float32, torch.bfloat16) or not module.weight.is_contiguous():
            raise Unsupported(f"a weight in {str(module.weight.dtype).removeprefix('torch.')}")
        bias = None if module.bias is None else self.keep(module.bias.detach().float())
        return float_matrix(self.keep(module.weight.detach()), bias)

    def _codes(self, module: QuantLinear) -> Matrix:
        if module.kernel != "rows" or not module.plain:
            raise Unsupported(f"a linear of kernel '{module.kernel}'" if module.plain else "a linear with more parts")
        stored = dict(module.named_buffers(recurse=False))
        bias = None if stored.get("bias") is None else self.keep(stored["bias"].float())
        codes, scale = (self.keep(stored[name]) for name in ("codes", "scale"))
        return code_matrix(codes, scale, stored.get("zero"), module.in_features, bias, self.inputs)

    def masked(self, phase: Phase) -> bool:
        """Whether the thresholds of a layer apply.

        Raises:
            Unsupported: the layer is not told what a forward pass is, or counts the rows that it reads.
        """
        if phase is not self.phase or phase.counting:
            raise Unsupported("sparse layers of another model" if phase is not self.phase else "rows are being counted")
        return phase.masked

    def mask(self, mask: Mask, width: int) -> Mask:
        """A mask of so many values, kept.

        Raises:
            Unsupported: it is of another number.
        """
        vectors = [t for t in (mask.threshold, mask.center) if t is not None]
        if any(t.numel() not in (1, width) or t.dtype != torch.float32 for t in vectors):
            raise Unsupported("thresholds of another width or dtype")
        kept = [self.keep(t.contiguous()) for t in vectors]
        return Mask(*kept)

    def _pruned(self, matrix: Matrix, mask: Mask) -> Matrix:
        set_mask(matrix, self.mask(mask, matrix.columns))
        return matrix

    def _decoding(self, module: DecodeLinear) -> Matrix:
        if module.kernel is not NATIVE:
            raise Unsupported(f"a linear of sparse kernel '{module.kernel.name}'")
        mask = module.mask if self.masked(module.phase) else None
        bias = module.bias if mask is None else module.shifted_bias
        if bias is not None and bias.numel() != module.out_features:
            raise Unsupported("a bias has another width")
        rows, bias = module.weight_rows, None if bias is None else self.keep(bias.float().contiguous())
        if isinstance(rows, torch.Tensor):
            if rows.dtype not in (torch.float32, torch.bfloat16):
                raise Unsupported(f"a weight in {str(rows.dtype).removeprefix('torch.')}")
            matrix = float_matrix(self.keep(rows), bias, module.mode == "input")
        else:
            self.kept += [rows.codes, rows.scale, *([] if rows.zero is None else [rows.zero])]
            matrix = word_matrix(rows, bias, self.inputs)
        return matrix if mask is None else self._pruned(matrix, mask)

    def norm(self, module: nn.Module, width: int) -> Norm:
        """Of an RMS norm, whatever it adds to its weight: of a vector of ones, whose mean square is 1, it gives that.

        Raises:
            Unsupported: another kind of norm.
        """
        epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
        if "RMSNorm" not in type(module).__name__ or not isinstance(epsilon, float):
            raise Unsupported(f"a norm is a {type(module).__name__}")
        weight = getattr(module, "weight", None)
        if weight is not None and weight.numel() != width:
            raise Unsupported("a norm has another width")
        ones = torch.ones(1, 1, width, dtype=self.dtype if weight is None else weight.dtype)
        found = module(ones).detach().float().flatten() * (1 + epsilon) ** 0.5
        if weight is not None:  # the module rounds what it gives
            plain = weight.detach().float()
            found = min((plain, plain + 1), key=lambda exact: (exact - found).abs().max().item())
        return self.keep(found.contiguous()), epsilon

    def add_linear(
        self,
        module: nn.Module,
        source: int,
        target: int,
        norm: Norm | None = None,
        add: bool = False,
        barrier: bool = True,
    ) -> None:
        """``target = (or +=) W norm(source) + bias``; without a barrier the next operation does not wait."""
        op = Op(kind=LINEAR, source=source, target=target, barrier=barrier, first=self.matrix(module), add=add)
        self._behind(op, norm)

    def add_gated(
        self,
        gate: nn.Module,
        up: nn.Module,
        act: Any,
        source: int,
        target: int,
        norm: Norm | None,
        mask: Mask | None = None,
    ) -> None:
        """``target = act(gate(norm(source))) * up(norm(source))``, the first factor pruned by the mask."""
        op = Op(kind=GATED, source=source, target=target, barrier=1, activation=activation(act))
        op.first, op.second = self.matrix(gate), self.matrix(up)
        if mask is not None:
            if not isinstance(up, DecodeLinear) or op.second.transposed:
                raise Unsupported("a gate is pruned in front of a linear whose rows are all read")
            threshold = self.mask(mask, part(gate, "out_features")).threshold
            op.gate, op.gates = pointer(threshold), threshold.numel()
        self._behind(op, norm)

    def add_norm(self, norm: Norm, source: int, target: int, add: bool = True) -> None:
        """``target = (or +=) norm(source)``"""
        width = len(norm[0])
        self._behind(Op(kind=NORM, source=source, target=target, width=width, add=add, barrier=1), norm)

    def _behind(self, op: Op, norm: Norm | None) -> None:
        if norm is not None:
            op.norm, op.epsilon = pointer(norm[0]), norm[1]
        self.ops.append(op)
