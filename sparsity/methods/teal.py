"""TEAL (Liu et al. 2024, arXiv 2408.14690): prune what every linear reads; a greedy search spreads a block's budget.

Thresholds are quantiles of |x|, which for symmetric inputs are the published F^-1(0.5 + s/2), and for others right.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from calibration.architectures import BlockSpec
from calibration.errors import Problem
from calibration.walk.capture import Watch
from calibration.walk.context import Context
from calibration.walk.passes import PlanView
from calibration.walk.segment import Segment
from sparsity.gate import GatePass
from sparsity.masking import Masks, block_watches
from sparsity.pools import calibration_rows, input_pools
from sparsity.rules import Rule, pool_rule, put, share_of, target_problems, token_problems

Shares = dict[str, float]


def greedy_shares(
    numel: Mapping[str, int], error: Callable[[Shares], float], step: float, target: float
) -> list[tuple[float, float, Shares]]:
    """Block-wise greedy allocation: every step removes the same number of weights where it hurts least.

    Increases of the error are measured lazily: a linear is tried again only when the increase last seen for it is the
    smallest. Where errors grow ever faster with a linear's own share and do not fall with another's (squared errors
    nearly add up), that takes the steps of the published search, which tries every linear before every step, with a
    fifth of the trials.

    Args:
        numel: weights of each linear.
        error: squared, of the block's output for given shares.
        step: weights removed per step, as a share of the largest linear.
        target: share of all weights to be removed, in [0, 1).

    Returns:
        after every step, from nothing pruned on: (share of all weights removed, error, shares by linear). The last row
        removes ``target`` exactly, for which its step is shortened.
    """
    total = sum(numel.values())
    unit = step * max(numel.values())
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


@dataclass(frozen=True)
class Teal(GatePass):
    """Prune a share of what every linear of the blocks reads.

    Attributes:
        target: share of the weights of each block that is skipped.
        targets: shares by name, ``k_proj=0.2,*=0.5``; only for the uniform allocation.
        allocation: ``greedy`` spreads the target over the linears of a block by the error of its output (all blocks
            skip the same share of weights, as published); ``uniform`` prunes the same share everywhere.
        step: of the greedy search, as a share of the largest linear's weights.
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
            yield Problem(f"teal.step {self.step:g}", "outside (0, 1]", "use 0.05")
        if self.batches < 1:
            yield Problem(f"teal.batches {self.batches}", "not positive", "use 1")
        yield from token_problems(view.tokens)

    def skipped(self, block: BlockSpec) -> tuple[str, ...]:
        return block.linears

    def forwards(self) -> int:
        return 1

    def apply(self, segment: Segment, context: Context) -> None:
        pools = input_pools(segment, context, segment.spec.linears)
        rules = {linear: pool_rule(linear, "input", pool) for linear, pool in pools.items()}
        if self.allocation == "uniform" or self.targets:
            shares = {linear: share_of(linear, self.target, self.targets) for linear in rules}
        else:
            shares = self._search(segment, context, rules)
        put(segment, rules.values(), shares)

    def _search(self, segment: Segment, context: Context, rules: Mapping[str, Rule]) -> Shares:
        """Shares per linear. Experts of one kind get one share: a group counts with all its weights."""
        groups: dict[str, list[str]] = {}
        for linear in rules:
            shared = segment.spec.shared_input(linear)
            key = linear if shared.expert is None else f"expert {linear.rpartition('.')[2]}"
            groups.setdefault(key, []).append(linear)
        numel = {key: sum(segment.weight(n).numel() for n in names) for key, names in groups.items()}
        members = {n: key for key, names in groups.items() for n in names}
        dense = _block_outputs(segment, context, [], self.batches)

        def error(shares: Shares) -> float:
            # a share of 1 would need an infinite threshold: it is pruned to the last value of the pool
            sites = [
                rule.site(segment, min(shares[members[n]], LAST)) for n, rule in rules.items() if shares[members[n]]
            ]
            watches = block_watches(Masks(), segment.architecture, segment.index, sites)
            return float((_block_outputs(segment, context, watches, self.batches) - dense).square().sum())

        best = greedy_shares(numel, error, self.step, self.target)[-1][2]
        return {linear: min(best[members[linear]], LAST) for linear in rules}


LAST = 1.0 - 1e-6


def _block_outputs(segment: Segment, context: Context, watches: Iterable[Watch], batches: int) -> torch.Tensor:
    """What the block gives on the first batches, float32 ``[tokens, hidden]``."""
    outputs: list[torch.Tensor] = []

    def look(x: torch.Tensor, positions: torch.Tensor) -> None:
        outputs.append(calibration_rows(x, positions).float())

    context.watch([*watches, Watch("", look, output=True)], batches)
    return torch.cat(outputs)
