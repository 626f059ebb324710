"""CATS (Lee et al. 2024, arXiv 2404.08763): one threshold per layer on the gate's activation."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from calibration.architectures import BlockSpec
from calibration.errors import Problem
from calibration.model.watching import Watch
from calibration.walk.context import Context
from calibration.walk.passes import PlanView
from calibration.walk.segment import Segment
from sparsity.gate import GatePass
from sparsity.pools import Pool, checked, gated
from sparsity.rules import gate_problems, pool_rule, put, target_problems, token_problems


def gate_watches(segment: Segment, pools: Mapping[str, Pool]) -> list[Watch]:
    """What fills the pools of ``act(gate(x))``, by gate."""
    networks = gated(segment)
    return [Watch(networks[gate].nonlinearity, pool.look(), output=True) for gate, pool in pools.items()]


def gate_pools(segment: Segment, context: Context) -> dict[str, Pool]:
    """Pools of ``act(gate(x))`` of every feed-forward network, by gate."""
    gates = gated(segment)
    return context.sums(lambda: {gate: Pool() for gate in gates}, lambda pools: gate_watches(segment, pools))


def gate_groups(segment: Segment) -> dict[str, int | None]:
    """For `checked`: the gates of experts belong together."""
    return {gate: None if network.expert is None else 0 for gate, network in gated(segment).items()}


@dataclass(frozen=True)
class Cats(GatePass):
    """Prune the smallest ``target`` of |act(gate(x))| of each layer; rows of up and columns of down are skipped.

    Thresholds are quantiles of one pool of all tokens and channels, where the published code takes the left edge of a
    histogram bin on [-2, 2].
    """

    target: float = 0.5

    name: ClassVar[str] = "cats"
    title: ClassVar[str | None] = "CATS"
    summary: ClassVar[str] = "prunes the smallest activations of the gate, with one threshold per layer"

    def check(self, view: PlanView[Any]) -> Iterable[Problem]:
        yield from target_problems(self.target)
        yield from gate_problems(self.name, view.spec)
        yield from token_problems(view.tokens)

    def skipped(self, block: BlockSpec) -> tuple[str, ...]:
        return tuple(n for network in block.feed_forward for n in (network.up, network.down))

    def forwards(self) -> int:
        return 1

    def apply(self, segment: Segment, context: Context) -> None:
        pools = checked(segment, gate_pools(segment, context), gate_groups(segment))
        rules = [pool_rule(gate, "output", pools[gate]) for gate in gated(segment)]
        put(segment, rules, dict.fromkeys(pools, self.target))
