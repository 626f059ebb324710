"""Rank correlation and overlap: whether two measurements put linears, or channels, in the same order."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch


def ranks(values: Sequence[float]) -> np.ndarray:
    """Ranks from 1 on, ``[n]`` float64; equal values share the mean of their ranks."""
    found, inverse, counts = np.unique(np.asarray(values, dtype=np.float64), return_inverse=True, return_counts=True)
    assert not np.isnan(found).any(), "NaN has no rank"
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def spearman(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Spearman's rank correlation, -1 to 1: Pearson's of the `ranks`. None where one side has no order (all equal, or
    fewer than two values)."""
    assert len(first) == len(second), (len(first), len(second))
    if len(first) < 2:
        return None
    a, b = ranks(first), ranks(second)
    a, b = a - a.mean(), b - b.mean()
    energy = math.sqrt(float(a @ a) * float(b @ b))
    return float(a @ b) / energy if energy > 0 else None


def top_share_jaccard(first: torch.Tensor, second: torch.Tensor, share: float = 0.01) -> float:
    """|A and B| / |A or B| of the channels with the largest values: a ``share`` of ``[channels]``, at least one."""
    count = max(1, round(share * first.numel()))
    a, b = (set(values.topk(count).indices.tolist()) for values in (first, second))
    return len(a & b) / len(a | b)
