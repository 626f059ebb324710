"""Thresholds as functions on tensors and histograms."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from calibration.histogram import Histogram

TINY = 1e-30  # importance of a channel that never fires: its threshold is huge, not infinite


def channel_thresholds(pooled: float, importance: torch.Tensor) -> torch.Tensor:
    """CHESS: t_i = T0 / a_i, float32 ``[n]`` (He et al. 2024, arXiv 2409.01366; |G_i| a_i <= T0 rewritten for G_i).

    Args:
        pooled: T0, the quantile of all |G_i| a_i of a layer, tokens and channels pooled.
        importance: a_i, ``[n]``, not negative. Channels without importance are always pruned (but for T0 = 0, where
            nothing is).
    """
    if pooled <= 0.0:
        return torch.zeros(len(importance), dtype=torch.float32)
    largest = torch.finfo(torch.float32).max
    return (pooled / importance.double().clamp_min(TINY)).clamp_max(largest).float()


def kernel_mode(histogram: Histogram, points: int = 2000, sample: int = 100_000) -> float:
    """Peak of a Gaussian kernel density estimate of the pool (Chua et al. 2024, arXiv 2412.07174, section 3).

    Bandwidth is half of Scott's rule for ``sample`` points; the density is evaluated on ``points`` points between
    the 0.1 % and the 99.9 % quantile and refined by a parabola. All values of the histogram take part, by the counts of
    its bins, instead of three strided subsamples.
    """
    values, counts = histogram.masses()
    low, high = histogram.quantile(0.001), histogram.quantile(0.999)
    if not high > low:
        return low
    mean = float((values * counts).sum() / counts.sum())
    deviation = math.sqrt(float((counts * (values - mean).square()).sum() / counts.sum()))
    step = (high - low) / (points - 1)
    width = max(0.5 * deviation * min(sample, histogram.count) ** -0.2, step)
    inside = (values >= low) & (values <= high)
    grid = torch.zeros(points, dtype=torch.float64)
    grid.index_add_(0, ((values[inside] - low) / step).round().long(), counts[inside])
    reach = min(points - 1, math.ceil(4 * width / step))
    offsets = torch.arange(-reach, reach + 1, dtype=torch.float64) * step / width
    kernel = torch.exp(-0.5 * offsets.square())
    density = torch.nn.functional.conv1d(grid[None, None], kernel[None, None], padding=reach)[0, 0]
    peak = int(density.argmax())
    if not 0 < peak < points - 1:
        return low + peak * step
    left, middle, right = (float(density[i]) for i in (peak - 1, peak, peak + 1))
    bend = left - 2 * middle + right
    return low + (peak + (0.5 * (left - right) / bend if bend < 0 else 0.0)) * step


def interpolate(budget: float, shares: Sequence[float], errors: Sequence[float]) -> float:
    """The largest share whose error stays within ``budget``, errors interpolated between measured shares.

    Args:
        shares: ascending, the first is 0; ``errors`` at these shares, made non-decreasing here.
    """
    best = 0.0
    worst = 0.0
    for i in range(1, len(shares)):
        before, worst = worst, max(worst, errors[i])
        if worst <= budget:
            best = shares[i]
            continue
        inside = (budget - before) / (worst - before)
        return best + inside * (shares[i] - shares[i - 1])
    return best
