"""Sums of products of inputs, which take memory from the first product on."""

from __future__ import annotations

import torch


def no_products(n: int, device: torch.device) -> torch.Tensor:
    """Zeros ``[n, n]`` without memory: the first product takes their place, and an expert that sees nothing costs
    nothing."""
    return torch.zeros(1, 1, dtype=torch.float32, device=device).expand(n, n)


def plus(matrix: torch.Tensor, product: torch.Tensor) -> torch.Tensor:
    """The sum ``[n, n]`` in float32 (float64 where one of the two is), in the memory of ``matrix`` where it has some,
    else in that of ``product``."""
    dtype = torch.promote_types(matrix.dtype, product.dtype)
    return matrix.to(dtype).add_(product) if matrix.is_contiguous() else product.to(dtype)
