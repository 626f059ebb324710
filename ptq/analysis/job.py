"""From a checkpoint to the record of its outliers: one walk over its blocks, and the parts that are asked for."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from calibration.distributed import Processes
from calibration.errors import ToolkitError
from calibration.launcher import launched
from calibration.model.checkpoint import save_tensors, write_atomically
from calibration.model.contents import check_weights, small_digest
from calibration.model.opening import fingerprint, load_tokenizer
from calibration.progress import Progress, Silent
from calibration.record import REPORT_FILE
from calibration.text.crops import TokenBatches
from calibration.versions import versions
from ptq.analysis.accepted import refusal_of
from ptq.analysis.advice import advise
from ptq.analysis.observe import Subject, batch_size_of, observe
from ptq.analysis.outlook import outlook_of
from ptq.analysis.parts import Parts, check_parts
from ptq.analysis.record import AnalysisRecord
from ptq.analysis.softmax_sweep import SweepOptions
from ptq.analysis.summary import summarize
from ptq.analysis.trial import verdicts
from ptq.fitting.job import Fit
from ptq.formats.registry import format_of
from ptq.planning.job import Options
from ptq.planning.outlook import Outlook
from ptq.planning.source import Source, TextOptions, open_source
from ptq.report import analysis_html, analysis_markdown
from ptq.run.agreement import refuse_other_models, tell_idle
from ptq.runtime.dequantized import float_weights
from ptq.session import Session
from sparsity.files import SETTINGS_FILE

CHANNELS_FILE = "channels.safetensors"
TRIALS = "try"
"""The folder of recipes that are carried out, below DIR.partial."""


@dataclass(frozen=True)
class AnalysisOptions(TextOptions):
    """Text and where forward passes run; and what is looked at beside outliers.

    Attributes:
        softmax: other softmaxes to try, or None.
        sensitivity: schemes to round every linear alone with.
        try_advice: carry out what is advised.
        windows: of the text, that softmaxes and recipes are scored on; the others set ranges and calibrate.
        probe_windows: of the text, that linears rounded alone are judged on.
    """

    samples: int = 32
    seq_len: int = 512
    softmax: SweepOptions | None = None
    sensitivity: tuple[str, ...] = ()
    try_advice: bool = False
    windows: int = 16
    probe_windows: int = 4
    command: str = ""


def analyze(
    model: str | Path,
    options: AnalysisOptions,
    *,
    out: str | Path,
    overwrite: bool = False,
    resume: bool = False,
    progress: Progress | None = None,
    processes: Processes | None = None,
) -> AnalysisRecord:
    """Look at a float or quantized checkpoint and write reports into ``out``.

    Recipes that are carried out are kept in ``out.partial`` when they are finished, and ``resume`` goes on from there;
    the walk over the blocks, one forward pass, is made again.

    Args:
        processes: that share the windows of that walk, and sensitivities; the first one writes, and all get the
            record.

    Raises:
        ToolkitError: whatever can be refused; ``out`` is then not there.
    """
    o, progress, processes = options, progress or Silent(), processes or Processes()
    source = open_source(model, o)
    _check_shared(o, source, processes)
    reader, spec = source.reader, source.spec
    session = Session(Path(out))
    _check_resume(o, resume)
    if processes.first:
        session.check(overwrite, resume, source=source.folder, resumable=o.try_advice)
    parts, fit = _checked(source)
    source.tell(progress)
    if (source.folder / SETTINGS_FILE).exists():
        progress.message("activation thresholds are not applied: the dense model is analyzed")
    tokens = source.windows(progress)
    text = _token_texts(source.folder, source.dataset, o.trust_remote_code)
    subject = Subject(float_weights(reader, spec), source.config, spec, source.dtype, source.device)
    forward = f"{source.dtype} on {source.device.type}"
    facts = {"text": tokens.source, "forward": forward, "sensitivity": [*o.sensitivity, o.probe_windows]}
    refuse_other_models(processes, source.folder, facts, o.trust_remote_code)
    tell_idle(processes, -(-len(tokens) // batch_size_of(tokens)), progress)
    if not processes.first:
        observe(subject, tokens, text, progress, processes)
        parts.sensitivity(fit, o.sensitivity, tokens, progress, processes)
        processes.mind_first_only()
        return cast(AnalysisRecord, processes.agree_at_the_end(None))
    session.begin(_identity(source, tokens) if o.try_advice else {"analyze": fingerprint(reader)}, resume)
    session.keep(frozenset({TRIALS}))
    with nullcontext() if o.try_advice else session.unless_done():
        softmax = None if o.softmax is None else parts.softmax(tokens, o.softmax, progress)
        found = observe(subject, tokens, text, progress, processes)
        sensitivity, edge = parts.sensitivity(fit, o.sensitivity, tokens, progress, processes)
        processes.mind_first_only()
        refusal = {} if parts.quantized else {"refusal": refusal_of(source.folder, _run_options(source))}
        advice = advise(found.sites, found.weights, **refusal)
        trials = parts.trials(advice, tokens, session.partial / TRIALS, progress) if o.try_advice else ()
        record = AnalysisRecord(
            model=_model_record(source),
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
    processes.agree_at_the_end(record)
    return record


def _check_shared(options: AnalysisOptions, source: Source, processes: Processes) -> None:
    """Refuse what several processes cannot share: all but the walk and sensitivities, and these on GPUs."""
    asked = {
        "--clipped-softmax": options.softmax is not None,
        "--try": options.try_advice,
        f"--device {source.device.type}": source.device.type != "cpu",
    }
    named = [option for option, wanted in asked.items() if wanted]
    if processes.size > 1 and named:
        fix = "run the command without torchrun or accelerate launch"
        raise ToolkitError(f"{named[0]}: not shared by several processes", fix)


def _check_resume(options: AnalysisOptions, resume: bool) -> None:
    if resume and not options.try_advice:
        raise ToolkitError("--resume: only recipes that --try carries out are kept", "leave --resume out")


def _checked(source: Source) -> tuple[Parts, Fit | None]:
    """What the parts of an analysis need, and the plan of sensitivities where they are wanted.

    Raises:
        ToolkitError, PlanError: whatever headers and the text rule out.
    """
    o = source.options
    assert isinstance(o, AnalysisOptions)
    quantized = format_of(source.reader.config) is not None
    parts = Parts(
        source.folder, source.spec, _run_options(source), o.windows, o.probe_windows, source.device, quantized
    )
    source.check_text()
    return parts, check_parts(parts, source.config, o.softmax, o.sensitivity, o.try_advice)


def plan_analyze(
    model: str | Path, options: AnalysisOptions, *, out: Path | None, overwrite: bool, resume: bool
) -> Outlook:
    """What `analyze` would take; nothing is written. Parts that depend on what is found are named, not counted.

    Raises:
        ToolkitError, PlanError: whatever it would be refused for.
    """
    source = open_source(model, options)
    _check_resume(options, resume)
    _check_shared(options, source, Processes(*launched()))
    if out is not None:
        Session(out).look(overwrite, resume, source=source.folder, resumable=options.try_advice)
    _checked(source)
    source.check_length()
    return outlook_of(
        source,
        {
            "--clipped-softmax": options.softmax is not None,
            "--sensitivity": bool(options.sensitivity),
            "--try": options.try_advice,
        },
    )


def _identity(source: Source, tokens: TokenBatches) -> dict[str, Any]:
    """Everything that decides what the recipes come to."""
    options = dataclasses.asdict(source.options)
    return {
        "analyze": {key: value for key, value in options.items() if key != "command"},
        "weights": check_weights(source.reader),
        "files": small_digest(source.folder),
        "versions": versions(),
        "text": tokens.source["fingerprint"],
    }


def _run_options(source: Source) -> Options:
    """For runs that parts of the analysis make on the same text."""
    o = source.options
    return Options(
        source.dataset, o.samples, source.seq_len, o.seed, o.device, o.dtype, trust_remote_code=o.trust_remote_code
    )


def _model_record(source: Source) -> dict[str, Any]:
    fmt = format_of(source.reader.config)
    return {
        "name": source.name,
        "architecture": source.spec.family,
        "dtype": str(source.dtype).removeprefix("torch."),
        "fingerprint": fingerprint(source.reader),
        "blocks": source.spec.n_blocks,
        "format": fmt.name if fmt else None,
    }


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
