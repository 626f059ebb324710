"""RTN: every weight to the nearest point of a grid that its group's range spans. No data, no error feedback."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from calibration.threads import one_thread
from calibration.walk.context import Context
from calibration.walk.masters import HALVES
from calibration.walk.passes import Pass, Phase
from calibration.walk.segment import Segment
from calibration.walk.statistics import Gram
from ptq.methods.rounding import global_scales, put
from ptq.numerics import superblocks
from ptq.numerics.grids import Grid, grid_of, nearest_codes, own_global_scale, stacked, step_of, zero_of
from ptq.numerics.groups import join, rows_per_group, split
from ptq.numerics.objective import CACHED_BYTES, row_chunks
from ptq.quantized import QuantizedTensor
from ptq.scheme import QuantScheme


def round_to_nearest(
    w: torch.Tensor,
    scheme: QuantScheme,
    grid: Grid | None = None,
    global_scale: torch.Tensor | None = None,
    importance: torch.Tensor | None = None,
) -> QuantizedTensor:
    """Round ``W [out, in]``.

    Args:
        w: float32 (float64); or bfloat16 or float16, of which some rows at a time become float32.
        grid: chosen for W; None takes the one that its ranges span.
        global_scale: ``[1]``, for two-level formats; None takes that of W alone.
        importance: ``[in]``, what an error of a column counts where the grid is searched (K-quants); None: all alike.
    """
    if scheme.weights.superblocks:
        return _on_superblocks(w.float() if w.dtype in HALVES else w, scheme, importance)
    quant, global_scale = scheme.weights, own_global_scale(w, scheme.weights, global_scale)
    dtype = torch.float32 if w.dtype in HALVES else w.dtype
    codes, grids = torch.empty(w.shape, dtype=torch.uint8, device=w.device), []
    with one_thread():
        for rows in row_chunks(*w.shape, multiple=rows_per_group(quant, len(w)), size=CACHED_BYTES):
            part = w[rows].to(dtype)
            own = grid.rows(quant, len(w), rows) if grid else grid_of(part, quant, None, global_scale)
            grids.append(own)
            zero = None if own.zero is None else own.zero.unsqueeze(-1)
            step = step_of(own.scale, global_scale).unsqueeze(-1)
            codes[rows] = join(nearest_codes(split(part, quant.grouping), step, zero, quant), quant.grouping)
    grid = grid or stacked(grids, quant)
    return QuantizedTensor(codes, grid.scale.float(), zero_of(grid, quant), scheme, global_scale=global_scale)


def _on_superblocks(w: torch.Tensor, scheme: QuantScheme, importance: torch.Tensor | None) -> QuantizedTensor:
    quant = scheme.weights
    grid = superblocks.choose_grid(w, quant, importance)
    units = split(w, quant.grouping)
    codes = superblocks.nearest_codes(units, grid.step.unsqueeze(-1), grid.zero(quant).unsqueeze(-1), quant)
    return QuantizedTensor(
        codes.flatten(-2).to(torch.uint8),
        grid.scale.float(),
        None if grid.minimum is None else grid.minimum.to(torch.uint8),
        scheme,
        super_scale=grid.super_scale.float(),
        super_min=None if grid.super_min is None else grid.super_min.float(),
    )


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
            w, grid = segment.stored_weight(linear), segment.grids.get(linear)
            importance = None if gram is None else gram.diagonal()
            put(segment, linear, round_to_nearest(w, scheme, grid, shared.get(linear), importance), gram)
            context.advance(linear)
