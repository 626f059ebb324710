"""SCAP (Chua et al. 2024, arXiv 2412.07174): prune what linears read, around the mode of its distribution.

``x Wᵀ + b == (x - mu) Wᵀ + (b + mu rowsum(W))`` exactly, so values near mu, instead of values near 0, can be pruned
where the distribution peaks at mu (behind a GELU, at its minimum of -0.17).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from calibration.architectures import ArchitectureSpec, BlockSpec
from calibration.errors import Problem
from calibration.walk.capture import Watch
from calibration.walk.context import Context
from calibration.walk.passes import PlanView
from calibration.walk.segment import Segment
from sparsity.files import sites_from
from sparsity.gate import GatePass
from sparsity.masking import Masks, block_masked, block_watches
from sparsity.pools import calibration_rows, input_pools
from sparsity.rules import Rule, pool_rule, put, share_of, target_problems, token_problems
from sparsity.sites import Site, prune
from sparsity.thresholds import kernel_mode

GAIN = 0.99  # a center must lower the error of the output by 1 %; else it is noise, and costs a bias
NEAR_ZERO = 1e-6


@dataclass(frozen=True)
class Scap(GatePass):
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
        sites: list[Site] = []
        for stage in self._stages(segment):
            before = block_watches(Masks(), segment.architecture, segment.index, sites)
            pools = input_pools(segment, context, stage, before)
            shares = {linear: share_of(linear, self.target, self.targets) for linear in stage}
            rules = [pool_rule(linear, "input", pools[linear]) for linear in stage]
            rules = self._centered(segment, context, rules, shares, before)
            sites += put(segment, rules, shares)

    def masked(
        self, block: nn.Module, spec: ArchitectureSpec, index: int, gates: Mapping[str, torch.Tensor]
    ) -> AbstractContextManager[Any]:
        return block_masked(block, spec, index, sites_from(gates))

    def _stages(self, segment: Segment) -> list[list[str]]:
        """Linears to prune, by stage of execution."""
        pruned = self.skipped(segment.spec)
        stages: dict[int, list[str]] = {}
        for shared in segment.spec.inputs:
            wanted = [n for n in shared.linears if n in pruned]
            if wanted:
                stages.setdefault(shared.stage, []).extend(wanted)
        return [stages[stage] for stage in sorted(stages)]

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
    errors = {linear: [0.0] * len(rules) for linear, rules in candidates.items()}
    watches = list(before)
    for linear, rules in candidates.items():
        weight = segment.weight(linear).float()
        thresholds = [rule.threshold(shares[linear]) for rule in rules]

        def look(
            x: torch.Tensor,
            positions: torch.Tensor,
            linear: str = linear,
            weight: torch.Tensor = weight,
            rules: Sequence[Rule] = rules,
            thresholds: Sequence[torch.Tensor] = thresholds,
        ) -> None:
            rows = calibration_rows(x, positions).float()
            for i, (rule, threshold) in enumerate(zip(rules, thresholds, strict=True)):
                change = rows - prune(rows, threshold, torch.tensor([rule.center], dtype=torch.float32))
                errors[linear][i] += float((change @ weight.T).square().sum(dtype=torch.float64))

        watches.append(Watch(segment.architecture.module_name(linear), look))
    context.watch(watches)
    return errors
