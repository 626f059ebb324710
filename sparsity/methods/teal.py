"""TEAL (Liu et al. 2024, arXiv 2408.14690): prune what every linear reads; a greedy search spreads a block's budget.

Thresholds are quantiles of |x|, which for symmetric inputs are the published F^-1(0.5 + s/2), and for others right. The
search looks at the block's inputs as they come, as published; the thresholds of the shares that it finds are then
calibrated behind what is pruned before them (the published ones are those of the dense model, and prune more than
they were asked for).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from calibration.architectures import BlockSpec
from calibration.errors import Problem
from calibration.model.watching import Watch
from calibration.walk.context import Context
from calibration.walk.cost import BlockShape, Work
from calibration.walk.passes import PlanView
from calibration.walk.segment import Segment
from sparsity.masking import Masks, block_watches
from sparsity.pools import calibration_rows, input_pools
from sparsity.rules import Rule, share_of, target_problems, token_problems
from sparsity.stages import StagedPass, rules_of

Shares = dict[str, float]


def greedy_shares(
    numel: Mapping[str, int], error: Callable[[Shares], float], unit: float, target: float
) -> list[tuple[float, float, Shares]]:
    """Block-wise greedy allocation: every step removes the same number of weights where it hurts least.

    Increases of the error are measured lazily: a linear is tried again only when the increase last seen for it is the
    smallest. Where errors grow ever faster with a linear's own share and do not fall with another's (squared errors
    nearly add up), that takes the steps of the published search, which tries every linear before every step, with a
    fifth of the trials.

    Args:
        numel: weights of each linear.
        error: squared, of the block's output for given shares.
        unit: weights removed per step.
        target: share of all weights to be removed, in [0, 1).

    Returns:
        after every step, from nothing pruned on: (share of all weights removed, error, shares by linear). The last row
        removes ``target`` exactly, for which its step is shortened.
    """
    total = sum(numel.values())
    shares = dict.fromkeys(numel, 0.0)
    removed = 0.0
    rows = [(0.0, 0.0, dict(shares))]
    unknown = dict.fromkeys(numel, float("-inf"))
    increases = dict(unknown)
    while target * total - removed > 1e-9 * total:
        amount = min(unit, target * total - removed)
        if amount < unit:  # the last step is shorter: what was seen of longer ones says nothing
            increases = dict(unknown)
        errors: dict[str, float] = {}
        open_ = [name for name in numel if shares[name] < 1.0]
        while (best := min(open_, key=increases.__getitem__)) not in errors:
            errors[best] = error({**shares, best: min(1.0, shares[best] + amount / numel[best])})
            increases[best] = errors[best] - rows[-1][1]
        share = min(1.0, shares[best] + amount / numel[best])
        removed += (share - shares[best]) * numel[best]
        shares[best] = share
        rows.append((removed / total, errors[best], dict(shares)))
    return rows


def shares_at(rows: list[tuple[float, float, Shares]], target: float) -> Shares:
    """The shares on the way of a greedy search at which ``target`` of all weights are removed: between two rows, the
    part of the step that is needed."""
    after = next(i for i, row in enumerate(rows) if row[0] >= target - 1e-9)
    if after == 0:
        return dict(rows[0][2])
    low, high = rows[after - 1], rows[after]
    inside = min(1.0, (target - low[0]) / (high[0] - low[0]))
    return {name: low[2][name] + inside * (high[2][name] - low[2][name]) for name in low[2]}


@dataclass(frozen=True)
class Teal(StagedPass):
    """Prune a share of what every linear of the blocks reads.

    Attributes:
        target: share of the weights of each block that is skipped.
        targets: shares by name, ``k_proj=0.2,*=0.5``; only for the uniform allocation.
        allocation: ``greedy`` spreads the target over the linears of a block by the error of its output (all blocks
            skip the same share of weights, as published); ``uniform`` prunes the same share everywhere.
        step: of the greedy search, as a share of the weights of q; every other linear loses as many weights per step.
        batches: calibration batches that the search runs the block on.
    """

    target: float = 0.5
    targets: str = ""
    allocation: Literal["greedy", "uniform"] = "greedy"
    step: float = 0.05
    batches: int = 1

    name: ClassVar[str] = "teal"
    title: ClassVar[str | None] = "TEAL"
    summary: ClassVar[str] = "prunes what every linear reads, with shares spread over a block by a greedy search"

    def check(self, view: PlanView[Any]) -> Iterable[Problem]:
        yield from target_problems(self.target, self.targets)
        if not 0.0 < self.step <= 1.0:
            yield Problem(f"{self.name}.step {self.step:g}", "outside (0, 1]", "use 0.05")
        if self.batches < 1:
            yield Problem(f"{self.name}.batches {self.batches}", "not positive", "use 1")
        yield from token_problems(view.tokens)

    def skipped(self, block: BlockSpec) -> tuple[str, ...]:
        return block.linears

    @property
    def searches(self) -> bool:
        return self.allocation == "greedy" and not self.targets

    def forwards(self) -> int:
        return 4 + self.searches

    def cost(self, block: BlockShape) -> list[Work]:
        """A search of as many steps as it takes to reach the target; each tries a linear or two on the block."""
        if not self.searches or not block.linears:
            return []
        rows, width = block.linears[0]
        steps = self.target * sum(r * w for r, w in block.linears) / (self.step * rows * width)
        share = min(self.batches, block.batches) / block.batches
        return [block.forward * (TRIED * steps * share)]

    def importance(self, segment: Segment, linear: str) -> torch.Tensor | None:
        """What |x| counts by channel, float32 ``[in]``; None: all alike."""
        return None

    def apply(self, segment: Segment, context: Context) -> None:
        if self.searches:
            shares = self._all_shares(segment, self._search(segment, context, self.target), self.target)
        else:
            shares = {n: share_of(n, self.target, self.targets) for n in segment.spec.linears}
        self.put_by_stage(segment, context, shares)

    def apply_each(
        self, segment: Segment, context: Context, targets: Sequence[float]
    ) -> Iterator[dict[str, torch.Tensor]]:
        """One search serves all targets: its way to the largest passes the others."""
        if not self.searches:
            yield from super().apply_each(segment, context, targets)
            return
        rows = self._search(segment, context, max(targets))
        for target in targets:
            segment.gates = {}
            self.put_by_stage(segment, context, self._all_shares(segment, rows, target))
            yield segment.gates

    def stage_rules(
        self,
        segment: Segment,
        context: Context,
        stage: Sequence[str],
        shares: Mapping[str, float],
        before: Sequence[Watch],
    ) -> Iterable[Rule]:
        found = {linear: self.importance(segment, linear) for linear in stage}
        weights = {linear: tensor for linear, tensor in found.items() if tensor is not None}
        return rules_of(input_pools(segment, context, stage, before, weights or None), weights)

    def _groups(self, segment: Segment) -> dict[str, list[str]]:
        """What gets one share: a linear, or all experts' linears of one kind."""
        groups: dict[str, list[str]] = {}
        for linear in segment.spec.linears:
            shared = segment.spec.shared_input(linear)
            key = linear if shared.expert is None else f"expert {linear.rpartition('.')[2]}"
            groups.setdefault(key, []).append(linear)
        return groups

    def _all_shares(self, segment: Segment, rows: list[tuple[float, float, Shares]], target: float) -> Shares:
        found = shares_at(rows, target)
        return {n: min(found[key], LAST) for key, names in self._groups(segment).items() for n in names}

    def _search(self, segment: Segment, context: Context, target: float) -> list[tuple[float, float, Shares]]:
        """The rows of `greedy_shares`, by group."""
        rules = {rule.linear: rule for rule in self.stage_rules(segment, context, segment.spec.linears, {}, ())}
        groups = self._groups(segment)
        numel = {key: sum(segment.weight(n).numel() for n in names) for key, names in groups.items()}
        members = {n: key for key, names in groups.items() for n in names}

        def search() -> list[tuple[float, float, Shares]]:
            dense = _block_outputs(segment, context, [], self.batches)

            def error(shares: Shares) -> float:
                # a share of 1 would need an infinite threshold: it is pruned to the last value of the pool
                sites = [
                    rule.site(segment, min(shares[members[n]], LAST)) for n, rule in rules.items() if shares[members[n]]
                ]
                watches = block_watches(Masks(), segment.architecture, segment.index, sites)
                return float((_block_outputs(segment, context, watches, self.batches) - dense).square().sum())

            return greedy_shares(numel, error, self.step * query_weights(segment), target)

        return context.by_the_first(search)


def query_weights(segment: Segment) -> int:
    """Weights of q, in which the published steps are counted; of what takes its place where it is fused with k and v
    or made of two factors: a square of the width of the first input."""
    scores = segment.spec.scores
    width = segment.weight(segment.spec.inputs[0].linears[0]).shape[1]
    return segment.weight(scores[0]).numel() if len(scores) > 1 else width * width


LAST = 1.0 - 1e-6
TRIED = 1.7  # forward passes of a step of the search, pruned as they are


def _block_outputs(segment: Segment, context: Context, watches: Iterable[Watch], batches: int) -> torch.Tensor:
    """What the block gives on the first batches, float32 ``[tokens, hidden]``."""
    outputs: list[torch.Tensor] = []

    def look(x: torch.Tensor, positions: torch.Tensor) -> None:
        outputs.append(calibration_rows(x, positions).float())

    context.watch([*watches, Watch("", look, output=True)], batches)
    return torch.cat(outputs)
