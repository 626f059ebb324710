"""Change the format of a quantized checkpoint without quantizing again, and make a GGUF file of a float one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from calibration.architectures import ArchitectureSpec
from calibration.errors import PlanError, ToolkitError, unknown_value
from calibration.model.checkpoint import CheckpointReader
from calibration.model.opening import fingerprint, locate, open_model, weights_fingerprint
from calibration.model.skeleton import Skeleton, build_model
from calibration.progress import Progress, Silent
from calibration.shown import Shown
from ptq.formats.adapter import FOLDER, adapter_problems, base_of, read_adapter, without_low_rank, write_adapter
from ptq.formats.checks import NATIVE
from ptq.formats.gguf import Gguf, check_target
from ptq.formats.gguf_file import check_file
from ptq.formats.native import WEIGHTS_KEY
from ptq.formats.reading import Schemes, check_finite, quantized_linears, read_linear
from ptq.formats.registry import FORMATS, Format, stored_names
from ptq.formats.write import Origin, copy_small_files, outside_blocks, verify_checkpoint, write_checkpoint
from ptq.linears import ModelLayout, PlannedLinear, float_linears
from ptq.planning.outside_plan import default_outside, outside_problems, quantized_outside, rounded_outside
from ptq.planning.plan import other_linears
from ptq.planning.recipe import FLOAT
from ptq.quantized import QuantizedTensor
from ptq.scheme import QuantScheme
from ptq.session import Session
from sparsity.files import Sparsity, load_sparsity, save_sparsity

GGUF = Gguf.name
QUANTIZE = "run `ptq quantize` on it: its formats hold models that GGUF does not"


@dataclass(frozen=True, repr=False)
class Exported(Shown):
    """A checkpoint in another format.

    Attributes:
        format: as written (GPTQ settles on version 1 or 2).
        linears: quantized ones, all read back and compared; none where the weights were written as floats, which in
            a GGUF file are read back and compared, too.
    """

    out: Path
    format: str
    linears: int

    def facts(self) -> Mapping[str, object]:
        compared = {"read back and compared": self.linears} if self.linears else {}
        return {"written to": self.out, "format": self.format, **compared}


def export_model(
    model: str | Path,
    *,
    format: str,
    out: str | Path,
    adapter: bool = False,
    metadata: Path | None = None,
    embeddings: str | None = None,
    head: str | None = None,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Exported:
    """Write a quantized checkpoint in another format: the same codes, scales and zero points, laid out anew. Activation
    thresholds go with it. Of a float checkpoint, and of a GGUF file as the floats that it stands for, only GGUF is
    made: the same floats.

    Args:
        metadata: a GGUF file whose tokenizer a GGUF output takes over.
        embeddings, head: as in `ptq.planning.job.Options`; those of the source where they are quantized there, and
            ``float`` in GGUF files of float checkpoints.
        adapter: low-rank parts go into ``out/adapter`` as a PEFT LoRA adapter, and the rest is written without them.

    Raises:
        ToolkitError: the input is not readable, or float and another format than GGUF is asked for; the output format
            cannot hold it.
    """
    progress = progress or Silent()
    if format not in FORMATS:
        raise unknown_value("--format", format, [*FORMATS, FLOAT])
    check_target(out, format)
    folder = locate(model)
    session = Session(Path(out))
    session.check(overwrite, resume=False, source=folder, resumable=False)
    reader, config, spec = open_model(folder, trust_remote_code, coded=True)
    found = quantized_linears(reader)
    if found is None and format != GGUF:
        raise ToolkitError(
            f"{model}: a float checkpoint",
            "run `ptq quantize` on it; export changes the format of quantized ones, and makes GGUF files of float ones",
        )
    if read_adapter(folder):
        raise ToolkitError(
            f"{model}: has a low-rank adapter beside it, which would be lost",
            "export from the native checkpoint that it came from",
        )
    source_format, schemes = found or (None, {})
    default = FLOAT if found is None else default_outside(format)
    check_rest(reader, config, spec, source_format, schemes)
    layout = quantized_layout(reader, config, spec, source_format, schemes)
    problems = adapter_problems(layout) if adapter else []
    outside = ConvertedOuterTensors(reader, source_format, config, spec, schemes)
    layout = replace(layout, outside=outside.planned(embeddings, head, format, default))
    whole, layout = layout, base_of(layout) if adapter else layout
    problems += FORMATS[format].check(layout)
    if found is None:  # no other format is made of floats
        problems = [replace(problem, fix=QUANTIZE) if problem.fix == NATIVE else problem for problem in problems]
    if problems:
        raise PlanError(problems)
    sparsity = load_sparsity(folder)
    if format == GGUF:
        if sparsity is not None:
            raise ToolkitError(f"{model}: has activation thresholds, for which 'gguf' has no place", NATIVE)
        check_file(folder, layout.config, metadata)
    elif metadata is not None:
        raise ToolkitError(f"--metadata {metadata}: only GGUF files have it", "use --format gguf")
    session.begin({"export": fingerprint(reader), "format": format}, resume=False)
    everything = QuantizedBlocks(reader, source_format, whole).blocks
    blocks = without_low_rank(everything) if adapter else everything
    outer = partial(outside.tensors, layout)
    with session.unless_done():
        whole_work = len(layout.quantized) or len(layout.linears)
        progress.stage("export", (1 + adapter) * whole_work)
        origin = Origin(folder, reader.stored_name, metadata)
        fmt, _ = write_checkpoint(blocks, outer, layout, FORMATS[format], session.partial, origin, progress.advance)
        if adapter:
            write_adapter(everything, session.partial / FOLDER, progress.advance)
        if not session.single:
            copy_small_files(folder, session.partial)
        progress.stage("verify", whole_work + len(layout.outside))
        verified = verify_checkpoint(blocks, outer, fmt, layout, session.partial, progress.advance, reader.stored_name)
        reader.close()
        if sparsity is not None:  # the codes are the same, so the thresholds fit
            move_thresholds(sparsity, session.partial)
        session.finish()
    return Exported(Path(out), fmt.name, verified)


def move_thresholds(sparsity: Sparsity, folder: Path) -> None:
    """Write thresholds beside other files of the weights that they were made for."""
    with CheckpointReader(folder) as written:
        save_sparsity(replace(sparsity, base=weights_fingerprint(written)), folder)


def quantized_layout(
    reader: CheckpointReader,
    config: Any,
    spec: ArchitectureSpec,
    fmt: Format | None,
    schemes: Mapping[str, tuple[QuantScheme, tuple[int, int]]],
) -> ModelLayout:
    """The layout that a quantized checkpoint was written from. Every quantized linear is read once.

    Args:
        fmt, schemes: of `quantized_linears`; None and empty for a float checkpoint.
    """
    linears = []
    reordered, parts, last = False, dict[str, None](), 0
    for linear in float_linears(spec, reader.infos):
        if linear.block != last:
            reader.close()
            last = linear.block
        scheme, shape = schemes.get(linear.name, (None, linear.shape))
        if scheme is None or fmt is None:
            linears.append(replace(linear, why="float in the source"))
            continue
        q = read_linear(reader, fmt, linear.name, scheme, shape)
        reordered |= q.group_index is not None
        parts.update(dict.fromkeys(q.parts))
        part_bits = 8 * sum(part.nbytes for part in q.parts.values())
        linears.append(replace(linear, scheme=scheme, shape=shape, part_bits=part_bits))
    reader.close()
    floats = [i.dtype for i in reader.infos.values() if i.dtype in (torch.bfloat16, torch.float16, torch.float32)]
    plain = {k: v for k, v in reader.config.items() if k not in ("quantization_config", WEIGHTS_KEY)}
    dtype = str(plain.get("dtype") or plain.get("torch_dtype") or str(floats[0])).removeprefix("torch.")
    others = tuple(other_linears(config, spec))
    return ModelLayout(plain, tuple(linears), others, spec.blocks, reordered, dtype, tuple(parts))


def taken_names(fmt: Format | None, linears: Iterable[str]) -> set[str]:
    """Full names of all tensors that quantized linears may have; none for a float checkpoint."""
    return set() if fmt is None else {full for name in linears for full in stored_names(fmt, name).values()}


def check_rest(
    reader: CheckpointReader, config: Any, spec: ArchitectureSpec, fmt: Format | None, schemes: Schemes
) -> None:
    """Refuse a source that lacks a tensor beside those of its quantized linears, or has one that the model class has no
    place for: the copy would lack it, too.

    Raises:
        ToolkitError: names it.
    """
    biases = {bias for name in schemes if (bias := f"{name}.bias") in reader.infos}  # also those that passes added
    taken = taken_names(fmt, schemes) | biases
    rest = {name: info for name, info in reader.infos.items() if name not in taken}
    skeleton = Skeleton(config, spec, torch.float32, torch.device("meta"))
    skeleton.check_complete(rest, {*(f"{name}.weight" for name in schemes), *biases})


class ConvertedOuterTensors:
    """What lies outside the blocks of a quantized checkpoint: floats, and an embedding and head with codes."""

    def __init__(
        self,
        reader: CheckpointReader,
        fmt: Format | None,
        config: Any,
        spec: ArchitectureSpec,
        schemes: Mapping[str, Any],
    ) -> None:
        self._reader, self._format, self._config, self._spec = reader, fmt, config, spec
        self._schemes = {n: known for n, known in schemes.items() if spec.block_of(n) is None}

    def planned(
        self, embeddings: str | None, head: str | None, format_name: str, default: str
    ) -> tuple[PlannedLinear, ...]:
        """Those that the output quantizes, as the source does or as asked.

        Raises:
            ToolkitError: the source's codes cannot be rounded to another scheme, or the format cannot hold them.
        """
        if not self._schemes:
            model = build_model(self._config, self._spec, torch.float32, torch.device("meta"))
            return quantized_outside(self._reader.infos, self._spec, model, embeddings, head, format_name, default)
        if embeddings or head:
            fix = "leave --embeddings and --head out, or quantize the float checkpoint anew"
            raise ToolkitError("--embeddings, --head: the source has them quantized already", fix)
        planned = tuple(PlannedLinear(name, -1, shape, scheme) for name, (scheme, shape) in self._schemes.items())
        problems = [problem for linear in planned for problem in outside_problems(linear, format_name)]
        if problems:
            raise PlanError(problems)
        return planned

    def tensors(self, layout: ModelLayout) -> Iterator[tuple[str, torch.Tensor | QuantizedTensor]]:
        """All of them; codes as they are, and floats rounded where the layout says so."""
        for name, (scheme, shape) in self._schemes.items():
            assert self._format is not None
            yield name, read_linear(self._reader, self._format, name, scheme, shape)
        taken = taken_names(self._format, self._schemes)
        floats = ((n, check_finite(n, t)) for n, t in outside_blocks(self._reader, self._spec, taken))
        yield from rounded_outside(floats, layout)


class QuantizedBlocks:
    """A quantized checkpoint, or a float one, as a source of blocks, see `ptq.formats.write.Source`."""

    def __init__(self, reader: CheckpointReader, fmt: Format | None, layout: ModelLayout) -> None:
        self.reader = reader
        self.format = fmt
        self.layout = layout

    def blocks(self) -> Iterator[tuple[dict[str, QuantizedTensor], dict[str, torch.Tensor]]]:
        """Block by block: quantized linears and the remaining tensors, by full name."""
        for index in sorted({linear.block for linear in self.layout.linears}):
            quantized = {
                linear.name: read_linear(self.reader, self.format, linear.name, linear.scheme, linear.shape)
                for linear in self.layout.quantized
                if linear.block == index and linear.scheme is not None and self.format is not None
            }
            taken = taken_names(self.format, quantized)
            prefix = f"{self.layout.blocks}.{index}."
            others = [n for n in self.reader.infos if n.startswith(prefix) and n not in taken]
            yield quantized, {name: check_finite(name, self.reader.tensor(name)) for name in others}
            self.reader.close()
