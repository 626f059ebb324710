"""The C++ side (``rows.h``, ``columns.h``, ``products.h``, ``step.cpp``): its structures, and calls with tensors."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any, Literal

import torch

from sparsity.kernels import build
from sparsity.kernels.int4 import Int4Rows
from sparsity.kernels.kernel import Mask

FOLDER = Path(__file__).parent
FLOAT32, BFLOAT16, INT4, INT8, WORDS4 = range(5)
"""Kinds of a `Matrix`."""
PIECE = 64
"""Columns of codes that a line is padded to."""

Inputs = Literal["int15", "int8"]
"""What inputs of integer codes are rounded to: 15 bits per group of the weight, or 8 per 64 columns (32 in groups of
32)."""

POINTER, LONG, FLOAT, INT = ctypes.c_void_p, ctypes.c_long, ctypes.c_float, ctypes.c_int


class Matrix(ctypes.Structure):
    """``W [rows, columns]`` by rows or by columns, and which inputs are in use; see ``rows.h``."""

    _fields_ = (
        *((name, POINTER) for name in ("data", "scale", "zero", "bias")),
        *((name, LONG) for name in ("rows", "columns", "group", "kind", "wide", "narrow")),
        *((name, POINTER) for name in ("threshold", "center")),
        *((name, LONG) for name in ("thresholds", "centers", "transposed")),
    )


class Op(ctypes.Structure):
    """One operation of a step, see ``step.cpp``."""

    _fields_ = (
        *((name, LONG) for name in ("kind", "source", "target", "barrier")),
        ("first", Matrix),
        ("second", Matrix),
        *((name, POINTER) for name in ("norm", "norm_keys")),
        *((name, FLOAT) for name in ("epsilon", "scale", "softcap")),
        *((name, INT) for name in ("add", "activation", "half_keys")),
        *((name, LONG) for name in ("keys", "values")),
        *((name, POINTER) for name in ("cosine", "sine", "key_cache", "value_cache")),
        *((name, LONG) for name in ("heads", "key_heads", "width", "rotary", "positions", "window")),
        ("gate", POINTER),
        ("gates", LONG),
    )


@functools.cache
def library(level: str | None = None) -> Any:
    """The compiled kernels for one of `sparsity.kernels.build.LEVELS`.

    Raises:
        ToolkitError: see `sparsity.kernels.build.compiled`.
    """
    shared = Path(build.__file__).parent
    headers = [
        *(shared / name for name in build.HEADERS),
        *(FOLDER / f"{name}.h" for name in ("inputs", "rows", "columns", "products")),
    ]
    return build.compiled("step", [FOLDER / "step.cpp"], headers, level)


def pointer(tensor: torch.Tensor | None) -> int | None:
    """Where a tensor's values lie; whoever asks keeps it alive."""
    assert tensor is None or (tensor.is_contiguous() and tensor.device.type == "cpu")
    return None if tensor is None else tensor.data_ptr()


def float_matrix(weight: torch.Tensor, bias: torch.Tensor | None, transposed: bool = False) -> Matrix:
    """Of a float32 or bfloat16 weight ``[out, in]``, or ``[in, out]``; the bias is float32."""
    kind = {torch.float32: FLOAT32, torch.bfloat16: BFLOAT16}[weight.dtype]
    rows, columns = reversed(weight.shape) if transposed else weight.shape
    parts = (pointer(weight), None, None, pointer(bias), rows, columns, columns, kind)
    return Matrix(*parts, transposed=transposed)


def word_matrix(weight: Int4Rows, bias: torch.Tensor | None, inputs: Inputs = "int15") -> Matrix:
    """Of codes for sparse products, in either mode; the bias is float32."""
    transposed = weight.mode == "input"
    rows, columns = (weight.width, weight.lines) if transposed else (weight.lines, weight.width)
    parts = (pointer(t) for t in (weight.codes, weight.scale, weight.zero, bias))
    return Matrix(*parts, rows, columns, weight.group, WORDS4, narrow=inputs == "int8", transposed=transposed)


def set_mask(matrix: Matrix, mask: Mask) -> None:
    """Which inputs of a weight are in use; whoever asks keeps the mask alive."""
    matrix.threshold, matrix.thresholds = pointer(mask.threshold), mask.threshold.numel()
    if mask.center is not None:
        matrix.center, matrix.centers = pointer(mask.center), mask.center.numel()


def code_matrix(
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    columns: int,
    bias: torch.Tensor | None = None,
    inputs: Inputs = "int15",
) -> Matrix:
    """Of packed codes, bfloat16 or float32 scales ``[out, groups]`` and uint8 zero points; the bias is float32."""
    kind = INT4 if codes.shape[1] == -(-columns // PIECE) * PIECE // 2 else INT8
    wide, narrow = scale.dtype == torch.float32, inputs == "int8"
    parts = (pointer(t) for t in (codes, scale, zero, bias))
    return Matrix(*parts, len(codes), columns, columns // scale.shape[1], kind, wide, narrow)


def products(matrix: Matrix, x: torch.Tensor) -> torch.Tensor:
    """``x [tokens, in]`` float32 to ``[tokens, out]`` float32, by the rows of ``matrix``, all of them."""
    x, y = x.contiguous(), torch.empty(len(x), matrix.rows)
    assert x.dtype == torch.float32 and x.shape[1] == matrix.columns
    assert not matrix.transposed and matrix.kind != WORDS4, "of these one token is multiplied, in a step"
    arguments = ctypes.byref(matrix), POINTER(pointer(x)), POINTER(pointer(y)), LONG(len(x))
    library().ptq_products(*arguments, INT(torch.get_num_threads()))
    return y


def run_step(ops: Any, work: torch.Tensor, position: int, first: int = 0, last: int | None = None) -> None:
    """Operations ``first`` to ``last`` of a step, all of them by default, on a workspace of floats."""
    start, count = ctypes.byref(ops, first * ctypes.sizeof(Op)), (len(ops) if last is None else last) - first
    arguments = start, LONG(count), POINTER(pointer(work)), LONG(position)
    library().ptq_step(*arguments, INT(torch.get_num_threads()))
