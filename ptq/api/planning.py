"""Public functions that say beforehand what a command would take: `plan_time`, `plan_fit`, `plan_sparsify`,
`plan_analyze`. Nothing is written."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ptq.analysis import job as analysis
from ptq.analysis.job import AnalysisOptions
from ptq.analysis.softmax_sweep import sweep_options
from ptq.api.inputs import Display, display
from ptq.fitting import outlook as fitting
from ptq.fitting.budget import parse_budget
from ptq.planning.duration import Duration, expected
from ptq.planning.job import Job, Options
from ptq.planning.outlook import Outlook
from ptq.run.one_block import measured_duration
from ptq.sparse.methods import Target, sparsifier
from ptq.sparsification import SparsifyOptions
from ptq.sparsification import plan_sparsify as plan_sparsify_options


def plan_time(job: Job, *, measure: bool = False, progress: Display | None = None) -> Duration:
    """How long `quantize` would take, in seconds by phase.

    Rates of this machine (matrix products in the dtype of the run, memory, disk) are measured once, in about a second;
    with processes that ``torchrun`` has started their number counts.

    Args:
        job: what `plan` returned.
        measure: run the first block for real, in a temporary folder, and scale from it.

    Raises:
        ToolkitError: as the run would, where a block is run.
    """
    return measured_duration(job, display(progress)) if measure else expected(job)


def plan_fit(
    model: str | Path,
    *,
    size: str | int | None = None,
    bpw: float | None = None,
    max_ppl_increase: str | float | None = None,
    out: str | Path | None = None,
    method: str = "gptq",
    format: str | None = None,
    schemes: Sequence[str] = (),
    dataset: str | Path | None = None,
    samples: int = 128,
    seq_len: int = 2048,
    seed: int = 0,
    device: str = "auto",
    dtype: str = "auto",
    overwrite: bool = False,
    trust_remote_code: bool = False,
) -> Outlook:
    """What `fit` with these arguments would take.

    Raises:
        ToolkitError, PlanError: whatever `fit` would be refused for before it measures.
    """
    size, max_ppl_increase = (None if v is None else str(v) for v in (size, max_ppl_increase))
    budget = parse_budget(size, bpw, max_ppl_increase)
    options = Options(_text(dataset), samples, seq_len, seed, device, dtype, trust_remote_code=trust_remote_code)
    return fitting.plan_fit(model, budget, method, format, schemes, options, _path(out), overwrite)


def plan_sparsify(
    model: str | Path,
    *,
    method: str,
    out: str | Path | None = None,
    target: Target = None,
    skip_bytes: float | None = None,
    max_ppl_increase: float | None = None,
    search_text: str | Path | None = None,
    dataset: str | Path | None = None,
    samples: int = 64,
    seq_len: int = 2048,
    seed: int = 0,
    device: str = "auto",
    dtype: str = "auto",
    overwrite: bool = False,
    trust_remote_code: bool = False,
) -> Outlook:
    """What `sparsify` with these arguments would take.

    Raises:
        ToolkitError, PlanError: whatever `sparsify` would be refused for before its work.
    """
    options = SparsifyOptions(
        _text(dataset),
        samples,
        seq_len,
        seed,
        device,
        dtype,
        trust_remote_code,
        skip_bytes,
        max_ppl_increase,
        _text(search_text),
    )
    options.check_goals(target)
    return plan_sparsify_options(model, sparsifier(method, target), _path(out), options, overwrite)


def plan_analyze(
    model: str | Path,
    *,
    out: str | Path | None = None,
    dataset: str | Path | None = None,
    samples: int = 32,
    seq_len: int = 512,
    seed: int = 0,
    clipped_softmax: bool = False,
    gated: bool = False,
    softmax: Sequence[str] = (),
    head_windows: int = 2,
    sensitivity: Sequence[str] = (),
    try_advice: bool = False,
    windows: int = 16,
    probe_windows: int = 4,
    device: str = "auto",
    dtype: str = "auto",
    overwrite: bool = False,
    resume: bool = False,
    trust_remote_code: bool = False,
) -> Outlook:
    """What `analyze` with these arguments would take.

    Raises:
        ToolkitError, PlanError: whatever `analyze` would be refused for before its work.
    """
    options = AnalysisOptions(
        _text(dataset),
        samples,
        seq_len,
        seed,
        device,
        dtype,
        trust_remote_code,
        sweep_options(clipped_softmax, gated, softmax, head_windows),
        tuple(sensitivity),
        try_advice,
        windows,
        probe_windows,
    )
    return analysis.plan_analyze(model, options, out=_path(out), overwrite=overwrite, resume=resume)


def _path(value: str | Path | None) -> Path | None:
    return None if value is None else Path(value)


def _text(value: str | Path | None) -> str | None:
    return None if value is None else str(value)
