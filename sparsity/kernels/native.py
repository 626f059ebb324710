"""The C++ kernels for CPUs (``gemv.cpp``): one pass over the kept rows, mask and list of rows made inside."""

from __future__ import annotations

import ctypes
from typing import Any

import torch

from calibration.errors import ToolkitError
from sparsity.kernels.build import library
from sparsity.kernels.kernel import Mask, SparseKernel, SparseQuery

DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
MAX_TOKENS = 8  # compiled for 1 to 8


def _supports(query: SparseQuery) -> str | None:
    if query.device_type != "cpu":
        return f"it runs on the CPU, not on {query.device_type}"
    if query.dtype not in DTYPES:
        return f"it is compiled for float32 and bfloat16, not {str(query.dtype).removeprefix('torch.')}"
    if query.stored != "float":
        return "it has no product with 4-bit codes"
    try:
        library()
    except ToolkitError as error:
        return error.message
    return None


def _pointer(tensor: torch.Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def _count(tensor: torch.Tensor | None) -> ctypes.c_long:
    return ctypes.c_long(0 if tensor is None else tensor.numel())


def check_operands(x: torch.Tensor, weight: torch.Tensor, *float32: torch.Tensor | None) -> None:
    """Raw memory is read behind this: refuse what would read something else.

    Raises:
        ToolkitError: more tokens than the kernel takes.
    """
    if not 1 <= len(x) <= MAX_TOKENS:
        raise ToolkitError(
            f"sparse kernel: {len(x)} tokens at once, it takes 1 to {MAX_TOKENS}",
            "run more tokens with the dense layer",
        )
    assert x.dtype == weight.dtype and x.is_contiguous() and weight.is_contiguous(), "operands of one dtype, row-major"
    assert all(t is None or (t.dtype == torch.float32 and t.is_contiguous()) for t in float32), "float32 vectors"


def _call(name: str, dtype: torch.dtype, *arguments: Any) -> int:
    """Rows of the weight that were read."""
    function = getattr(library(), f"{name}_{DTYPES[dtype]}")
    function.restype = ctypes.c_long
    rows = int(function(*arguments, ctypes.c_int(torch.get_num_threads())))
    assert rows >= 0, "check_operands has seen the number of tokens"
    return rows


def _input_product(x: torch.Tensor, weight: torch.Tensor, mask: Mask | None, bias: torch.Tensor | None) -> torch.Tensor:
    threshold, center = (None, None) if mask is None else (mask.threshold, mask.center)
    check_operands(x, weight, threshold, center, bias)
    (tokens, n_in), n_out = x.shape, weight.shape[1]
    assert len(weight) == n_in and all(t is None or t.numel() in (1, n_in) for t in (threshold, center))
    y = torch.empty(tokens, n_out, dtype=x.dtype)
    sizes = (ctypes.c_long(tokens), ctypes.c_long(n_in), ctypes.c_long(n_out))
    operands = (_pointer(x), _pointer(weight), _pointer(bias), _pointer(y))
    masks = (_pointer(threshold), _count(threshold), _pointer(center), _count(center))
    _call("input_gemv", x.dtype, *operands, *sizes, *masks)
    return y


def _output_product(
    x: torch.Tensor, weight: torch.Tensor, gate: torch.Tensor, mask: Mask | None, bias: torch.Tensor | None
) -> torch.Tensor:
    threshold = None if mask is None else mask.threshold
    check_operands(x, weight, threshold, bias)
    (tokens, n_in), n_out = x.shape, len(weight)
    assert weight.shape[1] == n_in and gate.shape == (tokens, n_out) and gate.is_contiguous()
    assert gate.dtype == x.dtype and (threshold is None or threshold.numel() in (1, n_out))
    h = torch.empty(tokens, n_out, dtype=x.dtype)
    sizes = (ctypes.c_long(tokens), ctypes.c_long(n_in), ctypes.c_long(n_out))
    operands = (_pointer(x), _pointer(weight), _pointer(bias), _pointer(gate), _pointer(h))
    _call("output_gemv", x.dtype, *operands, *sizes, _pointer(threshold), _count(threshold))
    return h


NATIVE = SparseKernel("native", _supports, _input_product, _output_product, MAX_TOKENS)
