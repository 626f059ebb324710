"""The channel-wise distance between two outputs that norm tweaking trains on (Li et al. 2024, arXiv 2309.02784)."""

from __future__ import annotations

import torch


def channel_moments(y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and variance over the tokens of each sample: ``y [samples, tokens, channels]`` to two ``[samples,
    channels]``, in float32 or float64."""
    y = y if y.dtype == torch.float64 else y.float()
    return y.mean(dim=1), y.var(dim=1, correction=0)


def channel_distance(target: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """``1/C sum over c of |mean - mean'| + |var - var'|``, averaged over the samples: a scalar.

    The target is loose on purpose: in the paper's ablation the squared error of every token and the KL divergence were
    worse. Where both are equal the gradient is 0.

    Args:
        target: output of the float block, ``[samples, tokens, channels]``.
        y: output of the quantized block, same shape.
    """
    (mean_f, var_f), (mean_q, var_q) = channel_moments(target), channel_moments(y)
    return ((mean_f - mean_q).abs() + (var_f - var_q).abs()).mean()


def learning_rate(base: float, depth_scale: float, block: int, n_blocks: int) -> float:
    """``base * (1 + depth_scale * block / n_blocks)``: more where more error has gathered."""
    return base * (1 + depth_scale * block / n_blocks)
