"""What calibration text shows of the values that sites prune: one pool per site, gathered in a forward pass.

The first position of every sequence is in no pool: its massive activations would raise the channel means of CHESS, and
it is never pruned.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import torch

from calibration.architectures import FeedForward
from calibration.errors import ToolkitError
from calibration.histogram import Histogram
from calibration.model.watching import Look, Watch
from calibration.walk.context import Context
from calibration.walk.lanes import merge
from calibration.walk.segment import Segment
from sparsity.masking import FIRST

K = TypeVar("K", bound=Hashable)

MIN_TOKENS = 1024
"""Fewer tokens make no threshold: an expert that saw fewer takes the pool of all experts of its layer."""


@dataclass
class Pool:
    """The distribution of the values of one site, and the number of tokens it was seen on.

    ``shared``: it is the pool of all experts of a layer, in place of that of an expert that saw too few tokens.
    """

    histogram: Histogram = field(default_factory=Histogram)
    tokens: int = 0
    shared: bool = False

    def update(self, rows: torch.Tensor) -> None:
        """Fold in ``[tokens, n]``."""
        self.histogram.update(rows)
        self.tokens += len(rows)

    def look(self, importance: torch.Tensor | None = None) -> Look:
        """What a watch calls; with ``importance`` ``[n]`` values are multiplied by it first."""

        def look(x: torch.Tensor, positions: torch.Tensor) -> None:
            rows = calibration_rows(x, positions)
            self.update(rows if importance is None else rows.float() * importance)

        return look


@merge.register
def _(total: Pool, other: Pool) -> None:
    total.histogram.add(other.histogram)
    total.tokens += other.tokens


@dataclass
class ChannelMeans:
    """Means over tokens per channel, float64 ``[n]``: of |x|, and of x squared."""

    absolute: torch.Tensor
    square: torch.Tensor
    tokens: int = 0

    def look(self, x: torch.Tensor, positions: torch.Tensor) -> None:
        rows = calibration_rows(x, positions).double()
        self.absolute += rows.abs().sum(0)
        self.square += rows.square().sum(0)
        self.tokens += len(rows)

    def mean_abs(self) -> torch.Tensor:
        return self.absolute / max(self.tokens, 1)

    def rms(self) -> torch.Tensor:
        return (self.square / max(self.tokens, 1)).sqrt()


@merge.register
def _(total: ChannelMeans, other: ChannelMeans) -> None:
    total.absolute += other.absolute
    total.square += other.square
    total.tokens += other.tokens


def calibration_rows(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """``[tokens, n]``: the rows of x that statistics are made of."""
    return x[(positions >= FIRST).expand(x.shape[:-1])]


def gated(segment: Segment) -> dict[str, FeedForward]:
    """Gate (block-relative checkpoint name) -> its feed-forward network."""
    return {network.gate: network for network in segment.spec.feed_forward if network.gate is not None}


def input_pools(
    segment: Segment,
    context: Context,
    linears: Iterable[str],
    before: Iterable[Watch] = (),
    importance: Mapping[str, torch.Tensor] | None = None,
) -> dict[str, Pool]:
    """The pool of what each linear reads; linears with one input share theirs, but where values are weighed.

    Args:
        before: masks of earlier stages.
        importance: float32 ``[in]`` by linear; pools are then of |x| times importance.
    """
    looks: dict[Hashable, tuple[str, torch.Tensor | None]] = {}
    groups: dict[Hashable, int | None] = {}
    kinds: dict[Hashable, int] = {}
    found: dict[str, Hashable] = {}
    for linear in linears:
        shared = segment.spec.shared_input(linear)
        weights = None if importance is None else importance[linear]
        key: Hashable = shared if weights is None else linear
        if key not in looks:
            looks[key] = segment.architecture.module_name(linear), weights
            kind = (shared.stage, "" if weights is None else linear.rpartition(".")[2])
            groups[key] = None if shared.expert is None else kinds.setdefault(kind, len(kinds))
        found[linear] = key
    earlier = list(before)

    def watches(pools: Mapping[Hashable, Pool]) -> list[Watch]:
        return earlier + [Watch(path, pools[key].look(weights)) for key, (path, weights) in looks.items()]

    shared_pools = checked(segment, context.sums(lambda: {key: Pool() for key in looks}, watches), groups)
    return {linear: shared_pools[key] for linear, key in found.items()}


def checked(segment: Segment, pools: Mapping[K, Pool], groups: Mapping[K, int | None]) -> dict[K, Pool]:
    """The pools, with those of experts that saw too few tokens replaced by the one of all experts.

    Args:
        groups: key -> a number shared by the experts' pools of one kind; None for pools that stand alone.

    Raises:
        ToolkitError: NaN or Inf among the values, or no expert of a layer saw a token.
    """
    together: dict[int, Pool] = {}
    for key, pool in pools.items():
        if not pool.histogram.finite():
            raise ToolkitError(
                f"{segment.prefix}: NaN or Inf among the activations",
                "the model overflows on this text: try --dtype float32, or check the checkpoint",
            )
        group = groups[key]
        if group is not None:
            everyone = together.setdefault(group, Pool(shared=True))
            everyone.histogram.add(pool.histogram)
            everyone.tokens += pool.tokens
    result = {}
    for key, pool in pools.items():
        group = groups[key]
        result[key] = pool if group is None or pool.tokens >= MIN_TOKENS else together[group]
        if result[key].tokens == 0:
            raise ToolkitError(f"{segment.prefix}: no calibration tokens reached it", "use more --samples")
    return result
