"""The Triton program of `triton_smooth`; imported only where it runs, because Triton is an optional dependency."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

TOKENS, OUTPUTS, COLUMNS = 16, 64, 32  # of a tile; 16 and 32 are the least that int8 dot products take


@triton.jit
def _program(  # type: ignore[no-untyped-def]
    q_ptr,
    w_ptr,
    order_ptr,
    group_ptr,
    token_ptr,
    output_ptr,
    y_ptr,
    tokens,
    outputs,
    columns,
    GROUP: tl.constexpr,
    BT: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    bytes_per_row = (outputs + 1) // 2
    total = tl.zeros((BT, BN), dtype=tl.float32)
    for first in range(0, columns, GROUP):
        last = tl.minimum(first + GROUP, columns)
        accumulator = tl.zeros((BT, BN), dtype=tl.int32)
        for start in range(0, GROUP, BK):
            k = first + start + tl.arange(0, BK)
            inside = k < last
            q = tl.load(q_ptr + t[:, None] * columns + k[None, :], (t[:, None] < tokens) & inside[None, :], other=0)
            row = tl.load(order_ptr + k, inside, other=0)
            address = w_ptr + row[:, None] * bytes_per_row + (n // 2)[None, :]
            pair = tl.load(address, inside[:, None] & (n[None, :] < outputs), other=0).to(tl.int32)
            code = ((pair >> (n % 2 * 4)[None, :]) & 15) - 8
            accumulator += tl.dot(q, code.to(tl.int8), out_dtype=tl.int32)
        total += accumulator.to(tl.float32) * tl.load(group_ptr + first // GROUP)  # the epilogue of a group
    token = tl.load(token_ptr + t, t < tokens, other=0.0)
    output = tl.load(output_ptr + n, n < outputs, other=0.0)
    y = total * token[:, None] * output[None, :]
    tl.store(y_ptr + t[:, None] * outputs + n[None, :], y, (t[:, None] < tokens) & (n[None, :] < outputs))


def smoothed_product(
    codes: torch.Tensor,
    weight: torch.Tensor,
    order: torch.Tensor,
    group_scales: torch.Tensor,
    steps: torch.Tensor,
    scale: torch.Tensor,
    group: int,
) -> torch.Tensor:
    """``y[t, n] = a[t] w[n] Σ_g S[g] Σ_k q[t, k] c[order[k], n]``, k in the columns of group g.

    Args:
        codes: q int8 ``[tokens, in]``, in the order of the groups.
        weight: uint8 ``[in, ceil(out / 2)]`` in its own order, c + 8 in four bits, an even output in the low half.
        order: int64 ``[in]``, the column of W of every column of ``codes``.
        group_scales: S float32 ``[ceil(in / group)]``.
        steps, scale: a ``[tokens]`` and w ``[out]``, float32.

    Returns:
        float32 ``[tokens, out]``.
    """
    (tokens, columns), outputs = codes.shape, scale.shape[0]
    y = torch.empty(tokens, outputs, dtype=torch.float32, device=codes.device)
    grid = (triton.cdiv(tokens, TOKENS), triton.cdiv(outputs, OUTPUTS))
    _program[grid](
        codes,
        weight,
        order,
        group_scales,
        steps,
        scale,
        y,
        tokens,
        outputs,
        columns,
        GROUP=group,
        BT=TOKENS,
        BN=OUTPUTS,
        BK=COLUMNS,
    )
    return y
