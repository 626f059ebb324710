"""Dense little-endian bit streams: the packing that GPTQ, compressed-tensors and our own files share.

Element i of a row occupies stream bits [i*b, i*b + b); bit j of the stream is bit j mod 32 of 32-bit word j div 32.
Elements may straddle words. A row ends after ceil(n*b/32) words, stored as int32 (two's complement view).

Everything is done on neighbours inside a word, so that a pass over memory is a handful of vectorized shifts: a word of
two bytes with one field each becomes one byte with both (`_joined`). Widths that divide 8 need nothing else. The
others are joined to four fields per 32-bit word, and eight such words make b words of the stream. Machines are assumed
to be little-endian, as safetensors files are.
"""

from __future__ import annotations

import torch

from calibration.threads import one_thread

CHUNK = 1 << 18  # codes at a time on a CPU: what is made on the way stays in cache


def words_per_row(n: int, bits: int) -> int:
    """ceil(n * bits / 32)."""
    return -(-n * bits // 32)


@one_thread()
def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes ``[rows, n]`` (any integer dtype, values in [0, 2^bits)) to int32 words ``[rows, ceil(n*bits/32)]``.

    Raises:
        ValueError: a code is outside the range; it would spill into its neighbour.
    """
    low, high = (int(v) for v in torch.aminmax(codes)) if codes.numel() else (0, 0)
    if low < 0 or high >= 2**bits:
        raise ValueError(f"codes {low}..{high} do not fit {bits} bits")
    rows, n = codes.shape
    words = torch.empty(rows, words_per_row(n, bits), dtype=torch.int32, device=codes.device)
    for part in _row_chunks(codes, n):
        octets = codes.new_zeros(part.stop - part.start, n + -n % 32, dtype=torch.uint8)
        octets[:, :n] = codes[part]
        packed = _halved(octets, bits) if 8 % bits == 0 else _straddling(octets, bits)
        words[part] = packed[:, : words.shape[1]]
    return words


@one_thread()
def unpack(words: torch.Tensor, bits: int, n: int) -> torch.Tensor:
    """The inverse of `pack`: int32 ``[rows, ceil(n*bits/32)]`` to uint8 codes ``[rows, n]``."""
    codes = torch.empty(words.shape[0], n, dtype=torch.uint8, device=words.device)
    for part in _row_chunks(words, n):
        chunk = words[part]
        if chunk.shape[1] % bits:
            chunk = torch.nn.functional.pad(chunk, (0, -chunk.shape[1] % bits))
        fields = _doubled(chunk.contiguous(), bits) if 8 % bits == 0 else _gathered(chunk.contiguous(), bits)
        codes[part] = fields[:, :n]
    return codes


def _row_chunks(tensor: torch.Tensor, n: int) -> list[slice]:
    """Rows of ``n`` codes in chunks; all at once on an accelerator."""
    rows = tensor.shape[0]
    step = max(1, CHUNK // max(n, 1)) if tensor.device.type == "cpu" else max(rows, 1)
    return [slice(first, min(first + step, rows)) for first in range(0, rows, step)]


def _joined(octets: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 ``[rows, n]`` with one field of ``bits <= 4`` each to ``[rows, n/2]`` with two, the first one lowest."""
    pairs = _wider(octets, torch.int16)
    return (pairs | (pairs >> (8 - bits))).to(torch.uint8)  # which keeps the low byte


def _halved(octets: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 ``[rows, 32 m]`` to int32 ``[rows, m * bits]``, for widths that divide 8."""
    while bits < 8:
        octets, bits = _joined(octets, bits), 2 * bits
    return _wider(octets, torch.int32)


def _wider(octets: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Neighbours in a contiguous row as one integer. (A single row may have any stride, which a view refuses.)"""
    return octets.flatten().view(dtype).view(octets.shape[0], -1)


def _doubled(words: torch.Tensor, bits: int) -> torch.Tensor:
    """The inverse of `_halved`."""
    octets, width = words.view(torch.uint8), 8
    while width > bits:
        width //= 2
        pairs = octets.to(torch.int16)
        octets = (pairs | (pairs << (8 - width))).bitwise_and_((2**width - 1) * 0x0101).view(torch.uint8)
    return octets


def _straddling(octets: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 ``[rows, 32 m]`` to int32 ``[rows, m * bits]``, for 3, 5, 6 and 7 bits."""
    fours = octets.view(torch.int32)  # a field per byte; then two per half, then four in the low 4 * bits
    fours = (fours & 0x00FF00FF) | ((fours >> (8 - bits)) & (((2**bits - 1) << bits) * 0x00010001))
    fours = (fours & 0xFFFF) | (fours >> (16 - 2 * bits) & ((4**bits - 1) << 2 * bits))
    columns = fours.unflatten(1, (-1, 8)).movedim(-1, 0).contiguous()
    words = columns.new_zeros(bits, *columns.shape[1:])
    for i, column in enumerate(columns):
        word, offset = divmod(4 * bits * i, 32)
        words[word] |= column << offset
        if offset + 4 * bits > 32:
            words[word + 1] |= column >> (32 - offset)
    return words.movedim(0, -1).contiguous().flatten(1)


def _gathered(words: torch.Tensor, bits: int) -> torch.Tensor:
    """The inverse of `_straddling`."""
    words = words.unflatten(1, (-1, bits)).movedim(-1, 0).contiguous()
    columns = words.new_empty(8, *words.shape[1:])
    for i, column in enumerate(columns):
        word, offset = divmod(4 * bits * i, 32)
        torch.bitwise_right_shift(words[word], offset, out=column)
        if offset + 4 * bits > 32:  # the shift brought copies of the sign along
            column.bitwise_and_(2 ** (32 - offset) - 1).bitwise_or_(words[word + 1] << (32 - offset))
    fours = columns.bitwise_and_(16**bits - 1).movedim(0, -1).contiguous().flatten(1)
    fours = (fours & (4**bits - 1)) | (fours << (16 - 2 * bits) & ((4**bits - 1) << 16))
    field = (2**bits - 1) * 0x00010001
    fours = (fours & field) | (fours << (8 - bits) & (field << 8))
    return fours.view(torch.uint8)
