"""From a checkpoint to the record of its outliers: one walk over its blocks, and the parts that are asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calibration.errors import ToolkitError
from calibration.model.checkpoint import save_tensors, write_atomically
from calibration.model.opening import context_length, fingerprint, forward_dtype, load_tokenizer, locate, open_model
from calibration.progress import Progress, Silent
from calibration.record import REPORT_FILE
from calibration.text.samples import default_dataset, model_tokens
from calibration.versions import versions
from ptq.analysis.advice import advise
from ptq.analysis.observe import Subject, observe
from ptq.analysis.parts import Parts, check_parts
from ptq.analysis.record import AnalysisRecord
from ptq.analysis.softmax_sweep import SweepOptions
from ptq.analysis.summary import summarize
from ptq.analysis.trial import verdicts
from ptq.devices import parse_dtype, resolve_device
from ptq.formats.registry import format_of
from ptq.planning.job import Options
from ptq.report import analysis_html, analysis_markdown
from ptq.runtime.dequantized import float_weights
from ptq.runtime.load import checkpoint_dtype
from ptq.session import Session

CHANNELS_FILE = "channels.safetensors"


@dataclass(frozen=True)
class AnalysisOptions:
    """Text and where forward passes run, as in `ptq.planning.job.Options`; and what is looked at beside outliers.

    Attributes:
        softmax: other softmaxes to try, or None.
        sensitivity: schemes to round every linear alone with.
        try_advice: carry out what is advised.
        windows: of the text, that softmaxes and recipes are scored on; the others set ranges and calibrate.
        probe_windows: of the text, that linears rounded alone are judged on.
    """

    dataset: str | None = None
    samples: int = 32
    seq_len: int = 512
    seed: int = 0
    device: str = "auto"
    dtype: str = "auto"
    trust_remote_code: bool = False
    softmax: SweepOptions | None = None
    sensitivity: tuple[str, ...] = ()
    try_advice: bool = False
    windows: int = 16
    probe_windows: int = 4
    command: str = ""


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
    text_options = Options(
        dataset, o.samples, seq_len, o.seed, o.device, o.dtype, trust_remote_code=o.trust_remote_code
    )
    parts = Parts(folder, spec, text_options, o.windows, o.probe_windows, device, fmt is not None)
    fit = check_parts(parts, config, o.softmax, o.sensitivity, o.try_advice)
    tokens = model_tokens(folder, config, dataset, o.samples, seq_len, o.seed, o.trust_remote_code)
    text = _token_texts(folder, dataset, o.trust_remote_code)
    session.begin({"analyze": fingerprint(reader)}, resume=False)
    with session.unless_done():
        softmax = None if o.softmax is None else parts.softmax(tokens, o.softmax, progress)
        found = observe(Subject(float_weights(reader, spec), config, spec, dtype, device), tokens, text, progress)
        sensitivity, edge = parts.sensitivity(fit, o.sensitivity, tokens, progress)
        advice = advise(found.sites, found.weights)
        trials = parts.trials(advice, tokens, session.partial / "try", progress) if o.try_advice else ()
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
            advice=advice,
            command=o.command,
            versions=versions(),
            softmax=softmax,
            sensitivity=sensitivity,
            frontier=edge,
            trials=trials,
            verdicts=tuple(verdicts(trials)),
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
