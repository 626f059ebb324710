"""`StagedPass`: thresholds that are calibrated behind everything which is pruned before them.

What is pruned makes the inputs behind it smaller, so thresholds of the dense model prune more than they were asked for.
Here a stage of a block sees the stages before it pruned, and a block the blocks before it (as in every `GatePass`).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence

import torch

from calibration.architectures import BlockSpec
from calibration.model.watching import Watch
from calibration.walk.context import Context
from calibration.walk.segment import Segment
from sparsity.gate import GatePass
from sparsity.masking import Masks, block_watches
from sparsity.pools import Pool
from sparsity.rules import Rule, put
from sparsity.sites import Site


class StagedPass(GatePass):
    """Prunes inputs of linears, stage by stage in the order in which the block computes."""

    def stages(self, block: BlockSpec) -> list[list[str]]:
        """Linears to prune, by stage of execution."""
        pruned = self.skipped(block)
        stages: dict[int, list[str]] = {}
        for shared in block.inputs:
            wanted = [n for n in shared.linears if n in pruned]
            if wanted:
                stages.setdefault(shared.stage, []).extend(wanted)
        return [stages[stage] for stage in sorted(stages)]

    def put_by_stage(self, segment: Segment, context: Context, shares: Mapping[str, float]) -> None:
        """Fix the shares (by linear): each stage's thresholds are those of what arrives behind the stages before it."""
        sites: list[Site] = []
        for stage in self.stages(segment.spec):
            before = block_watches(Masks(), segment.architecture, segment.index, sites)
            rules = self.stage_rules(segment, context, stage, shares, before)
            sites += put(segment, rules, shares)

    @abstractmethod
    def stage_rules(
        self,
        segment: Segment,
        context: Context,
        stage: Sequence[str],
        shares: Mapping[str, float],
        before: Sequence[Watch],
    ) -> Iterable[Rule]:
        """The rules of the linears of one stage; ``before`` prunes the stages before it."""


def rules_of(pools: Mapping[str, Pool], importance: Mapping[str, torch.Tensor]) -> list[Rule]:
    """The rules that prune the smallest values of pools, weighed by ``importance [in]`` where a linear has one."""
    return [
        Rule(linear, "input", pool.histogram, importance.get(linear), shared=pool.shared)
        for linear, pool in pools.items()
    ]
