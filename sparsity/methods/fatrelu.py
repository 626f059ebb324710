"""FATReLU (Song et al. 2024, arXiv 2402.13516): a ReLU that keeps only x >= T, for models with ReLU."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

from calibration.architectures import BlockSpec
from calibration.errors import Problem
from calibration.walk.context import Context
from calibration.walk.passes import PlanView
from calibration.walk.segment import Segment
from sparsity.gate import GatePass
from sparsity.methods.cats import gate_groups, gate_pools
from sparsity.pools import checked, gated, input_pools
from sparsity.rules import ANY_LINEAR, pool_rule, put, target_problems, token_problems


@dataclass(frozen=True)
class FatRelu(GatePass):
    """Raise the threshold of ReLU until ``target`` of its outputs are zero, or no further than its own zeros reach.

    Behind a ReLU nothing is negative, so that keeping x >= T is pruning |x| < T: without a gate the input of down is
    pruned, with one (ReGLU) the gate's activation.
    """

    target: float = 0.5

    name: ClassVar[str] = "fatrelu"
    title: ClassVar[str | None] = "FATReLU"
    summary: ClassVar[str] = "raises the threshold of ReLU until the wanted share of its outputs is zero"

    def check(self, view: PlanView[Any]) -> Iterable[Problem]:
        yield from target_problems(self.target)
        yield from token_problems(view.tokens)
        networks = [network for index in range(view.spec.n_blocks) for network in view.spec.block(index).feed_forward]
        other = next((n.activation for n in networks if n.activation != "relu"), None)
        if other is not None:
            fix = f"use --method cats or chess where there is a gate, or {ANY_LINEAR}"
            yield Problem(f"family {view.spec.family}", f"its activation is {other}, 'fatrelu' raises a ReLU", fix)
        elif any(n.gate is not None and n.gate == n.up for n in networks):
            yield Problem(f"family {view.spec.family}", "gate and up are one linear", f"use --method {ANY_LINEAR}")

    def skipped(self, block: BlockSpec) -> tuple[str, ...]:
        return tuple(n for f in block.feed_forward for n in ((f.up, f.down) if f.gate else (f.down,)))

    def forwards(self) -> int:
        return 1

    def apply(self, segment: Segment, context: Context) -> None:
        if gated(segment):
            pools = checked(segment, gate_pools(segment, context), gate_groups(segment))
            rules = [pool_rule(gate, "output", pools[gate]) for gate in gated(segment)]
        else:
            downs = [network.down for network in segment.spec.feed_forward]
            rules = [pool_rule(n, "input", pool) for n, pool in input_pools(segment, context, downs).items()]
        put(segment, rules, {rule.linear: self.target for rule in rules})
