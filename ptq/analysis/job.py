"""From a checkpoint to the record of its outliers: one walk over its blocks, one block in memory."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from calibration.architectures import ArchitectureSpec
from calibration.capture import watching
from calibration.checkpoint import TensorSource, save_tensors, write_atomically
from calibration.errors import ToolkitError
from calibration.float_blocks import FloatBlocks
from calibration.memory import return_freed
from calibration.models import fingerprint, forward_dtype, load_tokenizer, locate, open_model
from calibration.progress import Progress, Silent
from calibration.record import REPORT_FILE
from calibration.samples import model_tokens
from calibration.skeleton import Skeleton
from calibration.text import TokenBatches
from ptq.analysis.advice import advise
from ptq.analysis.heads import HeadObserver
from ptq.analysis.record import AnalysisRecord, HeadRecord, SiteRecord, WeightRecord
from ptq.analysis.sites import SiteObserver
from ptq.analysis.softmax_record import SoftmaxSweep
from ptq.analysis.softmax_sweep import SweepOptions, sweep_softmax
from ptq.analysis.summary import summarize
from ptq.analysis.weights import weight_records
from ptq.devices import parse_dtype, resolve_device
from ptq.evaluation import context_length, default_dataset, evaluation_dtype
from ptq.export.formats import format_of
from ptq.numerics.softmax import SoftmaxRule
from ptq.report import analysis_html, analysis_markdown
from ptq.reporting import versions
from ptq.runtime.attention import has_interface
from ptq.runtime.dequantized import float_weights
from ptq.runtime.explicit_attention import exchanged_softmax, parse_softmax, unsupported
from ptq.runtime.load import checkpoint_dtype, load_model
from ptq.session import Session

CHANNELS_FILE = "channels.safetensors"
BATCH_TOKENS = 2048


@dataclass(frozen=True)
class AnalysisOptions:
    """Text and where forward passes run; as in `ptq.pipeline.Options`. ``softmax``: other softmaxes to try, or None."""

    dataset: str | None = None
    samples: int = 32
    seq_len: int = 512
    seed: int = 0
    device: str = "auto"
    dtype: str = "auto"
    trust_remote_code: bool = False
    softmax: SweepOptions | None = None
    command: str = ""


@dataclass(frozen=True)
class Subject:
    """The model that is looked at: its tensors as float weights, whatever the checkpoint stores."""

    source: TensorSource
    config: Any
    spec: ArchitectureSpec
    dtype: torch.dtype
    device: torch.device


@dataclass
class Findings:
    """What one walk found. ``ranges``: per site, by full names, what `CHANNELS_FILE` holds. ``no_heads``: why
    attention was not looked at."""

    sites: list[SiteRecord]
    weights: list[WeightRecord]
    heads: list[HeadRecord]
    ranges: dict[str, torch.Tensor]
    no_heads: str | None


@torch.no_grad()
def observe(subject: Subject, tokens: TokenBatches, text: Callable[[int], str], progress: Progress) -> Findings:
    """Walk over the blocks once.

    Args:
        text: token id to its text.
    """
    skeleton = Skeleton(subject.config, subject.spec, subject.dtype, subject.device)
    batch_size = max(1, min(len(tokens), BATCH_TOKENS // tokens.seq_len))
    skeleton.check_complete(subject.source.infos)
    blocks = FloatBlocks(subject.source, skeleton, batch_size=batch_size)
    found = Findings([], [], [], {}, unsupported(skeleton.model))
    heads = HeadObserver(tokens, batch_size, text)
    watched = exchanged_softmax(skeleton.model, SoftmaxRule(), heads.look) if found.no_heads is None else nullcontext()
    with watched:
        for segment, states in blocks.observe(tokens, progress):
            observer = SiteObserver(segment, len(tokens))
            heads.begin(segment)
            with watching(segment.module, observer.watches()):
                for i, ids in enumerate(tokens.batches(batch_size)):
                    observer.ids = ids
                    heads.expect(i, states.batches[i])
                    states.batches[i] = states.output(segment.module, segment.index, i)
                    progress.advance(f"block {segment.index + 1}/{subject.spec.n_blocks}")
            _check_finite(segment.prefix, observer)
            found.sites += observer.records(text)
            found.weights += weight_records(segment)
            found.heads += heads.statistics.records(segment.index)
            found.ranges.update(_ranges(segment.prefix, observer))
    return found


def _ranges(prefix: str, observer: SiteObserver) -> dict[str, torch.Tensor]:
    found = {}
    for site, s in observer.statistics.items():
        ranges = {"low": s.low, "high": s.high, "abs_mean": s.abs_mean().float(), "first_token_max": s.first_max}
        name = f"{prefix}{site.role.replace(' ', '_')}"
        found.update({f"{name}.{key}": value.cpu() for key, value in ranges.items()})
    return found


def _check_finite(prefix: str, observer: SiteObserver) -> None:
    """Refuse what no number describes; the fourth powers of float32 values above 1e9 are infinite too."""
    for site, s in observer.statistics.items():
        if not bool(torch.isfinite(s.abs_sum).all() and torch.isfinite(s.later.m4).all()):
            raise ToolkitError(
                f"{prefix[:-1]}: NaN, Inf or values above 1e9 in its {site.role}",
                "the model overflows on this text: try --dtype float32, or check the checkpoint",
            )


def analyze(
    model: str | Path,
    *,
    out: str | Path,
    overwrite: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> AnalysisRecord:
    """Look at a float or quantized checkpoint and write reports into ``out``; see `AnalysisOptions`.

    Raises:
        ToolkitError: whatever can be refused; ``out`` is then not there.
    """
    o = AnalysisOptions(**options)
    progress = progress or Silent()
    if o.samples < 1 or o.seq_len < 2:
        raise ToolkitError(
            f"--samples {o.samples} --seq-len {o.seq_len}: too small", "use at least 1 sample of 2 tokens"
        )
    folder = locate(model)
    session = Session(Path(out))
    session.check(overwrite, resume=False, source=folder, resumable=False)
    reader, config, spec = open_model(folder, o.trust_remote_code)
    fmt = format_of(reader.config)
    stored, device = checkpoint_dtype(reader, spec), resolve_device(o.device)
    dtype = forward_dtype(stored, device) if o.dtype == "auto" else parse_dtype(o.dtype)
    seq_len = min(o.seq_len, context_length(config))
    if o.softmax is not None:
        _check_sweep(o.softmax, config, o.samples, seq_len)
    dataset = o.dataset or default_dataset(folder)
    tokens = model_tokens(folder, config, dataset, o.samples, seq_len, o.seed, o.trust_remote_code)
    text = _token_texts(folder, dataset, o.trust_remote_code)
    session.begin({"analyze": fingerprint(reader)}, resume=False)
    with session.unless_done():
        subject = Subject(float_weights(reader, spec), config, spec, dtype, device)
        sweep = None if o.softmax is None else _sweep(folder, spec, tokens, o, device, progress)
        found = observe(subject, tokens, text, progress)
        record = AnalysisRecord(
            model={
                "name": folder.name if Path(model).is_dir() else str(model),
                "architecture": spec.family,
                "dtype": str(dtype).removeprefix("torch."),
                "fingerprint": fingerprint(reader),
                "blocks": spec.n_blocks,
                "format": fmt.name if fmt else None,
            },
            calibration=tokens.source,
            summary=summarize(found.sites, spec.n_blocks),
            sites=tuple(found.sites),
            weights=tuple(found.weights),
            heads=tuple(found.heads),
            no_heads=found.no_heads,
            advice=advise(found.sites, found.weights),
            command=o.command,
            versions=versions(),
            softmax=sweep,
        )
        reader.close()
        save_tensors(session.partial / CHANNELS_FILE, found.ranges)
        write_report(record, session.partial)
        session.finish()
    return record


def _check_sweep(options: SweepOptions, config: Any, samples: int, seq_len: int) -> None:
    """Refuse a sweep before the model is loaded."""
    if not has_interface(config):
        reason = f"{config.model_type}: its attention is not on transformers' attention interface"
        raise ToolkitError(f"--clipped-softmax: {reason}", "leave --clipped-softmax out")
    if options.windows < 1 or options.head_windows < 0 or options.head_windows > options.windows:
        raise ToolkitError(
            f"--windows {options.windows} --head-windows {options.head_windows}: not both from 1 window up",
            "score at least 1 window, and no more for single heads (0 leaves heads out)",
        )
    if samples <= options.windows:
        raise ToolkitError(
            f"--samples {samples} --windows {options.windows}: no window is left to set the ranges of 8-bit inputs",
            f"pass --windows {max(samples // 2, 1)}, or more --samples",
        )
    for text in options.settings:
        parse_softmax(text, seq_len)


def _sweep(
    folder: Path, spec: ArchitectureSpec, tokens: TokenBatches, o: AnalysisOptions, device: torch.device, p: Progress
) -> SoftmaxSweep:
    """The one part that holds the whole model; gone again afterwards."""
    assert o.softmax is not None
    dtype = evaluation_dtype(o.dtype, device)
    loaded = load_model(folder, dtype=dtype, device=device, trust_remote_code=o.trust_remote_code)
    held = sum(t.nbytes for t in (*loaded.model.parameters(), *loaded.model.buffers()))
    p.message(f"--clipped-softmax holds the whole model: {held / 1e9:.2f} GB in {dtype}")
    found = sweep_softmax(loaded.model, spec, tokens, o.softmax, loaded.format is not None, p)
    del loaded
    return_freed()
    return found


def write_report(record: AnalysisRecord, folder: Path) -> None:
    """``report.json``, ``report.md`` and ``report.html``."""
    write_atomically(folder / REPORT_FILE, record.to_json().encode())
    write_atomically(folder / "report.md", analysis_markdown.render(record).encode())
    write_atomically(folder / "report.html", analysis_html.render(record).encode())


def _token_texts(folder: Path, dataset: str, trust_remote_code: bool) -> Callable[[int], str]:
    """Token id to its text; to its number where the text came as ids and the folder may have no tokenizer."""
    if Path(dataset).suffix == ".safetensors":
        return lambda token: f"#{token}"
    tokenizer = load_tokenizer(folder, trust_remote_code)
    return lambda token: str(tokenizer.decode([token]))
