"""DFQ (Nagel et al. 2019, arXiv 1906.04721): ranges of connected layers made equal, and the mean error of a layer's
output taken out of its bias."""

from __future__ import annotations

import math

import torch

LARGEST_FACTOR = 100.0  # no channel is scaled by more: float16 files have to hold what comes out


def equalizing_scales(producer: torch.Tensor, consumer: torch.Tensor) -> torch.Tensor:
    """s = sqrt(r1 / r2), by which rows of the producer are divided and columns of the consumer multiplied: both ranges
    are then sqrt(r1 r2) (equation 11).

    Args:
        producer, consumer: r1 and r2, the ranges of every channel, ``[channels]``. A channel without content keeps
            its scale.
    """
    s = (producer / consumer).sqrt().clamp(1 / LARGEST_FACTOR, LARGEST_FACTOR)
    return torch.where((producer > 0) & (consumer > 0), s, 1.0)


def expected_relu(mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """E[max(x, 0)] of normal x: std φ(mean/std) + mean Φ(mean/std) (equation 19). Shapes are equal; std may be 0."""
    ratio = mean / std.clamp(min=torch.finfo(std.dtype).tiny)
    density = torch.exp(-0.5 * ratio.square()) / math.sqrt(2 * math.pi)
    cumulative = 0.5 * (1 + torch.erf(ratio / math.sqrt(2)))
    return torch.where(std > 0, std * density + mean * cumulative, mean.clamp(min=0))


def mean_error(w: torch.Tensor, rounded: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    """(W_q - W) E[x], ``[out]``: what rounding adds to the mean output, to be taken out of the bias (equation 17).

    Args:
        w, rounded: ``[out, in]``; mean: E[x] ``[in]``.
    """
    return (rounded - w) @ mean
