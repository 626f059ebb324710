"""LoRC (Yao et al. 2023, arXiv 2303.08302): add back the leading part of the rounding error as two thin factors.

By default the part is the one that matters for the layer's output on the calibration inputs (QERA-exact, Zhang et al.
2024, arXiv 2410.06040); ``weighting = "none"`` is the published, data-free LoRC. See `ptq.numerics.lowrank`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from calibration.errors import Problem
from calibration.walk.context import Context
from calibration.walk.cost import BlockShape, Work
from calibration.walk.passes import Pass, Phase, PlanView, Stream
from calibration.walk.segment import Segment
from calibration.walk.statistics import Gram, Statistic
from ptq.formats.checks import matching, refuse
from ptq.linears import ModelLayout
from ptq.methods.rounding import relative_errors
from ptq.numerics.lowrank import FACTOR_BITS, factor_bits, low_rank, quantize_factors
from ptq.quantized import LORA, QuantizedTensor


@dataclass(frozen=True)
class Lorc(Pass):
    """A low-rank correction of every quantized linear.

    Attributes:
        rank: components kept per linear.
        bits: of the factors, 8 (int8, one scale per component) or 16 (float16).
        weighting: ``gram`` minimizes the error of the layer's output, ``diagonal`` does so as if inputs were
            uncorrelated (QERA-approx), ``none`` minimizes the error of the weight (LoRC as published).
    """

    rank: int = 8
    bits: int = 8
    weighting: Literal["gram", "diagonal", "none"] = "gram"

    name: ClassVar[str] = "lorc"
    title: ClassVar[str | None] = "LoRC"
    summary: ClassVar[str] = "adds a low-rank correction of what rounding took away"
    phases: ClassVar[tuple[Phase, ...]] = (Phase.REPAIR,)
    parts: ClassVar[tuple[str, ...]] = LORA

    @property
    def stream(self) -> Stream:
        return "none" if self.weighting == "none" else "either"

    @property
    def statistics(self) -> tuple[type[Statistic], ...]:
        return () if self.weighting == "none" else (Gram,)

    def part_bits(self, out_features: int, in_features: int) -> int:
        """Bits of both factors and their scales."""
        return factor_bits(out_features, in_features, self.rank, self.bits)

    def check(self, view: PlanView[ModelLayout]) -> Iterable[Problem]:
        if self.rank < 1:
            yield Problem("lorc.rank", f"{self.rank} is not positive", "use 8, or leave lorc out")
        if self.bits not in FACTOR_BITS:
            yield Problem("lorc.bits", f"{self.bits}-bit factors have no layout", "use 8 or 16")
        narrow = matching(view.layout, lambda linear: min(linear.shape) < self.rank)
        largest = min((min(linear.shape) for linear in narrow), default=0)
        yield from refuse(
            narrow,
            f"rank {self.rank} is larger than the smaller side of the layer, {largest}",
            f"use rank {largest} or less in the recipe",
        )

    def cost(self, block: BlockShape) -> list[Work]:
        """The error measured again; a few directions of it cost little beside that."""
        return [block.measuring(rows, n) + Work(fresh=4.0 * rows * n, calls=500.0) for rows, n in block.linears]

    def apply(self, segment: Segment, context: Context) -> None:
        for linear in segment.schemes:
            rounded, w = segment.quantized[linear], segment.original(linear)
            assert isinstance(rounded, QuantizedTensor)
            gram = context.statistic(linear, Gram) if context.has(Gram) else None
            matrix = None if gram is None or gram.tokens == 0 else gram.matrix
            error = w - segment.weight(linear)
            factors = quantize_factors(*low_rank(error, self.rank, self._weight(matrix)), self.bits)
            parts = dict(zip(LORA, factors, strict=True))
            segment.parts[linear] = {**segment.parts.get(linear, {}), **parts}
            effective = dataclasses.replace(rounded, parts=segment.parts[linear]).dequantize(w.dtype)
            before = segment.errors[linear].get("output")
            segment.set_weight(linear, effective)
            segment.errors[linear] = relative_errors(w, effective, matrix)
            if before:
                segment.note(linear, **{"lorc.error_left": segment.errors[linear]["output"] / before})

    def _weight(self, gram: torch.Tensor | None) -> torch.Tensor | None:
        if gram is None or self.weighting == "none":
            return None
        return gram.diagonal() if self.weighting == "diagonal" else gram
