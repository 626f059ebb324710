"""From committed blocks to a checkpoint in some format: streamed, then read back by an independent reader."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from calibration.architectures import ArchitectureSpec
from calibration.errors import ToolkitError
from calibration.model.checkpoint import CheckpointReader, disk_errors, write_atomically
from calibration.model.contents import small_files
from calibration.model.shards import ShardWriter
from ptq.formats.readback import compare
from ptq.formats.registry import Format
from ptq.linears import ModelLayout
from ptq.quantized import QuantizedTensor

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


def write_checkpoint(
    source: Source,
    outside: Iterable[tuple[str, torch.Tensor]],
    layout: ModelLayout,
    fmt: Format,
    out: Path,
    advance: Callable[[str], None],
    stored_name: Callable[[str], str] = str,
) -> tuple[Format, int]:
    """Write shards, index and config.json into the existing folder ``out``.

    Args:
        source: gives blocks of (quantized linears, float tensors); called twice where zero points decide the variant.
        outside: (name, tensor) of everything outside the blocks.
        stored_name: what the source's files call a tensor; the output's files call it the same.

    Returns:
        the format as written (GPTQ settles on version 1 or 2), and the bytes of all tensors.
    """
    variant = fmt.for_zeros(_smallest_zero(source) >= 1) if fmt.name.startswith("gptq") else fmt
    dtype = getattr(torch, layout.dtype)
    for stale in [*out.glob("*.safetensors"), *out.glob("*.safetensors.part")]:
        stale.unlink()
    writer = ShardWriter(out)
    for name, tensor in outside:
        writer.add(stored_name(name), tensor)
    for quantized, others in source():
        for name, tensor in others.items():
            writer.add(stored_name(name), tensor)
        for name, q in quantized.items():
            for suffix, tensor in variant.encode(q, dtype).items():
                writer.add(stored_name(f"{name}.{suffix}"), tensor)
            advance(name)
    writer.finish()
    settings = variant.config(layout)
    config = {**layout.config, "quantization_config": settings}
    write_atomically(out / "config.json", _json(config))
    if settings["quant_method"] == "gptq":
        write_atomically(out / "quantize_config.json", _json(settings))  # where older readers look
    return variant, writer.total_bytes


def _json(data: dict[str, Any]) -> bytes:
    return (json.dumps(data, indent=2, sort_keys=True) + "\n").encode()


def _smallest_zero(source: Source) -> int:
    """The smallest zero point of the model; symmetric grids have 2^(bits-1) >= 2."""
    zeros = [int(q.zero.min()) for quantized, _ in source() for q in quantized.values() if q.zero is not None]
    return min(zeros, default=2)


def verify_checkpoint(
    source: Source,
    fmt: Format,
    out: Path,
    advance: Callable[[str], None],
    stored_name: Callable[[str], str] = str,
) -> int:
    """Read every quantized linear back from the shards with the independent reader; returns how many.

    Raises:
        ToolkitError: the first linear that differs, or one whose tensors are missing.
    """
    count = 0
    with CheckpointReader(out) as reader:
        for quantized, _ in source():
            for name, q in quantized.items():
                named = {s: stored_name(f"{name}.{s}") for s in fmt.suffixes}
                found = {s: full for s, full in named.items() if full in reader.infos}
                if not found:
                    raise ToolkitError(
                        f"{name}: missing from the written files", "this is a bug of ptq: please report it"
                    )
                compare(name, q, fmt.name, {s: reader.tensor(full) for s, full in found.items()})
                count += 1
                advance(name)
            reader.close()
    return count


def copy_small_files(source: Path, out: Path) -> None:
    """Tokenizer, generation config and whatever else lies beside the weights. (Python files are copied, never run.)"""
    with disk_errors(out):
        for path in small_files(source):
            if path.name not in NOT_COPIED:
                (out / path.name).parent.mkdir(exist_ok=True)
                shutil.copyfile(path, out / path.relative_to(source))


def outside_blocks(reader: CheckpointReader, spec: ArchitectureSpec) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors outside the blocks, in the order of their names."""
    for name in sorted(reader.infos):
        if spec.block_of(name) is None:
            yield name, reader.tensor(name)
