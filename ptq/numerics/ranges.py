"""Static ranges of inputs from a histogram: min-max, percentile, least squares, entropy.

Entropy is the calibration of Migacz, "8-bit inference with TensorRT" (GTC 2017): the threshold whose clipped histogram
loses the least information (KL divergence) when its bins are merged to the levels of the grid.
"""

from __future__ import annotations

from typing import Literal

import torch

from ptq.activations import ActivationQuant
from ptq.numerics.activations import encode, step_and_zero

Estimator = Literal["minmax", "percentile", "mse", "entropy"]
CANDIDATES = 100  # ranges tried by least squares, evenly spaced fractions of min-max


def static_range(
    counts: torch.Tensor, limit: float, low: float, high: float, quant: ActivationQuant, how: Estimator, share: float
) -> tuple[float, float]:
    """The range ``(low, high)`` that a static grid should cover.

    Args:
        counts: ``[bins]`` float64, an even number of equal bins over ``[-limit, limit]``.
        low, high: smallest and largest value seen.
        share: for percentiles, in percent: that much of ``|x|`` lies inside a symmetric range, and each end of an
            asymmetric one leaves ``100 - share`` outside.
    """
    if how == "minmax":
        return low, high
    if how == "percentile":
        return _percentile(counts, limit, low, high, quant.symmetric, share / 100)
    if how == "mse":
        return _least_squares(counts, limit, low, high, quant)
    threshold = _entropy(_folded(counts), 2 ** (quant.bits - 1)) * limit
    return max(low, -threshold), min(high, threshold)


def _folded(counts: torch.Tensor) -> torch.Tensor:
    """The histogram of |x| on ``[0, limit]``: ``[bins / 2]``."""
    half = len(counts) // 2
    return counts[half:] + counts[:half].flip(0)


def _quantile(counts: torch.Tensor, share: float) -> float:
    """The right edge, in bins, of the first bins that hold ``share`` of all counts; inside a bin linearly."""
    sums = counts.cumsum(0)
    wanted = share * float(sums[-1])
    index = min(int(torch.searchsorted(sums, wanted)), len(counts) - 1)
    before = float(sums[index - 1]) if index else 0.0
    return index + (wanted - before) / max(float(counts[index]), 1e-300)


def _percentile(
    counts: torch.Tensor, limit: float, low: float, high: float, symmetric: bool, share: float
) -> tuple[float, float]:
    width = 2 * limit / len(counts)
    if symmetric:
        threshold = _quantile(_folded(counts), share) * width
        return max(low, -threshold), min(high, threshold)
    upper = _quantile(counts, share) * width - limit
    lower = limit - _quantile(counts.flip(0), share) * width
    return max(low, lower), min(high, upper)


def _least_squares(
    counts: torch.Tensor, limit: float, low: float, high: float, quant: ActivationQuant
) -> tuple[float, float]:
    bins = len(counts)
    centers = (torch.arange(bins, dtype=torch.float32) + 0.5) * (2 * limit / bins) - limit
    best, chosen = torch.inf, (low, high)
    for i in range(CANDIDATES, 0, -1):
        ends = low * i / CANDIDATES, high * i / CANDIDATES
        scale, zero = step_and_zero(torch.tensor(ends[0]), torch.tensor(ends[1]), quant)
        codes = encode(centers, scale, zero, quant)
        rounded = (codes if zero is None else codes - zero) * scale
        error = float(((rounded - centers).double().square() * counts).sum())
        if error < best:
            best, chosen = error, ends
    return chosen


def _entropy(counts: torch.Tensor, levels: int) -> float:
    """The best threshold as a fraction of the range of the histogram ``counts [bins]`` of |x|.

    For each threshold of k bins: P is the histogram with everything beyond in its last bin, Q the histogram inside
    merged to ``levels`` bins and spread evenly over those of their bins that are not empty.
    """
    bins = len(counts)
    best, chosen = torch.inf, bins
    for k in range(levels, bins + 1, max(1, bins // 256)):
        inside = counts[:k]
        p = inside.clone()
        p[-1] += counts[k:].sum()
        group = (torch.arange(k) * levels) // k
        filled = (inside > 0).double()
        totals = torch.zeros(levels, dtype=torch.float64).index_add_(0, group, inside)
        occupied = torch.zeros(levels, dtype=torch.float64).index_add_(0, group, filled)
        q = (totals / occupied.clamp(min=1))[group] * filled
        p, q = p / p.sum(), q / q.sum().clamp(min=1e-300)
        seen = p > 0
        divergence = float((p[seen] * (p[seen] / q[seen].clamp(min=1e-12)).log()).sum())
        if divergence < best:
            best, chosen = divergence, k
    return chosen / bins
