"""What plain rounding of activations would cost: signal to noise, and the error of the linears that read them."""

from __future__ import annotations

import math

import torch

BITS = (8, 4)
NOISELESS_DB = 200.0
"""Reported where rounding changes nothing (zeros, or values on the grid): JSON has no infinity."""


def rounded(x: torch.Tensor, largest: torch.Tensor, bits: int) -> torch.Tensor:
    """Symmetric round to nearest with ``2^(bits-1) - 1`` levels up to ``largest`` (broadcast against x)."""
    levels = 2 ** (bits - 1) - 1
    scale = largest.clamp_min(torch.finfo(torch.float32).tiny) / levels
    return (x / scale).round().clamp(-levels, levels) * scale


def sqnr(x: torch.Tensor, q: torch.Tensor) -> float:
    """``10 log10(sum x^2 / sum (x - q)^2)`` in decibels."""
    signal = float(x.square().sum(dtype=torch.float64))
    noise = float((x - q).square().sum(dtype=torch.float64))
    if noise == 0 or signal == 0:
        return NOISELESS_DB
    return min(10 * math.log10(signal / noise), NOISELESS_DB)


def rounding_costs(
    sample: torch.Tensor,
    tensor_max: float,
    tensor_max_later: float,
    channel_max: torch.Tensor,
    weight: torch.Tensor | None,
) -> tuple[dict[str, float], dict[str, float]]:
    """SQNR and output error under each granularity and width.

    Args:
        sample: rows of the site, ``[rows, channels]``, first tokens left out.
        tensor_max: largest |x| of the whole text, first tokens included: what a static range has to cover.
        tensor_max_later: without first tokens.
        channel_max: ``[channels]``.
        weight: ``[out, channels]`` of the linears that read the site, or None.

    Returns:
        SQNR in decibels, and ||X W^T - Q(X) W^T|| / ||X W^T||, by keys like ``token-8``.
    """
    ranges = {
        "tensor": torch.tensor(tensor_max),
        "tensor-later": torch.tensor(tensor_max_later),
        "token": sample.abs().amax(1, keepdim=True),
        "channel": channel_max,
    }
    exact = None if weight is None else sample @ weight.T
    decibels: dict[str, float] = {}
    errors: dict[str, float] = {}
    for key, largest in ranges.items():
        for bits in BITS:
            q = rounded(sample, largest.to(sample.device, sample.dtype), bits)
            decibels[f"{key}-{bits}"] = round(sqnr(sample, q), 3)
            if exact is not None and weight is not None:
                errors[f"{key}-{bits}"] = _relative((sample - q) @ weight.T, exact)
    return decibels, errors


def _relative(error: torch.Tensor, exact: torch.Tensor) -> float:
    size = float(exact.norm(dtype=torch.float64))
    return float(f"{float(error.norm(dtype=torch.float64)) / size:.6g}") if size else 0.0
