"""RTN: every weight to the nearest point of a grid that its group's range spans. No data, no error feedback."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from calibration.errors import Problem
from calibration.walk.context import Context
from calibration.walk.passes import Phase, Stream
from calibration.walk.segment import Segment
from calibration.walk.statistics import Gram, Statistic
from ptq.methods.rounding import global_scales, put
from ptq.numerics import superblocks
from ptq.numerics.grids import codes_of, grid_parameters, levels, own_global_scale, step_of
from ptq.numerics.groups import join, split
from ptq.quantized import QuantizedTensor
from ptq.scheme import QuantScheme


def round_to_nearest(
    w: torch.Tensor,
    scheme: QuantScheme,
    clip: torch.Tensor | None = None,
    global_scale: torch.Tensor | None = None,
    importance: torch.Tensor | None = None,
) -> QuantizedTensor:
    """Round ``W [out, in]`` (float32) with the scheme's grid.

    Args:
        clip: ``[lines, G]`` bounds of the ranges.
        global_scale: ``[1]``, for two-level formats; None takes that of W alone.
        importance: ``[in]``, what an error of a column counts where the grid is searched (K-quants); None: all alike.
    """
    if scheme.weights.superblocks:
        return _on_superblocks(w, scheme, importance)
    quant, global_scale = scheme.weights, own_global_scale(w, scheme.weights, global_scale)
    units = split(w, quant.grouping)
    scale, zero = grid_parameters(units, quant, clip, global_scale)
    z = None if zero is None else zero.unsqueeze(-1)
    level = levels(units, step_of(scale, global_scale).unsqueeze(-1), z, quant)
    codes = join(codes_of(level, z, quant), quant.grouping).contiguous()
    zero = None if zero is None else zero.to(torch.uint8)
    return QuantizedTensor(codes, scale.float(), zero, scheme, global_scale=global_scale)


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
        context.gather()
        shared = global_scales(segment)
        for linear, scheme in segment.schemes.items():
            gram = context.statistic(linear, Gram).matrix if context.has(Gram) else None
            w, clip = segment.weight(linear), segment.ranges.get(linear)
            importance = None if gram is None else gram.diagonal()
            put(segment, linear, round_to_nearest(w, scheme, clip, shared.get(linear), importance), gram)
            context.advance(linear)
