"""Static ranges of inputs (``-astatic``, ``-achannel``) and of KV caches (``-kvstatic``), calibrated after everything
that rescales them.

Most language models have a few inputs in which one token holds values hundreds of times those of all others (Sun et al.
2024, arXiv 2402.17762): a range that covers it leaves the others a code or two, and one that does not makes another
model. Such inputs get a step per token instead, unless the recipe wants otherwise; there are few of them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch

from calibration.architectures import BlockSpec
from calibration.errors import Problem, ToolkitError
from calibration.walk.context import Context
from calibration.walk.passes import Pass, Phase, PlanView, Stream
from calibration.walk.ranges import EqualBins, Extremes, TokenMaxima
from calibration.walk.segment import Segment
from calibration.walk.statistics import Statistic
from ptq.activations import ActivationQuant
from ptq.linears import ModelLayout
from ptq.methods.cache_steps import cache_bins, makers_of, put_steps, static_cache, watching_cache
from ptq.numerics.activations import step_and_zero
from ptq.numerics.integers import round_scale
from ptq.numerics.ranges import Estimator, static_range
from ptq.quantized import CACHE_STEPS, INPUT_GRID
from ptq.scheme import QuantScheme

MASSIVE = 20.0
"""Largest |x| of a token over that of the median token, from which one range for both wastes more than four bits."""


@dataclass(frozen=True)
class Ranges(Pass):
    """Steps and zero points of static inputs that no earlier pass gave any, and the steps of static caches, as parts
    beside the codes.

    Statistics are gathered when the pass runs, inputs and caches in one forward pass, and not with those of the other
    passes: balancing changes the inputs.

    Attributes:
        estimator: how a range follows from a histogram, see `ptq.numerics.ranges`. Channels take min-max.
        percentile: in percent, for that estimator.
        massive: what inputs get in which a token is more than `MASSIVE` times the usual one, where one step should hold
            all of them: a step per ``token``, 16 bits (``float``), or the ``static`` step nevertheless.
    """

    estimator: Estimator = "minmax"
    percentile: float = 99.99
    massive: Literal["token", "float", "static"] = "token"

    name: ClassVar[str] = "ranges"
    summary: ClassVar[str] = "calibrates the ranges of static inputs and caches"
    phases: ClassVar[tuple[Phase, ...]] = (Phase.CHOOSE,)
    stream: ClassVar[Stream] = "quantized"
    parts: ClassVar[tuple[str, ...]] = ("input_scale", "input_zero", *CACHE_STEPS)

    def check(self, view: PlanView[ModelLayout]) -> Iterable[Problem]:
        if not 50 < self.percentile <= 100:
            reason = f"{self.percentile} is outside (50, 100]"
            yield Problem("ranges.percentile", reason, "use 99.99; it is in percent")
        schemes = [linear.scheme for linear in view.layout.quantized if linear.scheme is not None]
        grids = [scheme.inputs for scheme in schemes if scheme.inputs is not None]
        static = [grid for grid in grids if not grid.dynamic]
        static += [cache.grid for scheme in schemes if (cache := static_cache(scheme)) is not None]
        if view.layout.quantized and not static:
            fix = "leave 'ranges' out, or use a scheme with -astatic or -kvstatic, for example w8a8-astatic"
            reason = "no scheme has static inputs or a static KV cache, so there is nothing to calibrate"
            yield Problem("ranges", reason, fix)
        if self.estimator != "minmax" and any(grid.granularity == "channel" for grid in static):
            reason = f"'{self.estimator}' needs a histogram, and -achannel keeps the extremes of each channel only"
            yield Problem("ranges.estimator", reason, 'use "minmax", or -astatic')
        if self.estimator == "entropy" and any(grid.kind != "int" for grid in static):
            yield Problem("ranges.estimator", "'entropy' merges bins to integer levels, not to floats", 'use "mse"')

    def forwards(self) -> int:
        return 1

    def remarks(self, view: PlanView[ModelLayout]) -> Iterable[str]:
        schemes = [linear.scheme for linear in view.layout.quantized if linear.scheme is not None]
        if self.massive != "static" and any(_one_step(scheme.inputs) for scheme in schemes):
            instead = "steps per token" if self.massive == "token" else "16 bits"
            yield (
                f"ranges: inputs with a token {MASSIVE:g} times the usual get {instead} instead of a static step; "
                'massive = "static" in a recipe keeps it'
            )

    def alternatives(self, scheme: QuantScheme, shape: tuple[int, int]) -> Sequence[QuantScheme]:
        """What linears with massive tokens get."""
        return (self._without_static(scheme),) if self.massive != "static" and _one_step(scheme.inputs) else ()

    def _without_static(self, scheme: QuantScheme) -> QuantScheme:
        assert scheme.inputs is not None
        per_token = replace(scheme.inputs, granularity="token", dynamic=True)
        return replace(scheme, inputs=per_token if self.massive == "token" else None)

    def calibrated(self, block: BlockSpec) -> Collection[str]:
        return block.linears

    def apply(self, segment: Segment, context: Context) -> None:
        makers = makers_of(segment)
        grids = {
            linear: scheme.inputs
            for linear, scheme in segment.schemes.items()
            if scheme.inputs is not None and not scheme.inputs.dynamic and not self._known(segment, linear)
        }
        kinds: list[type[Statistic]] = [EqualBins, TokenMaxima] if grids else []
        kinds += [Extremes] if any(grid.granularity == "channel" for grid in grids.values()) else []
        if makers:
            seen = context.sums(cache_bins, lambda bins: watching_cache(segment, bins), *kinds)
            put_steps(segment, seen, self.estimator, self.percentile)
        elif grids:
            context.refresh(None, *kinds)
        for linear, grid in grids.items():
            if self._massive(context, segment, linear, grid):
                segment.schemes[linear] = self._without_static(segment.schemes[linear])
                continue
            ends = self._range(context, segment, linear, grid)
            scale, zero = step_and_zero(*ends, grid)
            parts = segment.parts.setdefault(linear, {})
            parts["input_scale"] = round_scale(scale).view(-1)  # as for weights: no format rounds it again
            if zero is not None:
                parts["input_zero"] = zero.view(-1)

    def _massive(self, context: Context, segment: Segment, linear: str, grid: ActivationQuant) -> bool:
        """Whether a token of the input is so large that it shall have a step of its own; noted where it is."""
        if self.massive == "static" or not _one_step(grid):
            return False
        disparity = context.statistic(linear, TokenMaxima).disparity()
        if disparity > MASSIVE:
            segment.note(linear, **{"ranges.massive": f"a token is {disparity:.0f} times the usual"})
        return disparity > MASSIVE

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
        follows = grid.granularity == "group"  # the live input, below one step that only has to be large enough
        estimator: Estimator = "minmax" if follows else self.estimator
        ends = static_range(seen.counts, seen.limit, seen.low, seen.high, grid, estimator, self.percentile)
        segment.note(linear, **{"ranges.low": round(ends[0], 6), "ranges.high": round(ends[1], 6)})
        return torch.tensor(ends[0]), torch.tensor(ends[1])


def _one_step(grid: ActivationQuant | None) -> bool:
    """Whether one static step holds every token and channel."""
    return grid is not None and not grid.dynamic and grid.granularity == "tensor"
