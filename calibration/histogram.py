"""`Histogram`: the distribution of a pool of values, streamed, without a range to choose.

Published code averages quantiles of batches ("mean of quantiles"), which misses the target; here every value is
counted in one pool. Bins are the leading bits of float32 numbers: sign, exponent and 8 bits of the mantissa, so 256
bins per octave, from the smallest number to the largest.
"""

from __future__ import annotations

import torch

DROPPED_BITS = 15
BINS = 1 << (31 - DROPPED_BITS)  # of one sign
INFINITE = 0x7F800000 >> DROPPED_BITS  # first bin that holds Inf and NaN


EDGES = (torch.arange(INFINITE + 1, dtype=torch.int32) << DROPPED_BITS).view(torch.float32).double()
"""Lower edges of the bins of non-negative numbers, float64 ``[INFINITE + 1]``; the last one is infinity."""


class Histogram:
    """Counts of values by sign and bin.

    Within a bin (0.4 % wide) values are taken as spread evenly; shares found on the pool are right to about 1e-4 where
    the distribution is smooth. Values that are exactly 0 are counted apart, so that ties at 0 are seen.

    Attributes:
        positive, negative: int64 ``[BINS]``; zeros are in neither.
        zeros: number of values that are exactly 0.
    """

    def __init__(self) -> None:
        self.positive = torch.zeros(BINS, dtype=torch.int64)
        self.negative = torch.zeros(BINS, dtype=torch.int64)
        self.zeros = 0

    def update(self, x: torch.Tensor) -> None:
        """Count all values of ``x`` (any shape and float dtype, converted to float32)."""
        bits = x.detach().float().contiguous().view(torch.int32).flatten()
        counts = torch.bincount((bits >> DROPPED_BITS).to(torch.int64) + BINS, minlength=2 * BINS).cpu()
        zeros = int((bits == 0).sum()), int((bits == torch.iinfo(torch.int32).min).sum())  # 0.0 and -0.0
        self.zeros += sum(zeros)
        counts[BINS] -= zeros[0]
        counts[0] -= zeros[1]
        self.negative += counts[:BINS]  # the sign bit makes the shifted number negative: -BINS is -0.0
        self.positive += counts[BINS:]

    def add(self, other: Histogram) -> None:
        """Pool with another histogram."""
        self.positive += other.positive
        self.negative += other.negative
        self.zeros += other.zeros

    @property
    def count(self) -> int:
        return int(self.positive.sum() + self.negative.sum()) + self.zeros

    def finite(self) -> bool:
        """Whether no value was Inf or NaN."""
        return not bool(self.positive[INFINITE:].any() or self.negative[INFINITE:].any())

    def share(self, center: float, distance: float) -> float:
        """Share of values with ``|x - center| <= distance``, in [0, 1]."""
        low, high = center - distance, center + distance
        at_zero = self.zeros if low <= 0.0 <= high else 0
        return (self._below(high) - self._below(low) + at_zero) / max(self.count, 1)

    def threshold(self, share: float, center: float = 0.0) -> float:
        """The quantile of |x - center|: the smallest t with ``share(center, t) >= share``; 0 where exact ties at the
        center suffice, or share is 0.

        Args:
            share: in [0, 1).
        """
        if share <= 0.0 or self.count == 0 or self.share(center, 0.0) >= share:
            return 0.0
        if center == 0.0:
            totals = (self.positive + self.negative)[:INFINITE].cumsum(0).double()
            rank = share * self.count - self.zeros
            index = int(torch.searchsorted(totals, torch.tensor(rank, dtype=torch.float64)))
            before = float(totals[index - 1]) if index else 0.0
            inside = (rank - before) / (float(totals[index]) - before)
            return float(EDGES[index] + inside * (EDGES[index + 1] - EDGES[index]))
        low, high = 0.0, 1.0
        while self.share(center, high) < share:
            high *= 2.0
        for _ in range(64):
            middle = 0.5 * (low + high)
            if middle in (low, high):
                break
            low, high = (low, middle) if self.share(center, middle) >= share else (middle, high)
        return high

    def quantile(self, q: float) -> float:
        """The value below which a share q of all values lies."""
        counts, edges = self._ordered()
        rank = q * self.count
        total = counts.cumsum(0)
        index = min(int(torch.searchsorted(total, torch.tensor(rank, dtype=torch.float64))), len(counts) - 1)
        inside = (rank - float(total[index] - counts[index])) / max(float(counts[index]), 1.0)
        return float(edges[index] + inside * (edges[index + 1] - edges[index]))

    def octaves(self) -> tuple[tuple[int, int], ...]:
        """``(e, count)``: values with ``2^e <= |x| < 2^(e + 1)``, in order, empty octaves inside included; zeros and
        subnormal numbers are left out."""
        per_octave = (self.positive + self.negative)[:INFINITE].view(-1, 1 << (23 - DROPPED_BITS)).sum(1)
        filled = per_octave[1:].nonzero().flatten() + 1
        if not len(filled):
            return ()
        return tuple((i - 127, int(per_octave[i])) for i in range(int(filled[0]), int(filled[-1]) + 1))

    def masses(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Middle of every bin that holds values, and its count: both float64 ``[bins]``, in order of value."""
        counts, edges = self._ordered()
        held = counts > 0
        return (0.5 * (edges[:-1] + edges[1:]))[held], counts[held]

    def _ordered(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Counts in order of value, zeros as a bin without width, and the edges around them; float64."""
        negative, positive = self.negative[:INFINITE].double().flip(0), self.positive[:INFINITE].double()
        counts = torch.cat([negative, torch.tensor([float(self.zeros)], dtype=torch.float64), positive])
        return counts, torch.cat([-EDGES.flip(0), EDGES])

    def _below(self, x: float) -> float:
        """Values other than 0 that are below x, interpolated inside the bin."""
        negatives = float(self._totals("negative")[-1])
        if x >= 0:
            return negatives + self._within("positive", x)
        return negatives - self._within("negative", -x)

    def _within(self, sign: str, magnitude: float) -> float:
        """Values of one sign with a magnitude up to ``magnitude``."""
        totals, limit = self._totals(sign), float(torch.finfo(torch.float32).max)
        if magnitude >= limit:
            return float(totals[-1])
        index = int(torch.searchsorted(EDGES, magnitude, right=True)) - 1
        low, high = float(EDGES[index]), float(EDGES[index + 1])
        inside = (magnitude - low) / (high - low)
        before = float(totals[index - 1]) if index else 0.0
        return before + inside * (float(totals[index]) - before)

    def _totals(self, sign: str) -> torch.Tensor:
        counts = self.positive if sign == "positive" else self.negative
        return counts[:INFINITE].cumsum(0)
