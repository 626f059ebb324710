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
from ptq.analysis.summary import summarize
from ptq.analysis.weights import weight_records
from ptq.devices import parse_dtype, resolve_device
from ptq.evaluation import context_length, default_dataset
from ptq.export.formats import format_of
from ptq.numerics.softmax import SoftmaxRule
from ptq.report import analysis_html, analysis_markdown
from ptq.reporting import versions
from ptq.runtime.dequantized import float_weights
from ptq.runtime.explicit_attention import exchanged_softmax, unsupported
from ptq.runtime.load import checkpoint_dtype
from ptq.session import Session

CHANNELS_FILE = "channels.safetensors"
BATCH_TOKENS = 2048


@dataclass(frozen=True)
class AnalysisOptions:
    """Text and where forward passes run; as in `ptq.job.Options`."""

    dataset: str | None = None
    samples: int = 32
    seq_len: int = 512
    seed: int = 0
    device: str = "auto"
    dtype: str = "auto"
    trust_remote_code: bool = False
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
    dataset = o.dataset or default_dataset(folder)
    tokens = model_tokens(folder, config, dataset, o.samples, seq_len, o.seed, o.trust_remote_code)
    text = _token_texts(folder, dataset, o.trust_remote_code)
    session.begin({"analyze": fingerprint(reader)}, resume=False)
    with session.unless_done():
        subject = Subject(float_weights(reader, spec), config, spec, dtype, device)
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
        )
        reader.close()
        save_tensors(session.partial / CHANNELS_FILE, found.ranges)
        write_report(record, session.partial)
        session.finish()
    return record


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
