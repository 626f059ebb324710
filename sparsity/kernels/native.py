"""The C++ kernels for CPUs (``gemv.cpp``, ``int4.cpp``): one pass over the kept rows; mask and row list made inside."""

from __future__ import annotations

import ctypes
from typing import Any

import torch

from calibration.errors import ToolkitError
from sparsity.kernels.build import library
from sparsity.kernels.int4 import Int4Rows
from sparsity.kernels.kernel import Mask, SparseKernel, SparseQuery, Weight

DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
COMPILED_TOKENS = (1, 2, 4, 8)
MAX_TOKENS = COMPILED_TOKENS[-1]


def _supports(query: SparseQuery) -> str | None:
    if query.device_type != "cpu":
        return f"it runs on the CPU, not on {query.device_type}"
    if query.dtype not in DTYPES:
        return f"it is compiled for float32 and bfloat16, not {str(query.dtype).removeprefix('torch.')}"
    try:
        library()
    except ToolkitError as error:
        return error.message
    return None


Argument = torch.Tensor | int | None


def _call(name: str, dtype: torch.dtype, *arguments: Argument) -> None:
    """Tensors become pointers, numbers ``long``; the number of threads, torch's, is the last argument of all."""
    function: Any = getattr(library(), f"{name}_{DTYPES[dtype]}")
    function.restype = ctypes.c_long
    plain = [
        ctypes.c_long(a) if isinstance(a, int) else ctypes.c_void_p(None if a is None else a.data_ptr())
        for a in arguments
    ]
    rows = function(*plain, ctypes.c_int(torch.get_num_threads()))
    assert rows >= 0, "check_operands has seen the number of tokens"


def _with_count(vector: torch.Tensor | None) -> tuple[Argument, Argument]:
    return vector, 0 if vector is None else vector.numel()


def _stored(weight: Weight) -> tuple[str, tuple[Argument, ...]]:
    """Prefix of the function, and the arguments that describe the weight."""
    if isinstance(weight, Int4Rows):
        return "int4", (weight.codes, weight.scale, weight.zero, weight.group)
    return "gemv", (weight,)


def check_operands(x: torch.Tensor, weight: Weight, shape: tuple[int, int], *float32: torch.Tensor | None) -> None:
    """Raw memory is read behind this: refuse what would read something else.

    Args:
        shape: lines and width that the weight must have.

    Raises:
        ToolkitError: more tokens than the kernel takes.
    """
    if not 1 <= len(x) <= MAX_TOKENS:
        raise ToolkitError(
            f"sparse kernel: {len(x)} tokens at once, it takes 1 to {MAX_TOKENS}",
            "run more tokens with the dense layer",
        )
    if isinstance(weight, Int4Rows):
        found = (weight.lines, weight.width)
    else:
        found = (weight.shape[0], weight.shape[1])
        assert x.dtype == weight.dtype and weight.is_contiguous(), "operands of one dtype, row-major"
    assert found == shape and x.is_contiguous(), f"{found}, expected {shape}"
    assert all(t is None or (t.dtype == torch.float32 and t.is_contiguous()) for t in float32), "float32 vectors"


def _padded(x: torch.Tensor) -> torch.Tensor:
    """Up to a number of tokens that is compiled: copies of the last one, which add no row to the union."""
    size = next(n for n in COMPILED_TOKENS if n >= len(x))
    return x if size == len(x) else torch.cat((x, x[-1:].expand(size - len(x), -1)))


def _input_product(x: torch.Tensor, weight: Weight, mask: Mask | None, bias: torch.Tensor | None) -> torch.Tensor:
    threshold, center = (None, None) if mask is None else (mask.threshold, mask.center)
    (tokens, n_in), n_out = x.shape, weight.width if isinstance(weight, Int4Rows) else weight.shape[1]
    check_operands(x, weight, (n_in, n_out), threshold, center, bias)
    x = _padded(x)
    assert all(t is None or t.numel() in (1, n_in) for t in (threshold, center))
    y = torch.empty(len(x), n_out, dtype=x.dtype)
    kind, stored = _stored(weight)
    masks = (*_with_count(threshold), *_with_count(center))
    _call(f"{kind}_input", x.dtype, x, *stored, bias, y, len(x), n_in, n_out, *masks)
    return y[:tokens]


def _output_product(
    x: torch.Tensor, weight: Weight, gate: torch.Tensor, mask: Mask | None, bias: torch.Tensor | None
) -> torch.Tensor:
    threshold = None if mask is None else mask.threshold
    (tokens, n_in), n_out = x.shape, gate.shape[1]
    check_operands(x, weight, (n_out, n_in), threshold, bias)
    assert gate.shape == (tokens, n_out) and gate.is_contiguous() and gate.dtype == x.dtype
    assert threshold is None or threshold.numel() in (1, n_out)
    x, gate = _padded(x), _padded(gate)
    h = torch.empty(len(x), n_out, dtype=x.dtype)
    kind, stored = _stored(weight)
    _call(f"{kind}_output", x.dtype, x, *stored, bias, gate, h, len(x), n_in, n_out, *_with_count(threshold))
    return h[:tokens]


def _dequantize(weight: Int4Rows, dtype: torch.dtype) -> torch.Tensor:
    floats = torch.empty(weight.lines, weight.width, dtype=dtype)
    per_scale = (weight.group, 1) if weight.mode == "input" else (1, weight.group)
    stored = (weight.codes, weight.scale, weight.zero)
    _call("int4_dequantize", dtype, *stored, floats, weight.lines, weight.width, *per_scale)
    return floats


NATIVE = SparseKernel("native", _supports, _input_product, _output_product, _dequantize, MAX_TOKENS)
