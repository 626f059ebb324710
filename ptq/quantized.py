"""`QuantizedTensor`: what a rounding method makes, an exporter lays out and a kernel reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from ptq.numerics.groups import join, split
from ptq.numerics.lowrank import factor_product
from ptq.scheme import QuantScheme

PARTS: dict[str, str] = {
    "lora_a": "int8 codes or float16 values [rank, in] of the low-rank part W += (b * scale) a",
    "lora_b": "int8 codes or float16 values [out, rank]",
    "lora_scale": "float32 [rank], one factor per component",
}
"""Tensors that may stand beside the codes of a linear, by name, with shape and meaning. Native files store each as
``<linear>.<name>``; a pass that makes one lists it in ``Pass.parts``."""

LORA = ("lora_b", "lora_a", "lora_scale")
"""The parts of a low-rank correction, in the order of `ptq.numerics.lowrank.factor_product`."""


@dataclass(frozen=True)
class QuantizedTensor:
    """Integer codes of one weight ``W [out, in]`` with G groups per line: per row, or per column for axis "out".

    Attributes:
        codes: uint8 ``[out, in]``, unsigned codes in ``[0, 2^bits - 1]``, one byte each whatever the bits.
        scale: float32 ``[lines, G]``, values exact in bfloat16 and in float16. Lines are the ``out`` rows, or the
            ``in`` columns where the grouping's axis is "out".
        zero: uint8 ``[lines, G]``, or None for symmetric grids (then 2^(bits-1)).
        scheme: bits, grid and grouping.
        group_index: int32 ``[in]``, the group of each column; None where it is ``column // group size``
            (it is present only where groups follow an activation order).
        parts: tensors beside the codes, by a name of `PARTS`.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor | None
    scheme: QuantScheme
    group_index: torch.Tensor | None = None
    parts: Mapping[str, torch.Tensor] = field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, int]:
        return int(self.codes.shape[0]), int(self.codes.shape[1])

    @property
    def zero_point(self) -> torch.Tensor | int:
        """The zero as a tensor, or the fixed 2^(bits-1)."""
        return 2 ** (self.scheme.weights.bits - 1) if self.zero is None else self.zero

    @property
    def low_rank(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
        """b ``[out, rank]``, a ``[rank, in]`` and scale ``[rank]`` of the low-rank part, where there is one."""
        return (self.parts["lora_b"], self.parts["lora_a"], self.parts["lora_scale"]) if LORA[0] in self.parts else None

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The weight that runs, ``[out, in]``: codes and, where there is one, the low-rank part. Products in float32,
        then one cast to ``dtype``."""
        factors = self.low_rank
        w = self.dequantize_codes(dtype if factors is None else torch.float32)
        return w if factors is None else w.add_(factor_product(*factors)).to(dtype)

    def dequantize_codes(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """``(code - zero) * scale`` as ``[out, in]``: products in float32, then one cast to ``dtype``."""
        zero = 2 ** (self.scheme.weights.bits - 1) if self.zero is None else self.zero.float()
        if self.group_index is not None:
            index = self.group_index.long()
            z = zero if isinstance(zero, int) else zero[:, index]
            return ((self.codes.float() - z) * self.scale[:, index]).to(dtype)
        grouping = self.scheme.weights.grouping
        z = zero if isinstance(zero, int) else zero.unsqueeze(-1)
        units = (split(self.codes.float(), grouping) - z) * self.scale.unsqueeze(-1)
        return join(units, grouping).to(dtype).contiguous()

    def bits_per_weight(self) -> float:
        """Stored bits of codes, scales, zeros, index and parts over the number of weights."""
        parts = 8 * sum(part.nbytes for part in self.parts.values()) / self.codes.numel()
        return self.scheme.bits_per_weight(*self.shape, reordered=self.group_index is not None) + parts
