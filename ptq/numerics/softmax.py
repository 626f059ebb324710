"""Softmaxes that can output zero, and gates: how a head can leave the residual stream alone.

Bondarenko, Nagel, Blankevoort, "Quantizable Transformers: Removing Outliers by Helping Attention Heads Do Nothing"
(NeurIPS 2023, arXiv 2306.12929), equations 4 and 5; Miller, "Attention is off by one" (2023) for `softmax1`.
"""

from __future__ import annotations

import torch


def clipped(p: torch.Tensor, gamma: float, zeta: float = 1.0) -> torch.Tensor:
    """``clip((zeta - gamma) p + gamma, 0, 1)`` of probabilities; ``gamma = 0, zeta = 1`` changes no bit.

    Rows are not normalised again. An entry is zero where ``p <= -gamma / (zeta - gamma)``.

    Args:
        gamma: at most 0; ``zeta``: at least 1.
    """
    assert gamma <= 0 and zeta >= 1, (gamma, zeta)
    return (p * (zeta - gamma) + gamma).clamp(0.0, 1.0)


def clipped_softmax(logits: torch.Tensor, gamma: float, zeta: float = 1.0) -> torch.Tensor:
    """`clipped` of the softmax over the last axis. Masked logits (-inf) have probability 0, which is clipped to 0."""
    return clipped(logits.softmax(-1), gamma, zeta)


def gamma_of(alpha: float, length: int) -> float:
    """``-alpha / T`` for sequences of at most ``length`` tokens T: one alpha serves models of every length."""
    return -alpha / length


def softmax1(logits: torch.Tensor) -> torch.Tensor:
    """``exp(a_i) / (1 + sum_j exp(a_j))`` over the last axis: softmax with one more logit of 0, whose value is 0."""
    top = logits.amax(-1, keepdim=True).clamp(min=0.0)
    powers = (logits - top).exp()
    return powers / ((-top).exp() + powers.sum(-1, keepdim=True))


def renormalised(p: torch.Tensor, smallest: float = 1e-12) -> torch.Tensor:
    """Rows that sum to 1 again; rows of zeros stay zeros."""
    return p / p.sum(-1, keepdim=True).clamp_min(smallest)


def gate(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, openness: float = 1.0) -> torch.Tensor:
    """``sigmoid(x_h w_h + b_h) / openness``: the gate of every head and token that its output is multiplied by.

    Args:
        x: input of the attention, split into heads, ``[..., tokens, heads, head width]``.
        weight: ``[heads, head width]``; ``bias``: ``[heads]``.
        openness: ``sigmoid(b)`` at the start of fine-tuning, so that a gate of weight 0 changes nothing.

    Returns:
        ``[..., tokens, heads]``.
    """
    return torch.sigmoid((x * weight).sum(-1) + bias) / openness
