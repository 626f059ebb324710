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
from ptq.numerics.grids import Grid, grid_of, own_global_scale, round_to_grid, zero_of
from ptq.quantized import QuantizedTensor
from ptq.scheme import QuantScheme


def round_to_nearest(
    w: torch.Tensor,
    scheme: QuantScheme,
    grid: Grid | None = None,
    global_scale: torch.Tensor | None = None,
) -> QuantizedTensor:
    """Round ``W [out, in]`` (float32).

    Args:
        grid: chosen for W; None takes the one that its ranges span.
        global_scale: ``[1]``, for two-level formats; None takes that of W alone.
    """
    quant, global_scale = scheme.weights, own_global_scale(w, scheme.weights, global_scale)
    grid = grid or grid_of(w, quant, None, global_scale)
    codes = round_to_grid(w, quant, grid, global_scale)[1]
    return QuantizedTensor(codes, grid.scale.float(), zero_of(grid, quant), scheme, global_scale=global_scale)


@dataclass(frozen=True)
class Rtn(Pass):
    """Round to nearest, on the grids that an earlier pass chose where there are some."""

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
            w, grid = segment.weight(linear), segment.grids.get(linear)
            put(segment, linear, round_to_nearest(w, scheme, grid, shared.get(linear)), gram)
            context.advance(linear)
