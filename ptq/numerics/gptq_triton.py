"""GPTQ's column loop over one block of columns as one Triton program. Import only where Triton is installed;
`ptq.numerics.column_loop` does, where weights lie on a GPU.

The loop in torch starts some twenty kernels of little work per column. Here a program holds a tile of rows of W in
registers and walks the columns of the block by itself; rows do not depend on each other. What the columns behind the
block take over is a matrix product, and stays with torch.

Every operation is rounded by itself, division to the nearest and products and sums apart, so that a GPU has the codes
of Triton's interpreter. Torch's loop fuses some of them: where the last digits of float32 decide, its codes differ.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ptq.scheme import TensorQuant

ROWS = 16  # of a tile
OUTSIDE = tl.constexpr(1024.0)  # more levels than any grid has
TO_INTEGER = tl.constexpr(12582912.0)  # 1.5 * 2^23: float32 numbers of this size are integers, ties go to the even one


@triton.jit
def _nearest(level):  # type: ignore[no-untyped-def]
    """The nearest integer, for what lies inside any grid."""
    return tl.minimum(tl.maximum(level, -OUTSIDE), OUTSIDE) + TO_INTEGER - TO_INTEGER


@triton.jit
def _program(  # type: ignore[no-untyped-def]
    w, u, p, inverse, step, zero, codes, errors, visited, columns, out, SHIFT: tl.constexpr, LOWEST: tl.constexpr,
    HIGHEST: tl.constexpr, HAS_ZERO: tl.constexpr, FLOAT_ZERO: tl.constexpr, HAS_P: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    inside = row < out
    place = w + column[None, :] * out + row[:, None]
    tile = tl.load(place, mask=inside[:, None] & (column < columns)[None, :], other=0.0)
    for i in range(0, columns):
        own = tl.sum(tl.where((column == i)[None, :], tile, 0.0), axis=1)  # one value and zeros: exact
        at = i * out + row
        s = tl.load(step + at, mask=inside, other=1.0)
        level = tl.div_rn(own, s)
        shift = tl.full((ROWS,), SHIFT, tl.float32)
        if HAS_ZERO:
            shift = tl.load(zero + at, mask=inside, other=0.0)
        code = _nearest(level + shift) if FLOAT_ZERO else _nearest(level) + shift
        code = tl.minimum(tl.maximum(code, LOWEST), HIGHEST)
        error = (own - (code - shift) * s) * tl.load(inverse + i)
        tl.store(codes + at, code.to(tl.int32).to(tl.uint8), mask=inside)
        tl.store(errors + at, error, mask=inside)
        later = (column > i) & (column < columns)
        tile -= tl.load(u + i * columns + column, mask=later, other=0.0)[None, :] * error[:, None]
        if HAS_P:
            tl.store(visited + at, own, mask=inside)
            tile += tl.load(p + i * columns + column, mask=later, other=0.0)[None, :] * own[:, None]


def round_block(
    w: torch.Tensor,
    u: torch.Tensor,
    p: torch.Tensor | None,
    step: torch.Tensor,
    zero: torch.Tensor | None,
    quant: TensorQuant,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Visit the columns of one block in order.

    Args:
        w: float32 ``[columns, out]``, at most `PROGRAM_COLUMNS` columns; not modified.
        u: float32 ``[columns, columns]``, the rows and columns of the block in `inverse_factor`.
        p: the same of `asymmetry`, or None.
        step: float32 ``[columns, out]`` of every weight.
        zero: float32 in the shape of ``step``, or None: 2^(bits - 1).
        quant: of integers.

    Returns:
        codes uint8, scaled errors float32 and the weights as they were visited float32 (``w`` itself without ``p``),
        all ``[columns, out]``.
    """
    columns, out = w.shape
    codes, errors = (torch.empty(w.shape, dtype=d, device=w.device) for d in (torch.uint8, torch.float32))
    visited = w if p is None else torch.empty_like(errors)
    inverse = 1 / u.diagonal()
    operands = [t.contiguous() for t in (w, u, u if p is None else p, inverse, step, step if zero is None else zero)]
    with torch.cuda.device_of(w):
        _program[(triton.cdiv(out, ROWS),)](
            *operands, codes, errors, visited, columns, out,
            float(2 ** (quant.bits - 1)), 1.0 if quant.quantizer == "sym_restricted" else 0.0, float(quant.levels),
            zero is not None, quant.float_zeros or quant.superblocks, p is not None, ROWS,
            max(16, triton.next_power_of_2(columns)), enable_fp_fusion=False,
        )  # fmt: skip
    return codes, errors, visited
