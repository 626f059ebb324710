"""What other softmaxes do to a finished model: plain data, a part of the record of an analysis."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class SoftmaxRow:
    """One softmax in all heads.

    Attributes:
        softmax: as ``ptq eval --softmax`` takes it; ``plain``, or ``each head its own`` of `SoftmaxSweep.heads`.
        gamma: of the clipped softmax, None where there is none, or one for every head.
        perplexity, divergence: of the model, and its mean KL from the one with plain softmax, nats.
        zeros: share of the visible probabilities that are exactly 0. ``row_sum``: mean sum of a row's probabilities.
            ``empty_rows``: share of the rows that are all 0.
        with_first_token, without_first_token: outlier metrics as in the summary of the analysis.
        perplexity_8_bit: with `SoftmaxSweep.scheme` in all linears of the blocks; None for quantized checkpoints.
    """

    softmax: str
    gamma: float | None
    perplexity: float
    divergence: float
    zeros: float
    row_sum: float
    empty_rows: float
    with_first_token: dict[str, Any]
    without_first_token: dict[str, Any]
    perplexity_8_bit: float | None


@dataclass(frozen=True)
class HeadClipping:
    """What one head alone can take.

    Attributes:
        gamma: the largest -gamma tried that costs less than `SoftmaxSweep.limit`, negated; 0 where none does.
        cost: relative increase of the loss there.
        shut_cost: the same with the output of the head set to 0; None where that was not asked for.
    """

    block: int
    head: int
    gamma: float
    cost: float
    shut_cost: float | None


@dataclass(frozen=True)
class SoftmaxSweep:
    """Softmaxes tried after training on windows of the text of the analysis.

    Attributes:
        window, windows: tokens of a window, and how many were scored; ``range_windows`` others set static ranges, and
            the first ``head_windows`` of the scored ones judged single heads (0: heads were left out).
        scheme: of `SoftmaxRow.perplexity_8_bit`.
        limit: relative increase of the loss that a head may cost.
        finding: in words, what clipping after training does to outliers.
    """

    window: int
    windows: int
    range_windows: int
    head_windows: int
    scheme: str
    limit: float
    rows: tuple[SoftmaxRow, ...]
    heads: tuple[HeadClipping, ...]
    finding: str
