"""PPL-p% sparsity: the most sparsity whose perplexity grows by at most p per cent.

As in "Sparsing Law" (Luo et al. 2024, arXiv 2411.02335) a budget c for the relative error of a layer's output is the
same for all layers, each layer prunes as much as its budget allows, and c is searched for. There the error is that of
the feed-forward output and the rule is magnitude; here any method makes the thresholds, and the error is that of what
the block adds to the residual stream, so that pruned attention counts as well.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from calibration.architectures import ArchitectureSpec, BlockSpec
from calibration.errors import Problem
from calibration.model.watching import Watch
from calibration.walk.context import Context
from calibration.walk.cost import BlockShape, Work
from calibration.walk.passes import Pass, PlanView
from calibration.walk.segment import Segment
from sparsity.files import sites_from
from sparsity.gate import GatePass, with_target
from sparsity.masking import Masks, block_watches
from sparsity.pools import calibration_rows
from sparsity.sites import Site
from sparsity.thresholds import interpolate

GRID = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
"""Targets at which every block is measured; thresholds between them are interpolated."""

ROUNDS = 12
"""Bisections of the budget: 0.02 % of the range that is searched."""


@dataclass(frozen=True)
class Profile(GatePass):
    """A method at every target of `GRID`, with the error that each block then makes; for `choose`.

    All blocks are calibrated on the dense model, where the methods by themselves calibrate behind pruned blocks.

    Attributes:
        step: the method; its own target is not used.
        batches: calibration batches on which errors are measured.
    """

    step: GatePass
    batches: int = 4

    name: ClassVar[str] = "profile"
    summary: ClassVar[str] = "measures a method at every target"

    def check(self, view: PlanView[Any]) -> Iterable[Problem]:
        yield from self.step.check(view)
        if getattr(self.step, "targets", ""):
            yield Problem("shares by name", "are what a perplexity budget decides", "leave --target out")

    masked = Pass.masked  # of later blocks all targets shall see the same inputs

    def skipped(self, block: BlockSpec) -> tuple[str, ...]:
        return self.step.skipped(block)

    def forwards(self) -> int:
        return (len(GRID) - 1) * self.step.forwards()

    def cost(self, block: BlockShape) -> list[Work]:
        measuring = block.forward * (len(GRID) * min(self.batches, block.batches) / block.batches)
        return [*with_target(self.step, GRID[-1]).cost(block), measuring]

    def apply(self, segment: Segment, context: Context) -> None:
        entering, dense = self._run(segment, context, ())
        norms = (dense - entering).norm(dim=1).clamp_min(1e-30)
        errors = [0.0]
        profile: dict[str, torch.Tensor] = {}
        for target, gates in zip(GRID[1:], self.step.apply_each(segment, context, GRID[1:]), strict=True):
            pruned = self._run(segment, context, sites_from(gates))[1]
            errors.append(float(((pruned - dense).norm(dim=1) / norms).mean()))
            profile.update({_key(target, name): tensor for name, tensor in gates.items()})
        profile[f"{segment.prefix}errors"] = torch.tensor(errors, dtype=torch.float32)
        segment.gates = profile

    def _run(self, segment: Segment, context: Context, sites: Iterable[Site]) -> tuple[torch.Tensor, torch.Tensor]:
        """What enters the block and what leaves it, float32 ``[tokens, hidden]``."""
        seen: dict[bool, list[torch.Tensor]] = {False: [], True: []}

        def into(output: bool) -> Callable[[torch.Tensor, torch.Tensor], None]:
            return lambda x, positions: seen[output].append(calibration_rows(x, positions).float())

        watches = block_watches(Masks(), segment.architecture, segment.index, sites)
        ends = [Watch("", into(False)), Watch("", into(True), output=True)]
        context.watch([*watches, *ends], self.batches)
        return torch.cat(seen[False]), torch.cat(seen[True])


def _key(target: float, name: str) -> str:
    return f"{target:.2f}/{name}"


@dataclass(frozen=True)
class Choice:
    """What a budget buys.

    Attributes:
        budget: c, relative error that every block may make.
        targets: of the method, by block.
        sites: with thresholds for these targets.
        increase: of the perplexity, relative (0.01: one per cent).
    """

    budget: float
    targets: tuple[float, ...]
    sites: tuple[Site, ...]
    increase: float


def sites_within(
    profile: Mapping[str, torch.Tensor], spec: ArchitectureSpec, budget: float
) -> tuple[tuple[float, ...], tuple[Site, ...]]:
    """Targets by block, and sites, such that no block's relative error is larger than ``budget``."""
    targets, sites = [], []
    for index in range(spec.n_blocks):
        prefix = spec.prefix(index)
        target = interpolate(budget, GRID, profile[f"{prefix}errors"].tolist())
        targets.append(target)
        above = next((i for i, t in enumerate(GRID) if t >= target), len(GRID) - 1)
        if target > 0.0:
            inside = (target - GRID[above - 1]) / (GRID[above] - GRID[above - 1])
            sites += _between(_at(profile, prefix, GRID[above - 1]), _at(profile, prefix, GRID[above]), inside)
    return tuple(targets), tuple(sites)


def _at(profile: Mapping[str, torch.Tensor], prefix: str, target: float) -> tuple[Site, ...]:
    start = _key(target, prefix)
    cut = len(_key(target, ""))
    return sites_from({name[cut:]: tensor for name, tensor in profile.items() if name.startswith(start)})


def _between(low: Iterable[Site], high: Iterable[Site], inside: float) -> list[Site]:
    """Sites with thresholds between those of two targets. A site around another center stays at the lower target; one
    that the lower target does not prune starts from nothing."""
    below = {site.name: site for site in low}
    sites = []
    for site in high:
        start = below.pop(site.name, None)
        if start is None and site.center is None:
            sites.append(dataclasses.replace(site, threshold=inside * site.threshold))
        elif start is not None and _same_center(start, site):
            mixed = torch.lerp(start.threshold, site.threshold, inside)
            sites.append(dataclasses.replace(site, threshold=mixed))
        elif start is not None:
            sites.append(start)
    return [*sites, *below.values()]


def _same_center(a: Site, b: Site) -> bool:
    if a.center is None or b.center is None:
        return a.center is b.center
    return torch.equal(a.center, b.center)


def choose(
    profile: Mapping[str, torch.Tensor],
    spec: ArchitectureSpec,
    limit: float,
    increase: Callable[[tuple[Site, ...]], float],
    rounds: int = ROUNDS,
) -> Choice:
    """The largest budget whose sites raise the perplexity by at most ``limit``, by bisection.

    Args:
        profile: the gates of a walk with `Profile`.
        limit: relative, 0.01 for one per cent; not negative.
        increase: sites -> relative increase of the perplexity on some held-out text.

    Returns:
        the best budget found; 0, with nothing pruned, where every one that was tried costs too much.
    """
    high = max(float(profile[f"{spec.prefix(index)}errors"].max()) for index in range(spec.n_blocks))
    best = Choice(0.0, (0.0,) * spec.n_blocks, (), 0.0)
    budget = high
    for _ in range(rounds):
        targets, sites = sites_within(profile, spec, budget)
        found = increase(sites)
        if found <= limit:
            best = Choice(budget, targets, sites, found)
        else:
            high = budget
        if best.budget == high:
            break
        budget = 0.5 * (best.budget + high)
    return best
