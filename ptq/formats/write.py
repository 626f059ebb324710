"""From committed blocks to a checkpoint in some format: streamed, then read back by an independent reader."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Container, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from calibration.architectures import ArchitectureSpec
from calibration.errors import ToolkitError
from calibration.model.checkpoint import CheckpointReader, disk_errors, write_atomically
from calibration.model.contents import small_files
from calibration.model.shards import ShardWriter
from ptq.formats.gguf_file import verify_file, write_file
from ptq.formats.native import WEIGHTS_FILE, WEIGHTS_KEY
from ptq.formats.readback import compare
from ptq.formats.registry import Format, stored_names
from ptq.linears import ModelLayout
from ptq.quantized import QuantizedTensor
from ptq.session import SINGLE_FILE

NOT_COPIED = {  # written anew, or belonging to another run
    "config.json",
    "quantize_config.json",
    "report.json",
    "timings.json",
    "plan.json",
    "sparsity.json",  # thresholds belong to one set of weights
    "train.txt",
    "test.txt",
}


Source = Callable[[], Iterator[tuple[dict[str, QuantizedTensor], dict[str, torch.Tensor]]]]
Outside = Callable[[], Iterable[tuple[str, torch.Tensor | QuantizedTensor]]]
"""Gives (name, tensor) of everything outside the blocks; where an embedding or head is quantized, its full name without
``.weight``."""


@dataclass(frozen=True)
class Origin:
    """What an output takes over from the checkpoint that it is made of.

    Attributes:
        folder: of that checkpoint, with the tokenizer, which GGUF files hold.
        stored_name: what its files call a tensor; the output's files call it the same.
        metadata: a GGUF file to take the tokenizer from instead.
    """

    folder: Path
    stored_name: Callable[[str], str] = str
    metadata: Path | None = None


def write_checkpoint(
    source: Source,
    outside: Outside,
    layout: ModelLayout,
    fmt: Format,
    out: Path,
    origin: Origin,
    advance: Callable[[str], None],
) -> tuple[Format, int]:
    """Write shards, index and config.json into the existing folder ``out``, or the one file of GGUF.

    Args:
        source: gives blocks of (quantized linears, float tensors).

    Returns:
        the format as written (GPTQ settles on version 1 or 2), and the bytes of all tensors.
    """
    variant = fmt.for_grid(all(n.scheme.weights.symmetric for n in layout.quantized if n.scheme is not None))
    if fmt.name == "gguf":
        return fmt, write_file(source(), outside(), layout, out, origin.folder, origin.metadata, advance)
    dtype = getattr(torch, layout.dtype)
    for stale in [*out.glob("*.safetensors"), *out.glob("*.safetensors.part")]:
        stale.unlink()
    writer = ShardWriter(out)
    for name, value in outside():
        if isinstance(value, QuantizedTensor):
            names = stored_names(variant, name)
            for suffix, tensor in variant.encode(value, dtype).items():
                writer.add(origin.stored_name(names[suffix]), tensor)
        else:
            writer.add(origin.stored_name(name), value)
    for quantized, others in source():
        for name, tensor in others.items():
            writer.add(origin.stored_name(name), tensor)
        for name, q in quantized.items():
            names = stored_names(variant, name)
            for suffix, tensor in variant.encode(q, dtype).items():
                writer.add(origin.stored_name(names[suffix]), tensor)
            advance(name)
    writer.finish()
    settings = variant.config(layout)
    config = {**layout.config, "quantization_config": settings}
    if variant.name == "native":
        config[WEIGHTS_KEY] = WEIGHTS_FILE
    write_atomically(out / "config.json", _json(config))
    if settings["quant_method"] == "gptq":
        write_atomically(out / "quantize_config.json", _json(settings))  # where older readers look
    return variant, writer.total_bytes


def _json(data: dict[str, Any]) -> bytes:
    return (json.dumps(data, indent=2, sort_keys=True) + "\n").encode()


def verify_checkpoint(
    source: Source,
    outside: Outside,
    fmt: Format,
    layout: ModelLayout,
    out: Path,
    advance: Callable[[str], None],
    stored_name: Callable[[str], str] = str,
) -> int:
    """Read every quantized linear, embedding and head back from the files with an independent reader; of a GGUF file
    all tensors.

    Returns:
        how many linears; embedding and head are not counted.

    Raises:
        ToolkitError: the first one that differs, or whose tensors are missing.
    """
    if fmt.name == "gguf":
        return verify_file(chain(source(), _each_alone(outside)), layout, out / SINGLE_FILE, advance)
    everything = chain(source(), _each_alone(outside) if layout.outside else ())
    count = 0
    with CheckpointReader(out) as reader:
        for quantized, _ in everything:
            for name, q in quantized.items():
                named = {s: stored_name(full) for s, full in stored_names(fmt, name).items()}
                found = {s: full for s, full in named.items() if full in reader.infos}
                if not found:
                    raise ToolkitError(
                        f"{name}: missing from the written files", "this is a bug of ptq: please report it"
                    )
                compare(name, q, fmt.name, {s: reader.tensor(full) for s, full in found.items()})
                count += 1
                advance(name)
            reader.close()
    return count - len(layout.outside)


def _each_alone(outside: Outside) -> Iterator[tuple[dict[str, QuantizedTensor], dict[str, torch.Tensor]]]:
    """What lies outside the blocks, each tensor as a block of its own, rounded once more where it is quantized."""
    for name, value in outside():
        yield ({name: value}, {}) if isinstance(value, QuantizedTensor) else ({}, {name: value})


def copy_small_files(source: Path, out: Path) -> None:
    """Tokenizer, generation config and whatever else lies beside the weights. (Python files are copied, never run.)"""
    with disk_errors(out):
        for path in small_files(source):
            if path.name not in NOT_COPIED:
                (out / path.relative_to(source)).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, out / path.relative_to(source))


def outside_blocks(
    reader: CheckpointReader, spec: ArchitectureSpec, taken: Container[str] = ()
) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors outside the blocks but for those ``taken``, in the order of their names."""
    for name in sorted(reader.infos):
        if spec.block_of(name) is None and name not in taken:
            yield name, reader.tensor(name)
