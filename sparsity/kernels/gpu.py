"""The Triton kernels behind the interface of the others: for CUDA devices, float weights and 4-bit codes."""

from __future__ import annotations

import importlib.util

import torch

from calibration.errors import ToolkitError
from sparsity.kernels.int4 import Int4Rows
from sparsity.kernels.kernel import Mask, SparseKernel, SparseQuery, Weight

MAX_TOKENS = 8
BLOCK_IN = 32  # divides every group that `int4_problem` lets through, but one that is a whole row
BLOCK_OUT = 128
ROWS = 16  # of a program of an output product
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _supports(query: SparseQuery) -> str | None:
    if query.device_type != "cuda":
        return f"it runs on CUDA devices, not on {query.device_type}"
    if query.dtype not in DTYPES:
        return f"it takes 16- and 32-bit floats, not {str(query.dtype).removeprefix('torch.')}"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    return None


def _step(vector: torch.Tensor | None) -> int:
    """Stride of a scalar or a vector; -1 where there is none."""
    return -1 if vector is None else int(vector.numel() > 1)


def _tokens(x: torch.Tensor) -> int:
    """The number of tokens as the kernels are compiled for it: a power of two.

    Raises:
        ToolkitError: more than the kernels take.
    """
    if not 1 <= len(x) <= MAX_TOKENS:
        raise ToolkitError(
            f"sparse kernel: {len(x)} tokens at once, it takes 1 to {MAX_TOKENS}",
            "run more tokens with the dense layer",
        )
    return 1 << (len(x) - 1).bit_length()


def _input_product(x: torch.Tensor, weight: Weight, mask: Mask | None, bias: torch.Tensor | None) -> torch.Tensor:
    from sparsity.kernels import triton_products as kernels

    threshold, center = (None, None) if mask is None else (mask.threshold, mask.center)
    padded, (tokens, n_in) = _tokens(x), x.shape
    n_out = weight.width if isinstance(weight, Int4Rows) else weight.shape[1]
    y = x.new_zeros(tokens, n_out, dtype=torch.float32)
    if bias is not None:
        y += bias
    masks = (y if threshold is None else threshold, y if center is None else center)
    sizes, steps = (tokens, n_in, n_out), (_step(threshold), _step(center))
    blocks = -(-n_in // BLOCK_IN)
    if isinstance(weight, Int4Rows):
        words = weight.codes.view(torch.int32)
        line = words.shape[1]
        zero = words if weight.zero is None else weight.zero
        grid = (-(-line // 16), blocks)
        kernels.int4_input_product[grid](
            x, words, weight.scale, zero, y, *masks, *sizes, line, weight.group, *steps, weight.zero is not None,
            padded, BLOCK_IN, 16,
        )  # fmt: skip
    else:
        grid = (-(-n_out // BLOCK_OUT), blocks)
        kernels.input_product[grid](x, weight, y, *masks, *sizes, *steps, padded, BLOCK_IN, BLOCK_OUT)
    return y.to(x.dtype)


def _output_product(
    x: torch.Tensor, weight: Weight, gate: torch.Tensor, mask: Mask | None, bias: torch.Tensor | None
) -> torch.Tensor:
    from sparsity.kernels import triton_products as kernels

    threshold = None if mask is None else mask.threshold
    padded, (tokens, n_in), n_out = _tokens(x), x.shape, gate.shape[1]
    h = torch.empty_like(gate)
    vectors = (x if bias is None else bias, gate, h, x if threshold is None else threshold)
    sizes, grid = (tokens, n_in, n_out), (-(-n_out // ROWS),)
    if isinstance(weight, Int4Rows):
        words = weight.codes.view(torch.int32)
        zero = words if weight.zero is None else weight.zero
        shape = (words.shape[1], weight.group, weight.scale.shape[1])
        kernels.int4_output_product[grid](
            x, words, weight.scale, zero, *vectors, *sizes, *shape, _step(threshold), weight.zero is not None,
            bias is not None, padded, ROWS,
        )  # fmt: skip
    else:
        kernels.output_product[grid](
            x, weight, *vectors, *sizes, _step(threshold), bias is not None, padded, BLOCK_OUT, ROWS
        )
    return h


def _dequantize(weight: Int4Rows, dtype: torch.dtype) -> torch.Tensor:
    return weight.dequantize().to(dtype)


TRITON = SparseKernel("triton", _supports, _input_product, _output_product, _dequantize, MAX_TOKENS)
