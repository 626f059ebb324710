"""Dense little-endian bit streams: the packing that GPTQ, compressed-tensors and our own files share.

Element i of a row occupies stream bits [i*b, i*b + b); bit j of the stream is bit j mod 32 of 32-bit word j div 32.
Elements may straddle words. A row ends after ceil(n*b/32) words, stored as int32 (two's complement view).
"""

from __future__ import annotations

import torch


def words_per_row(n: int, bits: int) -> int:
    """ceil(n * bits / 32)."""
    return -(-n * bits // 32)


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes ``[rows, n]`` (any integer dtype, values in [0, 2^bits)) to int32 words ``[rows, ceil(n*bits/32)]``.

    Raises:
        ValueError: a code is outside the range; it would spill into its neighbour.
    """
    low, high = (int(v) for v in torch.aminmax(codes)) if codes.numel() else (0, 0)
    if low < 0 or high >= 2**bits:
        raise ValueError(f"codes {low}..{high} do not fit {bits} bits")
    rows, n = codes.shape
    padded = torch.nn.functional.pad(codes.to(torch.int64), (0, -n % 32)).view(rows, -1, 32)
    words = torch.zeros(rows, padded.shape[1], bits, dtype=torch.int64, device=codes.device)
    for i in range(32):  # 32 elements fill exactly `bits` words, whatever the number of rows and columns
        word, offset = divmod(i * bits, 32)
        words[..., word] |= (padded[..., i] << offset) & 0xFFFFFFFF
        if offset + bits > 32:
            words[..., word + 1] |= padded[..., i] >> (32 - offset)
    flat = words.flatten(1)[:, : words_per_row(n, bits)]
    return torch.where(flat >= 2**31, flat - 2**32, flat).to(torch.int32)


def unpack(words: torch.Tensor, bits: int, n: int) -> torch.Tensor:
    """The inverse of `pack`: int32 ``[rows, ceil(n*bits/32)]`` to uint8 codes ``[rows, n]``."""
    rows = words.shape[0]
    missing = -words.shape[1] % bits
    padded = torch.nn.functional.pad(words.to(torch.int64) & 0xFFFFFFFF, (0, missing)).view(rows, -1, bits)
    codes = torch.empty(*padded.shape[:2], 32, dtype=torch.uint8, device=words.device)
    for i in range(32):
        word, offset = divmod(i * bits, 32)
        value = padded[..., word] >> offset
        if offset + bits > 32:
            value |= padded[..., word + 1] << (32 - offset)
        codes[..., i] = (value & (2**bits - 1)).to(torch.uint8)
    return codes.flatten(1)[:, :n].contiguous()
