"""SCAP (Chua et al. 2024, arXiv 2412.07174): prune what linears read, around the mode of its distribution.

``x Wᵀ + b == (x - mu) Wᵀ + (b + mu rowsum(W))`` exactly, so values near mu, instead of values near 0, can be pruned
where the distribution peaks at mu (behind a GELU, at its minimum of -0.17).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from calibration.architectures import BlockSpec
from calibration.errors import Problem
from calibration.model.watching import Look, Watch
from calibration.walk.context import Context
from calibration.walk.lanes import merge
from calibration.walk.passes import PlanView
from calibration.walk.segment import Segment
from sparsity.pools import calibration_rows, input_pools
from sparsity.rules import Rule, share_of, target_problems, token_problems
from sparsity.sites import prune
from sparsity.stages import StagedPass, rules_of
from sparsity.thresholds import kernel_mode

GAIN = 0.99  # a center must lower the error of the output by 1 %; else it is noise, and costs a bias
NEAR_ZERO = 1e-6


@dataclass(frozen=True)
class Scap(StagedPass):
    """Prune a share of the input of every linear of the feed-forward networks (or of all linears).

    Stage by stage: thresholds of a stage are taken from what arrives behind the pruned stages before it, as published.

    Attributes:
        target: share pruned at every site.
        targets: other shares by name, ``down_proj=0.55,*=0.35``.
        centering: which inputs may be centered at their mode. ``plain``: those of the last linear of networks without
            a gate, whose inputs come straight from GELU; ``every`` input; ``none``. Of 0, the median and the peak of a
            kernel density estimate the one with the smallest error of the layer's output is taken.
        linears: ``ffn``, or ``all`` linears of the blocks.
    """

    target: float = 0.5
    targets: str = ""
    centering: Literal["plain", "every", "none"] = "plain"
    linears: Literal["ffn", "all"] = "ffn"

    name: ClassVar[str] = "scap"
    title: ClassVar[str | None] = "SCAP"
    summary: ClassVar[str] = "prunes what the feed-forward linears read, around the mode of its distribution"

    def check(self, view: PlanView[Any]) -> Iterable[Problem]:
        yield from target_problems(self.target, self.targets)
        yield from token_problems(view.tokens)

    def skipped(self, block: BlockSpec) -> tuple[str, ...]:
        ffn = {n for network in block.feed_forward for n in (network.gate, network.up, network.down)}
        return tuple(n for n in block.linears if self.linears == "all" or n in ffn)

    def forwards(self) -> int:
        return (2 if self.linears == "ffn" else 4) * (1 if self.centering == "none" else 2)

    def apply(self, segment: Segment, context: Context) -> None:
        shares = {n: share_of(n, self.target, self.targets) for n in self.skipped(segment.spec)}
        self.put_by_stage(segment, context, shares)

    def stage_rules(
        self,
        segment: Segment,
        context: Context,
        stage: Sequence[str],
        shares: Mapping[str, float],
        before: Sequence[Watch],
    ) -> Iterable[Rule]:
        pools = input_pools(segment, context, stage, before)
        return self._centered(segment, context, rules_of(pools, {}), shares, before)

    def _centered(
        self,
        segment: Segment,
        context: Context,
        rules: Sequence[Rule],
        shares: Mapping[str, float],
        before: Sequence[Watch],
    ) -> list[Rule]:
        """The rules with the center that lowers the output's error most, where one lowers it at all."""
        plain = {network.down for network in segment.spec.feed_forward if network.gate is None}
        candidates: dict[str, list[Rule]] = {}
        for rule in rules:
            if shares[rule.linear] > 0.0 and (self.centering == "every" or rule.linear in plain):
                modes = (rule.histogram.quantile(0.5), kernel_mode(rule.histogram))
                others = [dataclasses.replace(rule, center=m) for m in modes if abs(m) >= NEAR_ZERO]
                candidates[rule.linear] = [rule, *others]
        candidates = {linear: c for linear, c in candidates.items() if len(c) > 1 and self.centering != "none"}
        if not candidates:
            return list(rules)
        errors = _output_errors(segment, context, candidates, shares, before)
        chosen = {}
        for linear, found in errors.items():
            best = min(range(len(found)), key=found.__getitem__)
            chosen[linear] = candidates[linear][best if found[best] < GAIN * found[0] else 0]
        return [chosen.get(rule.linear, rule) for rule in rules]


def _output_errors(
    segment: Segment,
    context: Context,
    candidates: Mapping[str, Sequence[Rule]],
    shares: Mapping[str, float],
    before: Sequence[Watch],
) -> dict[str, list[float]]:
    """Squared error of each linear's output over the calibration tokens, ‖(x - pruned x) Wᵀ‖², per candidate."""
    earlier, name = list(before), segment.architecture.module_name

    def watches(found: Mapping[str, Errors]) -> list[Watch]:
        looks = {n: found[n].look(segment.weight(n).float(), candidates[n], shares[n]) for n in candidates}
        return earlier + [Watch(name(linear), look) for linear, look in looks.items()]

    found = context.sums(lambda: {n: Errors([0.0] * len(rules)) for n, rules in candidates.items()}, watches)
    return {linear: errors.squares for linear, errors in found.items()}


@dataclass
class Errors:
    """Squared errors of the output of a linear so far, one per candidate."""

    squares: list[float]

    def look(self, weight: torch.Tensor, rules: Sequence[Rule], share: float) -> Look:
        """What a watch calls. ``weight`` float32 ``[out, in]``."""
        thresholds = [rule.threshold(share) for rule in rules]

        def look(x: torch.Tensor, positions: torch.Tensor) -> None:
            rows = calibration_rows(x, positions).float()
            for i, (rule, threshold) in enumerate(zip(rules, thresholds, strict=True)):
                change = rows - prune(rows, threshold, torch.tensor([rule.center], dtype=torch.float32))
                self.squares[i] += float((change @ weight.T).square().sum(dtype=torch.float64))

        return look


@merge.register
def _(total: Errors, other: Errors) -> None:
    total.squares = [a + b for a, b in zip(total.squares, other.squares, strict=True)]
