"""What a checkpoint is, from its headers: for ``ptq inspect``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from calibration.model.checkpoint import CheckpointReader
from calibration.model.opening import context_length, locate, open_model
from ptq.devices import resolve_device
from ptq.formats.checks import summary
from ptq.formats.reading import Schemes, quantized_linears
from ptq.runtime.kernels.dispatch import refusals, select
from ptq.runtime.kernels.kernel import KernelQuery


@dataclass(frozen=True, repr=False)
class Inspection:
    """Lines of text about a checkpoint."""

    lines: tuple[str, ...]

    def __str__(self) -> str:
        return "\n".join(self.lines)

    __repr__ = __str__


def describe(model: str | Path, device: str = "auto", trust_remote_code: bool = False) -> Iterator[str]:
    """Lines of text. No tensor is loaded, but small ones that tell shapes.

    Raises:
        ToolkitError: broken or unknown checkpoint.
    """
    folder = locate(model)
    reader, config, spec = open_model(folder, trust_remote_code, coded=True)
    quantized = quantized_linears(reader)
    parameters = sum(i.numel for i in reader.infos.values())
    yield f"{folder.name}: {spec.family}, {spec.n_blocks} blocks, context {context_length(config)}"
    stored = "float" if quantized is None else f"quantized, {quantized[0].name}"
    yield f"{len(reader.infos)} tensors, {parameters:,} values, {reader.total_bytes / 1e6:.1f} MB ({stored})"
    dtypes = Counter(str(i.dtype).removeprefix("torch.") for i in reader.infos.values())
    yield "dtypes: " + ", ".join(f"{dtype} x {n}" for dtype, n in sorted(dtypes.items()))
    block = spec.block(0)
    yield f"block 0 ({spec.prefix(0)}): linears by shared input, in execution order"
    for shared in block.inputs[:12]:
        shapes = [reader.infos.get(f"{spec.prefix(0)}{n}.weight") for n in shared.linears]
        names = ", ".join(
            n + (f" {list(i.shape)}" if i is not None else "") for n, i in zip(shared.linears, shapes, strict=True)
        )
        yield f"  stage {shared.stage}: {names}"
    if len(block.inputs) > 12:
        yield f"  ... and {len(block.inputs) - 12} more"
    yield "scales can be absorbed exactly in"
    for group in block.balance[:8]:
        yield f"  {group.producer} -> {', '.join(group.consumers[:4])}{' ...' if len(group.consumers) > 4 else ''}"
    for reason in block.unbalanced:
        yield f"  not in {reason}"
    if quantized is not None:
        yield from _quantized(reader, quantized[1], device)


def _quantized(reader: CheckpointReader, schemes: Schemes, device: str) -> Iterator[str]:
    """Schemes, and which kernel each would run on with bfloat16 activations."""
    groups: dict[str, list[str]] = {}
    for name, (scheme, shape) in schemes.items():
        reordered = f"{name}.group_index" in reader.infos
        query = KernelQuery.of(scheme, shape, torch.bfloat16, resolve_device(device).type, reordered)
        kernel = select(query)
        why = "; ".join(f"not {k}: {r}" for k, r in refusals(query, kernel).items())
        groups.setdefault(f"{scheme}, kernel {kernel.name}" + (f" ({why})" if why else ""), []).append(name)
    yield f"{len(schemes)} quantized linears"
    for text, names in groups.items():
        yield f"  {len(names)} x {text}: {summary(names)}"
