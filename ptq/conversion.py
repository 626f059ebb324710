"""Change the format of a quantized checkpoint without quantizing again."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from calibration.errors import PlanError, ToolkitError, unknown_value
from calibration.model.checkpoint import CheckpointReader
from calibration.model.opening import fingerprint, locate, open_model
from calibration.progress import Progress, Silent
from ptq.formats.adapter import FOLDER, adapter_problems, base_of, read_adapter, without_low_rank, write_adapter
from ptq.formats.reading import quantized_linears, read_linear
from ptq.formats.registry import FORMATS, Format
from ptq.formats.write import copy_small_files, outside_blocks, verify_checkpoint, write_checkpoint
from ptq.linears import ModelLayout, PlannedLinear
from ptq.planning.plan import other_linears
from ptq.quantized import QuantizedTensor
from ptq.session import Session


def export_model(
    model: str | Path,
    *,
    format: str,
    out: str | Path,
    adapter: bool = False,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Format:
    """Write a quantized checkpoint in another format: the same codes, scales and zero points, laid out anew.

    Args:
        adapter: low-rank parts go into ``out/adapter`` as a PEFT LoRA adapter, and the rest is written without them.

    Returns:
        The format as written (GPTQ settles on version 1 or 2).

    Raises:
        ToolkitError: the input is not quantized or not readable, or the output format cannot hold it.
    """
    progress = progress or Silent()
    if format not in FORMATS:
        raise unknown_value("--format", format, FORMATS)
    folder = locate(model)
    session = Session(Path(out))
    session.check(overwrite, resume=False, source=folder, resumable=False)
    reader, config, spec = open_model(folder, trust_remote_code)
    found = quantized_linears(reader)
    if found is None:
        raise ToolkitError(
            f"{folder}: a float checkpoint", "run `ptq quantize` on it; export changes the format of quantized ones"
        )
    if read_adapter(folder):
        raise ToolkitError(
            f"{folder}: has a low-rank adapter beside it, which would be lost",
            "export from the native checkpoint that it came from",
        )
    source_format, schemes = found
    linears = []
    reordered, parts = False, dict[str, None]()
    for index in range(spec.n_blocks):
        prefix, block = spec.prefix(index), spec.block(index)
        experts = {name: shared.expert for shared in block.inputs for name in shared.linears}
        for name in (prefix + n for n in block.linears):
            bias = f"{name}.bias" in reader.infos
            scheme, shape = schemes.get(name, (None, (0, 0)))
            if scheme is None:
                rows = reader.infos[f"{name}.weight"].shape
                shape = (rows[1], rows[0]) if spec.conv1d else (rows[0], rows[1])
            else:
                q = read_linear(reader, source_format, name, scheme, shape)
                reordered |= q.group_index is not None
                parts.update(dict.fromkeys(q.parts))
                part_bits = 8 * sum(part.nbytes for part in q.parts.values())
                del q
            linears.append(
                PlannedLinear(
                    name=name,
                    block=index,
                    shape=shape,
                    scheme=scheme,
                    why="" if scheme else "float in the source",
                    conv1d=spec.conv1d,
                    expert=experts[name[len(prefix) :]],
                    bias=bias,
                    part_bits=part_bits if scheme else 0,
                )
            )
        reader.close()
    floats = [i.dtype for n, i in reader.infos.items() if i.dtype in (torch.bfloat16, torch.float16, torch.float32)]
    plain = {k: v for k, v in reader.config.items() if k != "quantization_config"}
    dtype = str(plain.get("dtype") or plain.get("torch_dtype") or str(floats[0])).removeprefix("torch.")
    others = tuple(other_linears(config, spec))
    layout = ModelLayout(plain, tuple(linears), others, spec.blocks, reordered, dtype, tuple(parts))
    problems = adapter_problems(layout) if adapter else []
    whole, layout = layout, base_of(layout) if adapter else layout
    problems += FORMATS[format].check(layout)
    if problems:
        raise PlanError(problems)
    session.begin({"export": fingerprint(reader), "format": format}, resume=False)
    everything = QuantizedBlocks(reader, source_format, whole).blocks
    blocks = without_low_rank(everything) if adapter else everything
    with session.unless_done():
        progress.stage("export", (1 + adapter) * len(layout.quantized))
        outside = outside_blocks(reader, spec.blocks)
        fmt, _ = write_checkpoint(blocks, outside, layout, FORMATS[format], session.partial, progress.advance)
        if adapter:
            write_adapter(everything, session.partial / FOLDER, progress.advance)
        copy_small_files(folder, session.partial)
        progress.stage("verify", len(layout.quantized))
        verify_checkpoint(blocks, fmt, session.partial, progress.advance)
        reader.close()
        session.finish()
    return fmt


class QuantizedBlocks:
    """A quantized checkpoint as a source of blocks, see `ptq.formats.write.Source`."""

    def __init__(self, reader: CheckpointReader, fmt: Format, layout: ModelLayout) -> None:
        self.reader = reader
        self.format = fmt
        self.layout = layout

    def blocks(self) -> Iterator[tuple[dict[str, QuantizedTensor], dict[str, torch.Tensor]]]:
        """Block by block: quantized linears and the remaining tensors, by full name."""
        for index in sorted({linear.block for linear in self.layout.linears}):
            quantized = {
                linear.name: read_linear(self.reader, self.format, linear.name, linear.scheme, linear.shape)
                for linear in self.layout.quantized
                if linear.block == index
            }
            taken = {f"{name}.{s}" for name in quantized for s in self.format.suffixes}
            prefix = f"{self.layout.blocks}.{index}."
            others = {n: self.reader.tensor(n) for n in self.reader.infos if n.startswith(prefix) and n not in taken}
            yield quantized, others
            self.reader.close()
