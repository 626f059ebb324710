"""Public functions that answer questions about a model: `analyze`, `study_calibration`, `study_sensitivity`,
`predict`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from calibration.errors import ToolkitError
from calibration.joining import joined
from calibration.progress import Silent
from ptq.analysis import job as analysis
from ptq.analysis.job import AnalysisOptions
from ptq.analysis.softmax_sweep import sweep_options
from ptq.api.inputs import Display, Model, Text, checkpoint, display, text_file
from ptq.planning.job import Options
from ptq.report import calibration_markdown, sensitivity_markdown
from ptq.study import calibration, sensitivity
from ptq.study.calibration import CalibrationOptions, CalibrationStudy
from ptq.study.forecast import Forecast, forecast
from ptq.study.sensitivity import SensitivityStudy

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ptq.analysis.record import AnalysisRecord

WEIGHT_SCHEMES = ("w2a16", "w3a16", "w4a16")
DATASETS = ("wikitext2", "c4", "generated", "random")


def analyze(
    model: Model,
    *,
    out: str | Path,
    dataset: Text | None = None,
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
    tokenizer: PreTrainedTokenizerBase | None = None,
    progress: Display | None = None,
    command: str = "",
) -> AnalysisRecord:
    """Find what makes a model hard to quantize, float or quantized: outliers of activations and weights.

    Args:
        model, dataset, samples, seq_len, seed, device, dtype, tokenizer, progress, command: as for `quantize`.
        out: folder for report.html, report.md, report.json and channels.safetensors.
        clipped_softmax: also try other softmaxes in the finished model, which holds it whole in memory; with ``gated``
            gates and every head shut by itself too, with ``softmax`` more of one's own, and single heads on the first
            ``head_windows`` windows.
        sensitivity: weight schemes: also what rounding each linear alone costs, on ``probe_windows`` windows.
        try_advice: also carry out the advised recipes and score them; holds the model in memory.
        windows: that softmaxes and recipes are scored on; the others set ranges and calibrate.
        resume: go on with an interrupted analysis whose recipes are carried out: finished ones are kept.

    Raises:
        ToolkitError, PlanError: whatever can be refused; ``out`` is then not there.
    """
    sweep = sweep_options(clipped_softmax, gated, softmax, head_windows)
    with (
        joined(device) as processes,
        checkpoint(model, tokenizer) as folder,
        text_file(dataset) as text,
    ):
        options = AnalysisOptions(
            dataset=text,
            samples=samples,
            seq_len=seq_len,
            seed=seed,
            device=device,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            softmax=sweep,
            sensitivity=tuple(sensitivity),
            try_advice=try_advice,
            windows=windows,
            probe_windows=probe_windows,
            command=command,
        )
        return analysis.analyze(
            folder,
            options,
            out=out,
            overwrite=overwrite,
            resume=resume,
            progress=display(progress) if processes.first else Silent(),
            processes=processes,
        )


def study_calibration(
    model: str | Path,
    *,
    out: str | Path,
    method: str = "gptq",
    scheme: str | None = None,
    datasets: Sequence[str | Path] = DATASETS,
    samples: Sequence[int] = (8, 32, 128),
    seq_lens: Sequence[int] = (2048,),
    seeds: int = 3,
    evaluate: str | Path | None = None,
    window: int | None = None,
    windows: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    overwrite: bool = False,
    resume: bool = False,
    trust_remote_code: bool = False,
    progress: Display | None = None,
) -> CalibrationStudy:
    """How much the choice of calibration text matters: perplexity over data sets, sizes, lengths and seeds.

    Args:
        method, scheme: of `quantize`.
        datasets, samples, seq_lens: every combination is run with each of ``seeds`` seeds.
        evaluate: text to score on, in ``windows`` windows (None: all) of ``window`` tokens (None: the longest of
            ``seq_lens``).
        dtype: of scoring.
        resume: go on with an interrupted study.

    Raises:
        ToolkitError, PlanError: whatever one of the runs would be refused for, before the first of them.
    """
    for name, value in (("--seeds", seeds), ("--window", window), ("--windows", windows)):
        if value is not None and value < 1:
            raise ToolkitError(f"{name} {value}: less than 1", f"give {name} a positive number")
    options = CalibrationOptions(
        datasets=tuple(map(str, datasets)),
        samples=tuple(samples),
        seq_lens=tuple(seq_lens),
        seeds=seeds,
        method=method,
        scheme=scheme,
        evaluate=None if evaluate is None else str(evaluate),
        window=window,
        windows=windows,
        device=device,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
    )
    render = calibration_markdown.render
    return calibration.study_calibration(
        model, options, out, render, overwrite=overwrite, resume=resume, progress=display(progress)
    )


def study_sensitivity(
    model: Model,
    *,
    out: str | Path,
    schemes: Sequence[str] = WEIGHT_SCHEMES,
    dataset: Text | None = None,
    samples: int = 32,
    seq_len: int = 2048,
    seed: int = 0,
    windows: int = 4,
    device: str = "auto",
    dtype: str = "auto",
    overwrite: bool = False,
    trust_remote_code: bool = False,
    tokenizer: PreTrainedTokenizerBase | None = None,
    progress: Display | None = None,
) -> SensitivityStudy:
    """What rounding each linear alone costs: the layer objective, the divergence of the model, and their ranks.

    Args:
        model, dataset, samples, seq_len, seed, device, dtype, tokenizer, progress: as for `quantize`.
        schemes: of weights.
        windows: the first of the windows, on which the divergence of all linears, and of a few alone, is measured.

    Raises:
        ToolkitError, PlanError: whatever can be refused, before a weight is read; a disk without room for hidden
            states.
    """
    if windows < 1:
        raise ToolkitError(f"--windows {windows}: less than 1", "give --windows a positive number")
    with joined(device) as processes, checkpoint(model, tokenizer) as folder, text_file(dataset) as text:
        options = Options(text, samples, seq_len, seed, device, dtype, trust_remote_code=trust_remote_code)
        return sensitivity.study_sensitivity(
            folder,
            schemes,
            options,
            windows,
            out,
            sensitivity_markdown.render,
            overwrite=overwrite,
            progress=display(progress) if processes.first else Silent(),
            processes=processes,
        )


def predict(
    runs: Sequence[str | Path],
    *,
    params: float | None = None,
    tokens: float | None = None,
    bits: Sequence[float] = (2, 3, 4, 5, 6, 8),
) -> Forecast:
    """What rounding to so many bits will add to the loss, by the precision scaling law (Kumar et al. 2024, arXiv
    2411.04330).

    Args:
        runs: what the law is fitted to: folders of `quantize` (with ``evaluate``), or ``.csv`` tables with the columns
            params, tokens, bits, delta.
        params: parameters without embeddings; None: those of the runs' model.
        tokens: that the model was trained on.
        bits: stored bits per weight; with scales: w4a16-g128 has 4.125.

    Raises:
        ToolkitError: numbers that are missing or not positive, runs that cannot be used.
    """
    return forecast([Path(run) for run in runs], params, tokens, bits)
