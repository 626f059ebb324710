"""RTN: every weight to the nearest point of a grid that its group's range spans. No data, no error feedback."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from calibration.walk.context import Context
from calibration.walk.passes import Pass, Phase
from calibration.walk.segment import Segment
from calibration.walk.statistics import Gram
from ptq.methods.rounding import global_scales, put
from ptq.numerics.grids import codes_of, grid_parameters, levels, own_global_scale, step_of
from ptq.numerics.groups import join, split
from ptq.quantized import QuantizedTensor
from ptq.scheme import QuantScheme


def round_to_nearest(
    w: torch.Tensor,
    scheme: QuantScheme,
    clip: torch.Tensor | None = None,
    global_scale: torch.Tensor | None = None,
) -> QuantizedTensor:
    """Round ``W [out, in]`` (float32) with the scheme's grid.

    Args:
        clip: ``[lines, G]`` bounds of the ranges.
        global_scale: ``[1]``, for two-level formats; None takes that of W alone.
    """
    quant, global_scale = scheme.weights, own_global_scale(w, scheme.weights, global_scale)
    units = split(w, quant.grouping)
    scale, zero = grid_parameters(units, quant, clip, global_scale)
    z = None if zero is None else zero.unsqueeze(-1)
    level = levels(units, step_of(scale, global_scale).unsqueeze(-1), z, quant)
    codes = join(codes_of(level, z, quant), quant.grouping).contiguous()
    zero = None if zero is None else zero.to(torch.uint8)
    return QuantizedTensor(codes, scale.float(), zero, scheme, global_scale=global_scale)


@dataclass(frozen=True)
class Rtn(Pass):
    """Round to nearest, within clipping ranges where an earlier pass chose them."""

    name: ClassVar[str] = "rtn"
    title: ClassVar[str | None] = "RTN"
    summary: ClassVar[str] = "rounds every weight to its nearest level"
    phases: ClassVar[tuple[Phase, ...]] = (Phase.ROUND,)
    expected_errors: ClassVar[Literal["nearest", "feedback"] | None] = "nearest"

    def apply(self, segment: Segment, context: Context) -> None:
        context.gather()
        shared = global_scales(segment)
        for linear, scheme in segment.schemes.items():
            gram = context.statistic(linear, Gram).matrix if context.has(Gram) else None
            w, clip = segment.weight(linear), segment.ranges.get(linear)
            put(segment, linear, round_to_nearest(w, scheme, clip, shared.get(linear)), gram)
            context.advance(linear)
