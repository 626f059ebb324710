"""An independent reader of what was written: numpy and bytes, and no code shared with the formats.

After a checkpoint is written, some linears are read back with it and compared. A mistake in the packing, a label that
does not fit the tensors or a damaged write then stops the export, where the formats' own readers might agree with
their writers about something wrong.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from calibration.errors import ToolkitError
from ptq.quantized import QuantizedTensor
from ptq.scheme import BLOCK, QuantScheme

Codes = tuple[np.ndarray, np.ndarray, np.ndarray | None]
CHUNK = 1 << 18  # codes at a time


def _fields(words: np.ndarray, bits: int, count: int) -> np.ndarray:
    """int32 ``[rows, words]`` to uint8 ``[rows, count]``: the bits of a row in order, least significant first. Eight
    fields fill ``bits`` bytes, and each lies in one byte or in two."""
    octets = np.ascontiguousarray(words.astype("<i4", copy=False)).view(np.uint8)
    if bits == 4:
        return _nibbles(octets)[:, :count]
    if octets.shape[1] % bits:
        octets = np.pad(octets, ((0, 0), (0, -octets.shape[1] % bits)))
    groups = octets.reshape(len(words), octets.shape[1] // bits, bits)
    fields = np.empty((*groups.shape[:2], 8), dtype=np.uint8)
    for i in range(8):
        byte, start = divmod(i * bits, 8)
        value = groups[:, :, byte] >> start
        if start + bits > 8:
            value |= groups[:, :, byte + 1] << (8 - start)
        np.bitwise_and(value, (1 << bits) - 1, out=fields[:, :, i])
    return fields.reshape(len(words), -1)[:, :count]


def _nibbles(octets: np.ndarray) -> np.ndarray:
    """uint8 ``[rows, bytes]`` to the halves of every byte ``[rows, 2 * bytes]``, the lower one first: copied apart in
    words of two bytes, some rows at a time, which then stay in cache."""
    fields = np.empty((len(octets), 2 * octets.shape[1]), dtype=np.uint8)
    step = max(1, CHUNK // max(fields.shape[1], 1))
    for first in range(0, len(octets), step):
        pairs = octets[first : first + step].astype("<u2")
        pairs |= pairs << 4
        np.bitwise_and(pairs, 0x0F0F, out=fields[first : first + step].view("<u2"))
    return fields


def _float(tensor: torch.Tensor) -> np.ndarray:
    """float32 values of a stored scale.

    numpy has no bfloat16, whose bits are the upper half of a float32, and no floats of 8 bits. A byte is an exponent
    of two above -127.
    """
    if tensor.dtype == torch.uint8:
        return np.ldexp(np.float32(1), tensor.numpy().astype(np.int32) - 127)
    if tensor.dtype == torch.int8:
        return tensor.numpy().astype(np.float32)
    if tensor.dtype == torch.float8_e4m3fn:
        byte = tensor.view(torch.uint8).numpy().astype(np.int32)
        field, mantissa = byte >> 3 & 15, byte & 7
        value = np.where(field == 0, np.ldexp(mantissa, -9), np.ldexp(8 + mantissa, field - 10))
        return (value * np.where(byte >= 128, -1, 1)).astype(np.float32)
    if tensor.dtype == torch.bfloat16:
        return (tensor.view(torch.int16).numpy().astype(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return tensor.numpy().astype(np.float32)


def _octets(tensor: torch.Tensor) -> np.ndarray:
    """Unsigned codes of a tensor with one code per byte: int8 holds them minus 128, float8 has their bits."""
    octets = tensor.view(torch.uint8).numpy()
    return octets ^ np.uint8(0x80) if tensor.dtype == torch.int8 else octets


def _awq_fields(words: np.ndarray) -> np.ndarray:
    """int32 ``[rows, n/8]`` to uint8 ``[rows, n]``: nibble i of a word belongs to column (0 2 4 6 1 3 5 7)[i]."""
    octets = np.ascontiguousarray(words.astype("<i4", copy=False)).view(np.uint8).reshape(*words.shape, 4)
    columns = np.empty((*words.shape, 8), dtype=np.uint8)
    for nibble, column in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
        np.bitwise_and(octets[:, :, nibble // 2] >> (4 * (nibble % 2)), 15, out=columns[:, :, column])
    return columns.reshape(len(words), -1)


def read_codes(
    format_name: str, tensors: Mapping[str, torch.Tensor], scheme: QuantScheme, shape: tuple[int, int]
) -> Codes:
    """Codes of one linear from its stored tensors by suffix.

    Args:
        format_name: the label in config.json's sense: ``gptq`` is version 1, ``gptq_v2`` version 2.

    Returns:
        codes uint8 ``[out, in]``, scale float32 ``[lines, G]``, zero uint8 ``[lines, G]`` or None where there is none.
    """
    bits, (out, columns) = scheme.weights.bits, shape
    array = {suffix: t.numpy() for suffix, t in tensors.items() if not t.dtype.is_floating_point}
    zero: np.ndarray | None = None
    if format_name == "compressed-tensors" and "weight" in tensors:  # one code per byte
        codes, scale = _octets(tensors["weight"]), _float(tensors["weight_scale"])
        if "weight_zero_point" in tensors:
            zero = _octets(tensors["weight_zero_point"])
    elif format_name == "compressed-tensors" and "weight_shape" not in tensors:  # FP4, two codes per byte
        nibbles = array["weight_packed"][:, :, None] >> np.array([0, 4], dtype=np.uint8) & 15
        codes, scale = nibbles.reshape(out, columns), _float(tensors["weight_scale"])
    elif format_name == "compressed-tensors":
        codes, scale = _fields(array["weight_packed"], bits, columns), _float(tensors["weight_scale"])
        if "weight_zero_point" in array:
            zero = _fields(array["weight_zero_point"].T, bits, out).T
    elif format_name == "awq":
        codes, zero = _awq_fields(array["qweight"]).T, _awq_fields(array["qzeros"]).T
        scale = _float(tensors["scales"]).T
    elif format_name in ("gptq", "gptq_v2"):
        codes = _fields(array["qweight"].T, bits, columns)
        zero = _fields(array["qzeros"], bits, out).T + np.uint8(1 if format_name == "gptq" else 0)
        scale = _float(tensors["scales"]).T
    else:
        assert format_name == "native", f"no reader for '{format_name}'"
        codes, scale, zero = array["codes"], _float(tensors["scale"]), array.get("zero")
        if "salient_codes" in array:  # one bit, and four in the columns of a bitmap
            salient = np.unpackbits(array["salient"], bitorder="little")[:columns].astype(bool)
            codes, bits = np.empty(shape, dtype=np.uint8), 4
            codes[:, salient] = _fields(array["salient_codes"], 4, int(salient.sum()))
            codes[:, ~salient] = _fields(array["codes"], 1, int((~salient).sum()))
        elif bits < 8:
            codes = _fields(codes, bits, columns)
        if scheme.weights.float_zeros:
            zero = _float(tensors["zero"])
        elif bits < 8 and "super_scale" not in tensors:
            zero = None if zero is None else _fields(zero[None], bits, scale.size).reshape(scale.shape)
    return codes, scale, zero


def _first_difference(what: str, name: str, stored: np.ndarray, expected: np.ndarray) -> None:
    if stored.shape != expected.shape:
        found, where = f"shape {stored.shape}, expected {expected.shape}", ""
    elif (stored == expected).all():
        return
    else:
        place = tuple(int(i) for i in np.argwhere(stored != expected)[0])
        found, where = f"{stored[place]}, expected {expected[place]}", f" at {list(place)}"
    raise ToolkitError(
        f"{name}: {what}{where} reads back as {found}",
        "the file is damaged or the writer is wrong: export again, and report it if it stays",
    )


def compare(name: str, q: QuantizedTensor, format_name: str, tensors: Mapping[str, torch.Tensor]) -> None:
    """Compare stored tensors with what they should hold.

    Args:
        name: of the linear, for the message.
        tensors: as read from the file, by suffix, on the CPU.

    Raises:
        ToolkitError: naming the linear and the first codes, scale, zero point or column group that differs.
    """
    if "weight_shape" in tensors:
        _first_difference("weight_shape", name, tensors["weight_shape"].numpy(), np.array(q.shape))
    codes, scale, zero = read_codes(format_name, tensors, q.scheme, q.shape)
    if q.scheme.weights.grouping.kind == "block":  # one line of scales for all rows of a block
        scale = scale[np.arange(q.shape[0]) // BLOCK]
    _first_difference("code", name, codes, q.codes.cpu().numpy())
    _first_difference("scale", name, scale, q.scale.cpu().numpy())
    if q.global_scale is not None:
        kept = tensors.get("global_scale", tensors.get("weight_global_scale", torch.zeros(0)))
        _first_difference("global scale", name, kept.numpy(), q.global_scale.cpu().numpy())
    for field, over in (("super_scale", q.super_scale), ("super_min", q.super_min)):
        if over is not None:
            _first_difference(field, name, _float(tensors[field]), over.cpu().numpy())
    if q.zero is not None:
        stored = np.zeros(0, dtype=np.uint8) if zero is None else zero
        _first_difference("zero point", name, stored, q.zero.cpu().numpy())
    elif zero is not None:
        _first_difference("zero point", name, zero, np.full(zero.shape, 1 << (q.scheme.weights.bits - 1)))
    stored_index = tensors.get("g_idx", tensors.get("group_index"))
    if stored_index is not None or q.group_index is not None:
        columns = q.shape[1]
        plain = np.arange(columns) // q.scheme.weights.grouping.width(columns)
        expected = plain if q.group_index is None else q.group_index.cpu().numpy()
        found = plain if stored_index is None else stored_index.numpy()
        _first_difference("group of column", name, found, expected)
    for part, tensor in q.parts.items():
        if part == "input_scale" and "input_global_scale" in tensors:  # NVFP4 stores what steps are divided by
            part, tensor = "input_global_scale", 1 / tensor.float()
        place = {"key_scale": "k_scale", "value_scale": "v_scale"}.get(part, part)
        kept = tensors[part] if part in tensors else tensors.get(place, torch.zeros(0, dtype=tensor.dtype))
        _first_difference(part, name, kept.float().numpy(), tensor.float().cpu().numpy())
