"""The sparse products in plain torch: every device, every float dtype, no compiler; the oracle of the other kernels.

The input product is an ``embedding_bag``: a bag of weight rows, each with its own factor, summed in one pass without
copying them. It runs its bags in parallel, not the rows of a bag, so the kept rows of a token are split into one bag
per thread and the partial sums added. There is no such op for the output product: it gathers rows, which moves them
three times, and so it does that only where few are kept. Of 4-bit codes, the rows in use are dequantized.
"""

from __future__ import annotations

import torch

from sparsity.kernels.int4 import Int4Rows
from sparsity.kernels.kernel import Mask, SparseKernel, SparseQuery, Weight
from sparsity.sites import small

GATHER_BELOW = 0.25
"""Share of kept rows under which gathering them beats the dense product."""


def kept_values(x: torch.Tensor, mask: Mask | None) -> torch.Tensor:
    """``x - center`` where it is kept, 0 elsewhere, ``[B, n]``: float32 (float64 for float64)."""
    wide = x if x.dtype == torch.float64 else x.float()
    if mask is None:
        return wide
    shifted = wide if mask.center is None else wide - mask.center
    return torch.where(small(x, mask.threshold, mask.center), torch.zeros_like(wide), shifted)


def bag_sums(values: torch.Tensor, weight: torch.Tensor, bags: int) -> torch.Tensor:
    """``values @ weight`` by rows where values are not zero.

    Args:
        values: ``[n]``, any float dtype; rounded to the dtype of the weight.
        weight: ``[n, out]``, contiguous.
        bags: parts that the rows are split into.

    Returns:
        ``[out]`` in float32 (float64 for float64).
    """
    index = values.nonzero().squeeze(1)
    step = max(1, -(-len(index) // bags))
    offsets = torch.arange(0, max(1, len(index)), step, device=values.device)
    sums = torch.nn.functional.embedding_bag(
        index, weight, offsets, mode="sum", per_sample_weights=values[index].to(weight.dtype)
    )
    return sums.to(torch.promote_types(sums.dtype, torch.float32)).sum(0)


def _supports(query: SparseQuery) -> str | None:
    return None


def _input_product(x: torch.Tensor, weight: Weight, mask: Mask | None, bias: torch.Tensor | None) -> torch.Tensor:
    values = kept_values(x, mask)
    if isinstance(weight, Int4Rows):
        index = values.any(0).nonzero().squeeze(1)
        sums = values[:, index] @ weight.dequantize(index)
    elif bool(values.all()):  # nothing to skip: the dense product, bit for bit
        sums = torch.nn.functional.linear(values.to(x.dtype), weight.T)
    else:
        sums = torch.stack([bag_sums(row, weight, torch.get_num_threads()) for row in values])
    return (sums if bias is None else sums + bias).to(x.dtype)


def _output_product(
    x: torch.Tensor, weight: Weight, gate: torch.Tensor, mask: Mask | None, bias: torch.Tensor | None
) -> torch.Tensor:
    values = kept_values(gate, mask).to(gate.dtype)
    index = values.any(0).nonzero().squeeze(1)
    cast = None if bias is None else bias.to(x.dtype)
    if isinstance(weight, torch.Tensor) and len(index) > GATHER_BELOW * len(weight):
        return torch.nn.functional.linear(x, weight, cast) * values
    rows = weight.dequantize(index).to(x.dtype) if isinstance(weight, Int4Rows) else weight[index]
    h = torch.zeros_like(values)
    h[:, index] = torch.nn.functional.linear(x, rows, None if cast is None else cast[index]) * values[:, index]
    return h


def _dequantize(weight: Int4Rows, dtype: torch.dtype) -> torch.Tensor:
    return weight.dequantize().to(dtype)


REFERENCE = SparseKernel("reference", _supports, _input_product, _output_product, _dequantize, max_tokens=8)
