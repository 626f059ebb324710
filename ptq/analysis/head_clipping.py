"""How much of its small probabilities each head alone can do without: which heads to clip or gate in pre-training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from calibration.record import Evaluation
from ptq.analysis.sites import short
from ptq.analysis.softmax_record import HeadClipping
from ptq.numerics.softmax import HeadSoftmax
from ptq.runtime.explicit_attention import Probabilities

HEAD_GAMMAS = (-1e-5, -3e-5, -1e-4, -3e-4, -1e-3, -3e-3, -1e-2, -2.5e-2)
LIMIT = 1e-3
"""A head may be clipped as far as it costs less than this share of the loss."""


class Scored(Protocol):
    """A model that can be scored with another softmax in single blocks."""

    own: dict[int, Probabilities]

    def evaluate(self, windows: int) -> Evaluation: ...


def clip_heads(
    bench: Scored, blocks: int, heads: int, windows: int, shut: bool, advance: Callable[[str], None]
) -> tuple[HeadClipping, ...]:
    """Clip every head alone, by bisection over `HEAD_GAMMAS`: a larger gamma is taken to cost more.

    Args:
        windows: of the text, on which the loss is compared.
        shut: also score the model without the output of each head.
    """
    bench.own = {}
    plain = bench.evaluate(windows).nll
    found = []
    for block in range(blocks):
        for head in range(heads):

            def cost(gamma: float, shut: bool = False, block: int = block, head: int = head) -> float:
                bench.own = {block: HeadSoftmax.plain(heads).with_head(head, gamma, shut)}
                return bench.evaluate(windows).nll / plain - 1

            gamma, its = _largest(HEAD_GAMMAS, cost)
            closed = short(cost(0.0, shut=True)) if shut else None
            found.append(HeadClipping(block, head, gamma, short(its), closed))
            advance(f"block {block} head {head}")
    bench.own = {}
    return tuple(found)


def _largest(gammas: Sequence[float], cost: Callable[[float], float]) -> tuple[float, float]:
    """The last of ``gammas`` below the limit, and its cost; 0 where there is none."""
    best, low, high = (0.0, 0.0), 0, len(gammas)
    while low < high:
        middle = (low + high) // 2
        its = cost(gammas[middle])
        if its < LIMIT:
            best, low = (gammas[middle], its), middle + 1
        else:
            high = middle
    return best


def own_gammas(found: Sequence[HeadClipping], heads: int) -> dict[int, Probabilities]:
    """All heads clipped as far as each alone can take: block -> softmax."""
    rules: dict[int, HeadSoftmax] = {}
    for h in found:
        rules[h.block] = rules.get(h.block, HeadSoftmax.plain(heads)).with_head(h.head, h.gamma)
    return dict(rules)
