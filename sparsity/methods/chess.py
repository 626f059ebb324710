"""CHESS (He et al. 2024, arXiv 2409.01366): a threshold per channel of the gate, and optionally the inputs of q and o.

Pruning G_i costs about |G_i U_i|; U_i is not known before ``up`` runs, so its calibration mean takes its place. The
layer's threshold T0 is the quantile of all |G_i| a_i, and channel i prunes where |G_i| <= T0 / a_i.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from calibration.architectures import BlockSpec
from calibration.errors import Problem
from calibration.model.watching import Watch
from calibration.walk.context import Context
from calibration.walk.passes import PlanView
from calibration.walk.segment import Segment
from sparsity.gate import GatePass
from sparsity.methods.cats import gate_groups, gate_watches
from sparsity.pools import MIN_TOKENS, ChannelMeans, Pool, checked, gated
from sparsity.rules import Rule, gate_problems, pool_rule, put, target_problems, token_problems


@dataclass(frozen=True)
class Chess(GatePass):
    """Prune the ``target`` of the gate's values that matter least.

    Attributes:
        target: share of the gate's values, and with ``attention`` of the inputs of q and o.
        up_stat: a_i is the mean of |U_i| (the paper and the current code) or its root mean square (the first code).
        down_norm: also multiply a_i by the norm of column i of down, which the paper takes to be equal (ours).
        attention: also prune what the query and the output projection read. Keys and values stay exact.
    """

    target: float = 0.5
    up_stat: Literal["mean_abs", "rms"] = "mean_abs"
    down_norm: bool = False
    attention: bool = False

    name: ClassVar[str] = "chess"
    title: ClassVar[str | None] = "CHESS"
    summary: ClassVar[str] = "prunes the gate's activations that matter least, with a threshold per channel"

    def check(self, view: PlanView[Any]) -> Iterable[Problem]:
        yield from target_problems(self.target)
        yield from gate_problems(self.name, view.spec)
        yield from token_problems(view.tokens)
        if self.attention and not query_and_output(view.spec.block(0)):
            yield Problem(
                f"family {view.spec.family}",
                "queries are one linear with keys and values, which must stay exact",
                "use --method chess without the inputs of q and o",
            )

    def skipped(self, block: BlockSpec) -> tuple[str, ...]:
        attention = query_and_output(block) if self.attention else ()
        return (*attention, *(n for network in block.feed_forward for n in (network.up, network.down)))

    def forwards(self) -> int:
        return 2

    def apply(self, segment: Segment, context: Context) -> None:
        networks = gated(segment)
        plain, means, inputs = self._first_pass(segment, context)
        fallback = checked(segment, plain, gate_groups(segment))
        importance = {gate: self._importance(segment, networks[gate].down, m) for gate, m in means.items()}
        weighted = context.sums(
            lambda: {gate: Pool() for gate in networks},
            lambda pools: [
                Watch(networks[gate].nonlinearity, pool.look(importance[gate]), output=True)
                for gate, pool in pools.items()
            ],
        )
        rules = [pool_rule(linear, "input", pool) for linear, pool in inputs.items()]
        for gate, network in networks.items():
            if network.expert is not None and means[gate].tokens < MIN_TOKENS:
                rules.append(pool_rule(gate, "output", fallback[gate]))
            else:
                rules.append(Rule(gate, "output", weighted[gate].histogram, importance[gate]))
        put(segment, rules, {rule.linear: self.target for rule in rules})

    def _first_pass(
        self, segment: Segment, context: Context
    ) -> tuple[dict[str, Pool], dict[str, ChannelMeans], dict[str, Pool]]:
        """By gate the pools of its activations and the means of what it is multiplied by; pools of attention inputs."""
        networks, name = gated(segment), segment.architecture.module_name
        sites = query_and_output(segment.spec) if self.attention else ()

        def accumulators() -> dict[tuple[str, str], Any]:
            pools = {(kind, n): Pool() for kind, names in (("gate", networks), ("input", sites)) for n in names}
            return {**pools, **{("mean", gate): self._means(segment, n.up) for gate, n in networks.items()}}

        def watches(found: Mapping[tuple[str, str], Any]) -> list[Watch]:
            up = [Watch(name(n.up), found["mean", gate].look, output=True) for gate, n in networks.items()]
            read = [Watch(name(linear), found["input", linear].look()) for linear in sites]
            return [*gate_watches(segment, {gate: found["gate", gate] for gate in networks}), *up, *read]

        found = context.sums(accumulators, watches)
        plain, means = ({gate: found[kind, gate] for gate in networks} for kind in ("gate", "mean"))
        return plain, means, {linear: found["input", linear] for linear in sites}

    @staticmethod
    def _means(segment: Segment, up: str) -> ChannelMeans:
        zeros = torch.zeros(segment.weight(up).shape[0], dtype=torch.float64, device=segment.weight(up).device)
        return ChannelMeans(zeros, zeros.clone())

    def _importance(self, segment: Segment, down: str, means: ChannelMeans) -> torch.Tensor:
        """a_i, float32 ``[n]``."""
        a = means.mean_abs() if self.up_stat == "mean_abs" else means.rms()
        if self.down_norm:
            a = a * segment.weight(down).double().norm(dim=0)
        return a.float()


@dataclass(frozen=True)
class ChessWithAttention(Chess):
    """CHESS with the inputs of the query and output projections ("w/" in the paper, "CHESS+" in its code)."""

    attention: bool = True

    name: ClassVar[str] = "chess-qo"
    title: ClassVar[str | None] = "CHESS-QO"
    summary: ClassVar[str] = "prunes as chess does, and what the query and output projections read"


def query_and_output(block: BlockSpec) -> tuple[str, ...]:
    """The query projection and what reads the heads' outputs, where queries are a linear of their own."""
    if len(block.scores) < 2:
        return ()
    query = block.scores[0]
    after = next(shared for shared in block.inputs if shared.stage == block.shared_input(query).stage + 1)
    return (query, *after.linears)
