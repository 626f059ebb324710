"""What a sparse kernel is, and what it is asked before it is taken.

Both products go once over contiguous rows of the weight as it is stored:

* ``input``: ``y = bias + Σ_{i kept} (x_i - center_i) W[:, i]``, with ``Wᵀ [in, out]`` stored row by row;
* ``output``: ``h_j = g_j (<x, W[j, :]> + bias_j)`` where ``g_j`` is kept, else 0, with ``W [out, in]`` stored so.

Value v is kept where ``not |v| <= threshold`` in float32, the rule of `sparsity.sites.small`. Several tokens share one
pass: a row is read where any of them keeps it, and a token that does not keep it gets 0 times the row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from sparsity.kernels.int4 import Int4Rows
from sparsity.sites import Mode

Stored = Literal["float", "int4"]


@dataclass(frozen=True)
class Mask:
    """Which values are kept, see `sparsity.sites.Site`: float32 ``[1]`` or ``[n]``, on the device of the values."""

    threshold: torch.Tensor
    center: torch.Tensor | None = None


@dataclass(frozen=True)
class SparseQuery:
    """Everything that decides which kernel can run a linear.

    Attributes:
        mode: whose values are masked.
        stored: how the weight is stored: float rows in ``dtype``, or 4-bit codes.
        dtype: of the activations.
        device_type: ``"cpu"``, ``"cuda"`` and so on.
    """

    mode: Mode
    stored: Stored
    dtype: torch.dtype
    device_type: str


Weight = torch.Tensor | Int4Rows
"""Rows ``[in, out]`` of Wᵀ for an input product, ``[out, in]`` of W for an output product."""

InputProduct = Callable[[torch.Tensor, Weight, "Mask | None", "torch.Tensor | None"], torch.Tensor]
"""``(x [B, in], Wᵀ, mask, bias [out]) -> y [B, out]``; bias is float32. Without a mask every row is read."""

OutputProduct = Callable[[torch.Tensor, Weight, torch.Tensor, "Mask | None", "torch.Tensor | None"], torch.Tensor]
"""``(x [B, in], W, g [B, out], mask of g, bias [out]) -> h [B, out]``."""

Dequantize = Callable[[Int4Rows, torch.dtype], torch.Tensor]
"""The rows as floats, for the dense product of a prompt: products in float32, then one cast."""


@dataclass(frozen=True)
class SparseKernel:
    """One way to compute both products.

    Attributes:
        name: as users ask for it.
        supports: the reason why it cannot run a query, or None where it can.
        input_product, output_product, dequantize: see above; operands are contiguous.
        max_tokens: the largest B; callers run more tokens dense.
    """

    name: str
    supports: Callable[[SparseQuery], str | None]
    input_product: InputProduct
    output_product: OutputProduct
    dequantize: Dequantize
    max_tokens: int
