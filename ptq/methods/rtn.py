"""RTN: every weight to the nearest point of a grid that its group's range spans. No data, no error feedback."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from calibration.context import Context
from calibration.errors import Problem
from calibration.passes import Phase, Stream
from calibration.segment import Segment
from calibration.statistics import Gram, Statistic
from ptq.methods.rounding import put
from ptq.numerics.groups import join, split
from ptq.numerics.integers import grid_parameters, quantize
from ptq.quantized import QuantizedTensor
from ptq.scheme import QuantScheme


def round_to_nearest(w: torch.Tensor, scheme: QuantScheme, clip: torch.Tensor | None = None) -> QuantizedTensor:
    """Round ``W [out, in]`` (float32) with the scheme's grid; ``clip [lines, G]`` bounds the ranges."""
    quant = scheme.weights
    units = split(w, quant.grouping)
    scale, zero = grid_parameters(units, quant, clip)
    codes = quantize(units, scale.unsqueeze(-1), None if zero is None else zero.unsqueeze(-1), quant)
    codes = join(codes.to(torch.uint8), quant.grouping).contiguous()
    return QuantizedTensor(codes, scale.float(), None if zero is None else zero.to(torch.uint8), scheme)


@dataclass(frozen=True)
class Rtn:
    """Round to nearest, within clipping ranges where an earlier pass chose them."""

    name: ClassVar[str] = "rtn"
    phases: ClassVar[tuple[Phase, ...]] = (Phase.ROUND,)
    stream: ClassVar[Stream] = "none"
    statistics: ClassVar[tuple[type[Statistic], ...]] = ()
    parts: ClassVar[tuple[str, ...]] = ()

    def check(self, view: Any) -> Iterable[Problem]:
        return ()

    def forwards(self) -> int:
        return 0

    def apply(self, segment: Segment, context: Context) -> None:
        for linear, scheme in segment.schemes.items():
            gram = context.statistic(linear, Gram).matrix if context.has(Gram) else None
            put(segment, linear, round_to_nearest(segment.weight(linear), scheme, segment.ranges.get(linear)), gram)
            context.advance(linear)
