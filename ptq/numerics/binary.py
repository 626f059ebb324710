"""PTQ1.61 (Zhao et al. 2025, arXiv 2502.13179): a few input channels in 4 bits, one bit for every other weight.

Salient columns have a 4-bit asymmetric grid per row. The others are ``(r cᵀ) o (a sign(W - m) + m)`` with a and m per
row, and a rank-1 correction of r per row and c per column. Signs are fixed from the start; a, r and c are trained. What
is stored is r a, r m and c: the same weight, with one vector less.
"""

from __future__ import annotations

import torch

SALIENT_BITS = 4


def salient_mask(peaks: torch.Tensor, count: int) -> torch.Tensor:
    """The ``count`` input channels with the largest activations.

    Args:
        peaks: largest |x| per channel, ``[in]``. Ties go to the lower channel.

    Returns:
        bool ``[in]``.
    """
    mask = torch.zeros(len(peaks), dtype=torch.bool, device=peaks.device)
    mask[torch.sort(peaks, descending=True, stable=True).indices[:count]] = True
    return mask


def binary_start(w: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """a = mean |w| and m = mean w over the non-zero weights of a row outside the mask, ``[out, 1]`` each; 0 where there
    are none."""
    counted = (w != 0) & ~mask
    n = counted.sum(dim=1, keepdim=True).clamp(min=1)
    kept = torch.where(counted, w, 0.0)
    return kept.abs().sum(dim=1, keepdim=True) / n, kept.sum(dim=1, keepdim=True) / n


def signs(w: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    """sign(W - m) with sign(0) = 1, in the dtype of W."""
    return torch.where(w >= mean, 1.0, -1.0).to(w.dtype)


def binary_weight(
    sign: torch.Tensor, scale: torch.Tensor, mean: torch.Tensor, row: torch.Tensor, column: torch.Tensor
) -> torch.Tensor:
    """(r cᵀ) o (a sign + m) for sign ``[out, in]``, a, m and r ``[out, 1]``, c ``[in]``."""
    return row * column * (scale * sign + mean)


def mixed_values(
    codes: torch.Tensor,
    step: torch.Tensor,
    zero: torch.Tensor,
    mask: torch.Tensor,
    scale: torch.Tensor,
    mean: torch.Tensor,
    column: torch.Tensor,
) -> torch.Tensor:
    """The weight float32 ``[out, in]`` of stored tensors.

    Args:
        codes: uint8 ``[out, in]``, 4-bit codes in salient columns, elsewhere 1 for a positive sign, 0 for a negative.
        step, zero: of salient columns, ``[out, 1]``.
        mask: bool ``[in]``; scale, mean: r a and r m, ``[out]``; column: c ``[in]``.
    """
    codes = codes.float()
    salient = (codes - zero.float()) * step
    binary = column.float() * (scale.float()[:, None] * (2 * codes - 1) + mean.float()[:, None])
    return torch.where(mask, salient, binary)


def pack_mask(mask: torch.Tensor) -> torch.Tensor:
    """bool ``[n]`` to a bitmap uint8 ``[ceil(n / 8)]``, lowest bit first."""
    padded = torch.nn.functional.pad(mask.to(torch.uint8), (0, -len(mask) % 8)).view(-1, 8)
    return (padded << torch.arange(8, dtype=torch.uint8, device=mask.device)).sum(dim=1, dtype=torch.uint8)


def unpack_mask(bitmap: torch.Tensor, n: int) -> torch.Tensor:
    """The inverse of `pack_mask`."""
    bits = bitmap[:, None] >> torch.arange(8, dtype=torch.uint8, device=bitmap.device) & 1
    return bits.flatten()[:n].bool()


def block_loss(model: torch.Tensor, inputs: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """MSE(y1, y) + MSE(y2, y) - log|mean cos(y, y1)| - log|mean cos(y2, y)|, a float32 scalar.

    Args:
        model, inputs: y1 and y2, the float block on the float model's inputs and on those of the quantized one.
        y: the quantized block on its own inputs; all ``[samples, tokens, channels]``.
    """
    y = y.float()
    total = torch.zeros((), device=y.device)
    for target in (model.float(), inputs.float()):
        cosine = torch.nn.functional.cosine_similarity(y, target, dim=-1).mean()
        total = total + (y - target).square().mean() - cosine.abs().log()
    return total
