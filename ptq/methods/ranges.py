"""Static ranges of inputs (``-astatic``, ``-achannel``), calibrated after everything that rescales them."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch

from calibration.architectures import BlockSpec
from calibration.errors import Problem, ToolkitError
from calibration.walk.context import Context
from calibration.walk.passes import Pass, Phase, PlanView, Stream
from calibration.walk.segment import Segment
from calibration.walk.statistics import EqualBins, Extremes
from ptq.activations import ActivationQuant
from ptq.linears import ModelLayout
from ptq.numerics.activations import step_and_zero
from ptq.numerics.integers import round_scale
from ptq.numerics.ranges import Estimator, static_range
from ptq.quantized import INPUT_GRID


@dataclass(frozen=True)
class Ranges(Pass):
    """Steps and zero points of static inputs that no earlier pass gave any, as parts beside the codes.

    Statistics are gathered when the pass runs, not with those of the other passes: balancing changes the inputs.

    Attributes:
        estimator: how a range follows from a histogram, see `ptq.numerics.ranges`. Channels take min-max.
        percentile: in percent, for that estimator.
    """

    estimator: Estimator = "minmax"
    percentile: float = 99.99

    name: ClassVar[str] = "ranges"
    summary: ClassVar[str] = "calibrates the ranges of static inputs"
    phases: ClassVar[tuple[Phase, ...]] = (Phase.CHOOSE,)
    stream: ClassVar[Stream] = "quantized"
    parts: ClassVar[tuple[str, ...]] = ("input_scale", "input_zero")

    def check(self, view: PlanView[ModelLayout]) -> Iterable[Problem]:
        if not 50 < self.percentile <= 100:
            reason = f"{self.percentile} is outside (50, 100]"
            yield Problem("ranges.percentile", reason, "use 99.99; it is in percent")
        schemes = [linear.scheme for linear in view.layout.quantized if linear.scheme is not None]
        grids = [scheme.inputs for scheme in schemes if scheme.inputs is not None]
        static = [grid for grid in grids if not grid.dynamic]
        if view.layout.quantized and not static:
            fix = "leave 'ranges' out, or use a scheme with -astatic, for example w8a8-astatic"
            yield Problem("ranges", "no scheme has static inputs, so there is nothing to calibrate", fix)
        if self.estimator != "minmax" and any(grid.granularity == "channel" for grid in static):
            reason = f"'{self.estimator}' needs a histogram, and -achannel keeps the extremes of each channel only"
            yield Problem("ranges.estimator", reason, 'use "minmax", or -astatic')
        if self.estimator == "entropy" and any(grid.kind != "int" for grid in static):
            yield Problem("ranges.estimator", "'entropy' merges bins to integer levels, not to floats", 'use "mse"')

    def forwards(self) -> int:
        return 1

    def calibrated(self, block: BlockSpec) -> Collection[str]:
        return block.linears

    def apply(self, segment: Segment, context: Context) -> None:
        grids = {
            linear: scheme.inputs
            for linear, scheme in segment.schemes.items()
            if scheme.inputs is not None and not scheme.inputs.dynamic and not self._known(segment, linear)
        }
        if not grids:
            return
        channelwise = any(grid.granularity == "channel" for grid in grids.values())
        context.refresh(None, EqualBins, *([Extremes] if channelwise else []))
        for linear, grid in grids.items():
            ends = self._range(context, segment, linear, grid)
            scale, zero = step_and_zero(*ends, grid)
            parts = segment.parts.setdefault(linear, {})
            parts["input_scale"] = round_scale(scale).view(-1)  # as for weights: no format rounds it again
            if zero is not None:
                parts["input_zero"] = zero.view(-1)

    @staticmethod
    def _known(segment: Segment, linear: str) -> bool:
        """Whether an earlier pass left a step."""
        return INPUT_GRID[0] in segment.parts.get(linear, {})

    def _range(
        self, context: Context, segment: Segment, linear: str, grid: ActivationQuant
    ) -> tuple[torch.Tensor, torch.Tensor]:
        seen = context.statistic(linear, EqualBins)
        if seen.tokens == 0:
            raise ToolkitError(
                f"{segment.full_name(linear)}: saw no calibration tokens, and a static range needs some",
                "use more --samples, or a scheme with -atoken",
            )
        if grid.granularity == "channel":
            extremes = context.statistic(linear, Extremes)
            return extremes.low, extremes.high
        ends = static_range(seen.counts, seen.limit, seen.low, seen.high, grid, self.estimator, self.percentile)
        segment.note(linear, **{"ranges.low": round(ends[0], 6), "ranges.high": round(ends[1], 6)})
        return torch.tensor(ends[0]), torch.tensor(ends[1])
