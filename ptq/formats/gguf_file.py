"""Writing one GGUF file: keys, then tensors one after another; reading it back with the ``gguf`` package.

Tensors are spooled to a file beside the result, because their table comes first; memory holds one tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from calibration.errors import ToolkitError
from calibration.model.checkpoint import disk_errors
from calibration.model.gguf import let_go
from calibration.model.gguf_families import norm_shift, paired_rows
from ptq.formats import gguf_blocks, gguf_superblocks
from ptq.formats.gguf_model import (
    family_of,
    require_gguf,
    rotary_factors,
    settings,
    tensor_name,
    tensor_names,
)
from ptq.formats.gguf_tokenizer import tokenizer_keys
from ptq.linears import ModelLayout
from ptq.quantized import QuantizedTensor
from ptq.scheme import QuantScheme
from ptq.session import SINGLE_FILE

Entry = tuple[str, torch.Tensor | QuantizedTensor]
FLOATS = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
VERIFIED_AT_ONCE = 2**22
"""Weights, which the reader makes several times over."""
FILE_TYPES = {"Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "Q2_K": 10, "Q3_K": 12, "Q4_K": 15, "Q5_K": 17}
FILE_TYPES |= {"Q6_K": 18, "MXFP4": 38, "F16": 1, "BF16": 32, "F32": 0}
"""``general.file_type``: what a file calls itself, by the type of most of its weights (llama.h)."""
TOLERANCE = 1 / 64
"""Of a step: how far a minimum in float16 may move a weight of Q4_1 or Q5_1."""


def blocks_of(q: QuantizedTensor) -> torch.Tensor:
    """uint8 ``[out, bytes of a row]``."""
    return gguf_superblocks.encode(q) if q.scheme.weights.superblocks else gguf_blocks.encode(q)


def from_blocks(octets: torch.Tensor, scheme: QuantScheme, shape: tuple[int, int]) -> QuantizedTensor:
    """The inverse of `blocks_of`."""
    if scheme.weights.superblocks:
        return gguf_superblocks.decode(octets, scheme)
    return gguf_blocks.decode(octets, scheme, shape)


def metadata_keys(path: Path) -> dict[str, Any]:
    """``tokenizer.*`` keys of another GGUF file, each as (value, type, type of elements).

    Raises:
        ToolkitError: it cannot be read, or has no tokenizer.
    """
    import gguf

    try:
        fields = gguf.GGUFReader(path).fields
    except (OSError, ValueError, IndexError, KeyError) as error:
        raise ToolkitError(f"--metadata {path}: not readable as GGUF ({error})", "name another file") from None
    keys = {name: _Taken(f.contents(), f.types) for name, f in fields.items() if name.startswith("tokenizer.")}
    if "tokenizer.ggml.tokens" not in keys:
        raise ToolkitError(f"--metadata {path}: no tokenizer in it", "name a GGUF file of the same model")
    return keys


class _Taken:
    """A value of another file with its GGUF types."""

    def __init__(self, value: Any, types: list[Any]) -> None:
        self.value, self.types = value, types


def check_file(folder: Path, config: dict[str, Any], metadata: Path | None) -> None:
    """Refuse before any work what `write_file` would refuse after it.

    Raises:
        ToolkitError: the package is missing, or the tokenizer has no place in GGUF.
    """
    require_gguf()
    if metadata:
        metadata_keys(metadata)
    else:
        tokenizer_keys(folder, int(config["vocab_size"]))


def write_file(
    blocks: Iterable[tuple[dict[str, QuantizedTensor], dict[str, torch.Tensor]]],
    outside: Iterable[Entry],
    layout: ModelLayout,
    folder: Path,
    source: Path,
    metadata: Path | None,
    advance: Callable[[str], None],
) -> int:
    """Write the file into ``folder``; returns the bytes of all tensors.

    Args:
        source: folder with the tokenizer.
        metadata: a GGUF file whose tokenizer is taken instead.
    """
    config = layout.config
    tokenizer = metadata_keys(metadata) if metadata else tokenizer_keys(source, int(config["vocab_size"]))
    spool = folder / "tensors.tmp"
    table: list[tuple[str, tuple[int, ...], str, int]] = []
    with disk_errors(folder), spool.open("wb") as file:
        for name, value in _entries(blocks, outside, layout, advance):
            array, kind = _array(name, value, config)
            table.append((name, tuple(array.shape), kind, array.nbytes))
            array.tofile(file)
    with disk_errors(folder):
        _assemble(folder / SINGLE_FILE, spool, table, layout, tokenizer, source.name)
    spool.unlink()
    return sum(size for *_, size in table)


def _entries(
    blocks: Iterable[tuple[dict[str, QuantizedTensor], dict[str, torch.Tensor]]],
    outside: Iterable[Entry],
    layout: ModelLayout,
    advance: Callable[[str], None],
) -> Iterator[tuple[str, torch.Tensor | QuantizedTensor]]:
    """Every tensor by its full name in the checkpoint."""
    factors, counted = rotary_factors(layout.config), _counted(layout)
    if factors is not None:
        yield "rope_freqs.weight", factors
    for name, value in outside:
        yield (f"{name}.weight" if isinstance(value, QuantizedTensor) else name), value
    for quantized, others in blocks:
        for name, tensor in others.items():
            yield name, tensor
            if name in counted:
                advance(name)
        for name, q in quantized.items():
            yield f"{name}.weight", q
            advance(name)


def _counted(layout: ModelLayout) -> set[str]:
    """Float tensors that count as progress: the linears of a model of which none is quantized."""
    return set() if layout.quantized else {f"{linear.name}.weight" for linear in layout.linears}


def _floats(name: str, value: torch.Tensor, config: dict[str, Any]) -> torch.Tensor:
    """A float tensor as it is stored: vectors in float32, as llama.cpp wants them."""
    order = paired_rows(name, config)
    if value.ndim == 1:
        value = value.float() + norm_shift(name, config)
    return (value if order is None else value[order]).contiguous().cpu()


def _array(name: str, value: torch.Tensor | QuantizedTensor, config: dict[str, Any]) -> tuple[np.ndarray, str]:
    """The bytes of a tensor as they are stored, and their type: uint8 rows of blocks, or floats."""
    if isinstance(value, QuantizedTensor):
        order = paired_rows(name, config)
        octets, kind = blocks_of(value), gguf_blocks.type_of(value.scheme)
        assert kind is not None
        return (octets if order is None else octets[order]).contiguous().cpu().numpy(), kind
    value = _floats(name, value, config)
    kind = FLOATS[value.dtype]
    return (value.view(torch.uint8).numpy() if kind == "BF16" else value.numpy()), kind


def _assemble(
    path: Path,
    spool: Path,
    table: list[tuple[str, tuple[int, ...], str, int]],
    layout: ModelLayout,
    tokenizer: dict[str, Any],
    name: str,
) -> None:
    import gguf

    names = tensor_names(layout.config)
    writer = gguf.GGUFWriter(path, family_of(layout.config).architecture)
    schemes = [linear.scheme for linear in layout.quantized if linear.scheme is not None]
    kinds = [kind for scheme in schemes if (kind := gguf_blocks.type_of(scheme)) is not None]
    kinds = kinds or [kind for _, shape, kind, _ in table if len(shape) > 1]
    most = max(dict.fromkeys(kinds), key=kinds.count)
    writer.add_string("general.name", name)
    writer.add_uint32("general.file_type", FILE_TYPES[most])
    writer.add_uint32("general.quantization_version", gguf.GGML_QUANT_VERSION)
    if layout.quantized or layout.outside:
        writer.add_string("general.quantized_by", "ptq")
    for key, value in (settings(layout.config) | tokenizer).items():
        _add(writer, key, value)
    for full, shape, kind, size in table:
        target = full if full == "rope_freqs.weight" else tensor_name(full, names)
        dtype = {"F32": np.float32, "F16": np.float16}.get(kind, np.uint8)
        writer.add_tensor_info(target, shape, np.dtype(dtype), size, gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    with spool.open("rb") as file:
        for *_, size in table:
            writer.write_tensor_data(np.frombuffer(file.read(size), dtype=np.uint8))
    writer.close()


def _add(writer: Any, key: str, value: Any) -> None:
    """One key; lists of integers are int32 arrays, as llama.cpp reads token types."""
    if isinstance(value, _Taken):
        writer.add_key_value(key, value.value, value.types[0], value.types[1] if len(value.types) > 1 else None)
    elif isinstance(value, list):
        writer.add_array(key, value)
    elif isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    else:
        writer.add_string(key, value)


def _same(stored: Any, expected: torch.Tensor, allowed: float) -> bool:
    """Whether a tensor of the file stands for ``expected`` ``[rows, columns]`` or ``[length]``, some rows at a time."""
    import gguf

    if tuple(reversed(stored.shape.tolist())) != tuple(expected.shape):
        return False
    height = max(1, VERIFIED_AT_ONCE // expected[0].numel())
    for start in range(0, len(expected), height):
        found = torch.tensor(gguf.quants.dequantize(stored.data[start : start + height], stored.tensor_type))
        if not float((found - expected[start : start + height]).abs().max()) <= allowed:  # not a number differs, too
            return False
    return True


def verify_file(
    blocks: Iterable[tuple[dict[str, QuantizedTensor], dict[str, torch.Tensor]]],
    layout: ModelLayout,
    path: Path,
    advance: Callable[[str], None],
) -> int:
    """Read every tensor of the file with the ``gguf`` package, dequantized, and compare.

    Args:
        blocks: as for `write_file`, and what lies outside the blocks as blocks of its own.

    Returns:
        how many quantized linears; embedding and head are not counted.

    Raises:
        ToolkitError: the first one that differs, or is missing.
    """
    import gguf

    names, counted = tensor_names(layout.config), _counted(layout)
    reader = gguf.GGUFReader(path)
    tensors = {tensor.name: tensor for tensor in reader.tensors}

    def check(name: str, expected: torch.Tensor, step: float = 0.0) -> None:
        stored = tensors.get(tensor_name(name, names))
        if stored is None:
            raise ToolkitError(f"{name}: missing from the written file", "this is a bug of ptq: please report it")
        if not _same(stored, expected, TOLERANCE * step if stored.tensor_type.name in ("Q4_1", "Q5_1") else 0.0):
            raise ToolkitError(
                f"{name}: reads back from {path.name} as other weights",
                "the file is damaged or the writer is wrong: export again, and report it if it stays",
            )

    count = 0
    for quantized, others in blocks:
        for name, tensor in others.items():
            check(name, _floats(name, tensor, layout.config))
            if name in counted:
                advance(name)
        for name, q in quantized.items():
            order = paired_rows(name, layout.config)
            expected = q.dequantize_codes() if order is None else q.dequantize_codes()[order]
            check(f"{name}.weight", expected, float(q.step.abs().max()))
            count += 1
            advance(name)
        let_go(reader)
    return count - len(layout.outside)
