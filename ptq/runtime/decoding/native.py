"""The C++ side (``rows.h``, ``step.cpp``): its structures, and calls with tensors."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from sparsity.kernels import build

FOLDER = Path(__file__).parent
FLOAT32, BFLOAT16, INT4, INT8 = range(4)
"""Kinds of a `Matrix`."""
PIECE = 64
"""Columns of codes that a line is padded to."""

POINTER, LONG, FLOAT, INT = ctypes.c_void_p, ctypes.c_long, ctypes.c_float, ctypes.c_int


class Matrix(ctypes.Structure):
    """``W [rows, columns]`` by rows, see ``rows.h``."""

    _fields_ = (
        *((name, POINTER) for name in ("data", "scale", "zero", "bias")),
        *((name, LONG) for name in ("rows", "columns", "group", "kind", "wide")),
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
    )


@functools.cache
def library(level: str | None = None) -> Any:
    """The compiled kernels for one of `sparsity.kernels.build.LEVELS`.

    Raises:
        ToolkitError: see `sparsity.kernels.build.compiled`.
    """
    headers = [Path(build.__file__).parent / "simd.h", FOLDER / "rows.h"]
    return build.compiled("step", [FOLDER / "step.cpp"], headers, level)


def pointer(tensor: torch.Tensor | None) -> int | None:
    """Where a tensor's values lie; whoever asks keeps it alive."""
    assert tensor is None or (tensor.is_contiguous() and tensor.device.type == "cpu")
    return None if tensor is None else tensor.data_ptr()


def float_matrix(weight: torch.Tensor, bias: torch.Tensor | None) -> Matrix:
    """Of a float32 or bfloat16 weight ``[out, in]``; the bias is float32."""
    kind = {torch.float32: FLOAT32, torch.bfloat16: BFLOAT16}[weight.dtype]
    return Matrix(pointer(weight), None, None, pointer(bias), *weight.shape, weight.shape[1], kind, 0)


def code_matrix(
    codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, columns: int, bias: torch.Tensor | None = None
) -> Matrix:
    """Of packed codes, bfloat16 or float32 scales ``[out, groups]`` and uint8 zero points; the bias is float32."""
    kind = INT4 if codes.shape[1] == -(-columns // PIECE) * PIECE // 2 else INT8
    parts = (pointer(t) for t in (codes, scale, zero, bias))
    return Matrix(*parts, len(codes), columns, columns // scale.shape[1], kind, scale.dtype == torch.float32)


def products(matrix: Matrix, x: torch.Tensor) -> torch.Tensor:
    """``x [tokens, in]`` float32 to ``[tokens, out]`` float32, by the rows of ``matrix``."""
    x, y = x.contiguous(), torch.empty(len(x), matrix.rows)
    assert x.dtype == torch.float32 and x.shape[1] == matrix.columns
    arguments = ctypes.byref(matrix), POINTER(pointer(x)), POINTER(pointer(y)), LONG(len(x))
    library().ptq_products(*arguments, INT(torch.get_num_threads()))
    return y


def run_step(ops: Iterable[Op], count: int, work: torch.Tensor, position: int) -> None:
    """All operations of one step, on a workspace of floats."""
    arguments = ops, LONG(count), POINTER(pointer(work)), LONG(position)
    library().ptq_step(*arguments, INT(torch.get_num_threads()))
