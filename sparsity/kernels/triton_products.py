"""The sparse products in Triton. Import only where Triton is installed; `sparsity.kernels.gpu` does.

The mask is compared inside: a tile's rows of masked values are not loaded (predicated off, so they cost no memory
traffic). Input products are split along the inputs over the grid and added up in float32 with atomics, so sums differ
from run to run in their order (TEAL's kernel, arXiv 2408.14690, adds float16). Output products need no atomics: a
program owns its rows. Tokens are a leading axis of every tile, a power of two, padded with values that keep no row.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _kept(values, threshold, center, at, inside, T_STEP: tl.constexpr, C_STEP: tl.constexpr):  # type: ignore[no-untyped-def]
    """values - center where it is kept, else 0, and which are. A step of 0 or 1 is of a scalar or vector, -1: none."""
    v = values
    if C_STEP >= 0:
        v = v - tl.load(center + at * C_STEP, mask=inside, other=0.0)
    keep = inside
    if T_STEP >= 0:
        keep = keep & ~(tl.abs(v) <= tl.load(threshold + at * T_STEP, mask=inside, other=0.0))
    return tl.where(keep, v, 0.0), keep


@triton.jit
def input_product(  # type: ignore[no-untyped-def]
    x, wt, y, threshold, center, tokens, n_in, n_out,
    T_STEP: tl.constexpr, C_STEP: tl.constexpr, B: tl.constexpr, BLOCK_IN: tl.constexpr, BLOCK_OUT: tl.constexpr,
):  # fmt: skip
    """y [tokens, n_out] float32 += (x - center) wt over one block of inputs; wt [n_in, n_out]."""
    out = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    i = tl.program_id(1) * BLOCK_IN + tl.arange(0, BLOCK_IN)
    b = tl.arange(0, B)
    inside = (b[:, None] < tokens) & (i[None, :] < n_in)
    values = tl.load(x + b[:, None] * n_in + i[None, :], mask=inside, other=0.0).to(tl.float32)
    v, keep = _kept(values, threshold, center, i[None, :], inside, T_STEP, C_STEP)
    rows = tl.max(keep.to(tl.int32), axis=0) > 0
    tile = rows[:, None] & (out[None, :] < n_out)
    w = tl.load(wt + i[:, None] * n_out + out[None, :], mask=tile, other=0.0).to(tl.float32)
    sums = tl.sum(v[:, :, None] * w[None, :, :], axis=1)
    tl.atomic_add(y + b[:, None] * n_out + out[None, :], sums, mask=(b[:, None] < tokens) & (out[None, :] < n_out))


@triton.jit
def output_product(  # type: ignore[no-untyped-def]
    x, w, bias, gate, h, threshold, tokens, n_in, n_out,
    T_STEP: tl.constexpr, HAS_BIAS: tl.constexpr, B: tl.constexpr, BLOCK_IN: tl.constexpr, BLOCK_OUT: tl.constexpr,
):  # fmt: skip
    """h [tokens, n_out] = gate * (x Wᵀ + bias) where a gate is kept, else 0; w [n_out, n_in]."""
    j = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    b = tl.arange(0, B)
    inside = (b[:, None] < tokens) & (j[None, :] < n_out)
    values = tl.load(gate + b[:, None] * n_out + j[None, :], mask=inside, other=0.0).to(tl.float32)
    g, keep = _kept(values, threshold, threshold, j[None, :], inside, T_STEP, -1)
    rows = tl.max(keep.to(tl.int32), axis=0) > 0
    sums = tl.zeros((B, BLOCK_OUT), dtype=tl.float32)
    for start in range(0, n_in, BLOCK_IN):
        i = start + tl.arange(0, BLOCK_IN)
        tokens_tile = (b[:, None] < tokens) & (i[None, :] < n_in)
        xs = tl.load(x + b[:, None] * n_in + i[None, :], mask=tokens_tile, other=0.0).to(tl.float32)
        tile = rows[:, None] & (i[None, :] < n_in)
        ws = tl.load(w + j[:, None] * n_in + i[None, :], mask=tile, other=0.0).to(tl.float32)
        sums += tl.sum(xs[:, None, :] * ws[None, :, :], axis=2)
    if HAS_BIAS:
        sums += tl.load(bias + j, mask=j < n_out, other=0.0)[None, :]
    tl.store(h + b[:, None] * n_out + j[None, :], (g * sums).to(h.dtype.element_ty), mask=inside)


@triton.jit
def int4_input_product(  # type: ignore[no-untyped-def]
    x, words, scale, zero, y, threshold, center, tokens, n_in, n_out, line, group,
    T_STEP: tl.constexpr, C_STEP: tl.constexpr, HAS_ZERO: tl.constexpr,
    B: tl.constexpr, BLOCK_IN: tl.constexpr, BLOCK_WORDS: tl.constexpr,
):  # fmt: skip
    """As `input_product`, with rows of `Int4Rows`: ``line`` words each. A block of inputs lies in one group."""
    word = tl.program_id(0) * BLOCK_WORDS + tl.arange(0, BLOCK_WORDS)
    first = tl.program_id(1) * BLOCK_IN
    i = first + tl.arange(0, BLOCK_IN)
    b = tl.arange(0, B)
    inside = (b[:, None] < tokens) & (i[None, :] < n_in)
    values = tl.load(x + b[:, None] * n_in + i[None, :], mask=inside, other=0.0).to(tl.float32)
    v, keep = _kept(values, threshold, center, i[None, :], inside, T_STEP, C_STEP)
    rows = tl.max(keep.to(tl.int32), axis=0) > 0
    tile = rows[:, None] & (word[None, :] < line)
    packed = tl.load(words + i[:, None] * line + word[None, :], mask=tile, other=0)
    total = tl.sum(v, axis=1)
    at = first // group * n_out
    for k in tl.static_range(8):
        column = word // 16 * 128 + 16 * k + word % 16
        real = (word < line) & (column < n_out)
        levels = ((packed >> (4 * k)) & 15).to(tl.float32) - 8.0
        sums = tl.sum(v[:, :, None] * levels[None, :, :], axis=1)
        if HAS_ZERO:
            offset = 8.0 - tl.load(zero + at + column, mask=real, other=0).to(tl.float32)
            sums += total[:, None] * offset[None, :]
        s = tl.load(scale + at + column, mask=real, other=0.0).to(tl.float32)
        tl.atomic_add(
            y + b[:, None] * n_out + column[None, :], sums * s[None, :], mask=(b[:, None] < tokens) & real[None, :]
        )


@triton.jit
def int4_output_product(  # type: ignore[no-untyped-def]
    x, words, scale, zero, bias, gate, h, threshold, tokens, n_in, n_out, line, group, groups,
    T_STEP: tl.constexpr, HAS_ZERO: tl.constexpr, HAS_BIAS: tl.constexpr, B: tl.constexpr, BLOCK_OUT: tl.constexpr,
):  # fmt: skip
    """As `output_product`, with rows of `Int4Rows`: ``line`` words each."""
    j = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    b = tl.arange(0, B)
    lane = tl.arange(0, 16)
    inside = (b[:, None] < tokens) & (j[None, :] < n_out)
    values = tl.load(gate + b[:, None] * n_out + j[None, :], mask=inside, other=0.0).to(tl.float32)
    g, keep = _kept(values, threshold, threshold, j[None, :], inside, T_STEP, -1)
    rows = tl.max(keep.to(tl.int32), axis=0) > 0
    sums = tl.zeros((B, BLOCK_OUT), dtype=tl.float32)
    for start in range(0, line, 16):
        packed = tl.load(words + j[:, None] * line + (start + lane)[None, :], mask=rows[:, None], other=0)
        for k in tl.static_range(8):
            column = start * 8 + 16 * k + lane
            here = (b[:, None] < tokens) & (column[None, :] < n_in)
            xs = tl.load(x + b[:, None] * n_in + column[None, :], mask=here, other=0.0).to(tl.float32)
            levels = ((packed >> (4 * k)) & 15).to(tl.float32)
            at = j * groups + tl.minimum((start * 8 + 16 * k) // group, groups - 1)
            if HAS_ZERO:
                levels -= tl.load(zero + at, mask=rows, other=0).to(tl.float32)[:, None]
            else:
                levels -= 8.0
            s = tl.load(scale + at, mask=rows, other=0.0).to(tl.float32)
            sums += tl.sum(xs[:, None, :] * levels[None, :, :], axis=2) * s[None, :]
    if HAS_BIAS:
        sums += tl.load(bias + j, mask=j < n_out, other=0.0)[None, :]
    tl.store(h + b[:, None] * n_out + j[None, :], (g * sums).to(h.dtype.element_ty), mask=inside)
