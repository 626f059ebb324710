"""The calibration study: one model, method and scheme, quantized with many calibration sets and scored on one text.

Protocol of Paglieri et al. 2024 (arXiv 2405.20835): the same number of tokens from every data set, nonsense among them;
the float model's largest activations per channel compared between sets.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from calibration.architectures import ArchitectureSpec
from calibration.errors import ToolkitError, foreign
from calibration.model.checkpoint import write_atomically
from calibration.model.contents import check_weights, small_digest
from calibration.model.opening import load_tokenizer
from calibration.model.reading import read_json
from calibration.model.typed import built
from calibration.progress import Part, Progress, Silent
from calibration.record import Evaluation, Protocol
from calibration.scoring.perplexity import score
from calibration.scoring.windows import Scoring
from calibration.shown import Shown
from calibration.text.corpora import load_corpus
from calibration.text.crops import TokenBatches
from calibration.text.encoding import EncodedText, encode_text, too_short
from calibration.versions import versions
from calibration.walk.capture import accumulate
from calibration.walk.statistics import AbsMax
from ptq.devices import evaluation_dtype
from ptq.evaluation import EVAL_TOKENS, logits_of, window_ticks
from ptq.planning.job import Job, Options, prepare
from ptq.planning.source import BATCH_TOKENS, cut_to_context, default_dataset
from ptq.run.pipeline import run as run_job
from ptq.runtime.load import Loaded, load_model
from ptq.session import Session
from ptq.sparse.masks import attach_masks
from ptq.study.spread import CalibrationRun, Overlap, overlaps

STUDY_FILE = "calibration.json"
RUNS_FILE = "runs.json"


@dataclass(frozen=True)
class CalibrationOptions:
    """What the study varies, and what it holds fixed.

    Attributes:
        datasets, samples, seq_lens: every combination is run with each of ``seeds`` seeds (0 and up).
        method, scheme: of `ptq.quantize`.
        evaluate: text to score on; None: wikitext2, or the demo's own text for the demo.
        window, windows: tokens per scoring window (None: the longest of ``seq_lens``), and how many (None: all).
    """

    datasets: tuple[str, ...]
    samples: tuple[int, ...] = (8, 32, 128)
    seq_lens: tuple[int, ...] = (2048,)
    seeds: int = 3
    method: str = "gptq"
    scheme: str | None = None
    evaluate: str | None = None
    window: int | None = None
    windows: int | None = None
    device: str = "auto"
    dtype: str = "auto"
    trust_remote_code: bool = False


@dataclass(frozen=True, repr=False)
class CalibrationStudy(Shown):
    """Everything measured. ``protocol`` and ``float_perplexity`` hold for all runs."""

    model: str
    method: str
    scheme: str
    protocol: Protocol
    float_perplexity: float
    runs: tuple[CalibrationRun, ...]
    overlaps: tuple[Overlap, ...]

    def facts(self) -> Mapping[str, object]:
        found: dict[str, list[float]] = {}
        for run in self.runs:
            found.setdefault(f"{run.dataset}, {run.samples} x {run.seq_len}", []).append(run.perplexity)
        settings = {name: f"{min(p):.4f} .. {max(p):.4f} over {len(p)} seeds" for name, p in found.items()}
        recipe = f"{self.method} {self.scheme}"
        return {"model": self.model, "method": recipe, "float": f"{self.float_perplexity:.4f}", **settings}

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1, sort_keys=True) + "\n"


@dataclass(frozen=True)
class Scorer:
    """The float model and the text that quantized checkpoints are scored on, against it."""

    text: EncodedText
    scoring: Scoring
    device: torch.device
    dtype: torch.dtype
    reference: Loaded

    def evaluation(self, folder: Path, trust_remote_code: bool, progress: Progress) -> Evaluation:
        """A checkpoint's perplexity and divergence."""
        loaded = load_model(folder, dtype=self.dtype, device=self.device, trust_remote_code=trust_remote_code)
        loaded, _ = attach_masks(loaded)
        logits, reference = logits_of(loaded, self.device), logits_of(self.reference, self.device)
        ticks = window_ticks(progress)
        return score(
            logits, self.text, self.scoring, model="quantized", path=loaded.path, reference_fn=reference, progress=ticks
        )


def study_calibration(
    model: str | Path,
    options: CalibrationOptions,
    out: str | Path,
    render: Callable[[CalibrationStudy], str],
    *,
    overwrite: bool = False,
    resume: bool = False,
    progress: Progress | None = None,
) -> CalibrationStudy:
    """Quantize once per setting and score every result; write ``calibration.json`` and ``calibration.md`` into ``out``.

    Finished runs are kept in ``out.partial`` at once, and ``resume`` goes on from there.

    Args:
        render: the study as Markdown.

    Raises:
        ToolkitError: whatever one of the runs would be refused for, before the first of them.
    """
    progress = progress or Silent()
    session = Session(Path(out))
    session.check(overwrite, resume)
    jobs = _jobs(model, options)
    first, dtype = jobs[0], evaluation_dtype(options.dtype, jobs[0].device)
    session.check(overwrite, resume, first.reader.folder)
    text, scoring, notes = _text(first, options, dtype)
    for note in dict.fromkeys([*(note for job in jobs for note in job.notes), *notes]):
        progress.message(note)
    windows = [job.windows(progress) for job in jobs]
    identity = {
        "weights": check_weights(first.reader),
        "files": small_digest(first.reader.folder),
        "versions": versions(),
        "recipe": first.plan.recipe.to_json(),
        "study": dataclasses.asdict(options),
        "text": text.fingerprint,
    }
    session.begin(identity, resume)
    trust = options.trust_remote_code
    reference = load_model(first.reader.folder, dtype=dtype, device=first.device, trust_remote_code=trust)
    scorer = Scorer(text, scoring, first.device, dtype, reference)
    runs = _measure(jobs, windows, scorer, session, progress)
    base = score(logits_of(reference, first.device), text, scoring, progress=window_ticks(Part(progress, "float")))
    progress.stage("compare texts", 1)
    study = CalibrationStudy(
        model=first.name,
        method=first.plan.recipe.method,
        scheme=str(first.plan.recipe.rules[-1].scheme),
        protocol=base.protocol,
        float_perplexity=base.perplexity,
        runs=tuple(runs),
        overlaps=overlaps(_peaks_by_dataset(reference, jobs, windows)),
    )
    progress.advance("channels")
    write_atomically(session.partial / STUDY_FILE, study.to_json().encode())
    write_atomically(session.partial / "calibration.md", render(study).encode())
    (session.partial / RUNS_FILE).unlink(missing_ok=True)
    session.finish()
    return study


def _jobs(model: str | Path, options: CalibrationOptions) -> list[Job]:
    """One prepared run per setting, seeds last, or the reason why one of them cannot be."""
    if options.seeds < 1 or not (options.datasets and options.samples and options.seq_lens):
        raise ToolkitError("nothing to study", "name at least one data set, number of samples and length, and one seed")
    jobs = []
    for dataset, samples, seq_len in itertools.product(options.datasets, options.samples, options.seq_lens):
        for seed in range(options.seeds):
            settings = Options(
                dataset=dataset,
                samples=samples,
                seq_len=seq_len,
                seed=seed,
                device=options.device,
                trust_remote_code=options.trust_remote_code,
            )
            jobs.append(prepare(model, method=options.method, scheme=options.scheme, format="native", options=settings))
    if not jobs[0].plan.needs_data:
        raise ToolkitError(f"--method {options.method}: uses no calibration text", "study gptq or awq, for example")
    return jobs


def _text(job: Job, options: CalibrationOptions, dtype: torch.dtype) -> tuple[EncodedText, Scoring, tuple[str, ...]]:
    """The scoring text, its windows, and what to say of them."""
    folder = job.reader.folder
    corpus = load_corpus(options.evaluate or default_dataset(folder), "score")
    text = encode_text(corpus, load_tokenizer(folder, options.trust_remote_code))
    window, notes = cut_to_context(options.window or max(options.seq_lens), job.config, "--window")
    notes = notes if options.window else ()  # of a cut --seq-len the jobs tell
    scoring = Scoring(
        window=window,
        batch_size=max(1, EVAL_TOKENS // window),
        max_windows=options.windows,
        dtype=str(dtype).removeprefix("torch."),
    )
    if len(text.ids) < window:
        raise too_short(text.dataset, len(text.ids), window)
    return text, scoring, notes


def _measure(
    jobs: Sequence[Job], windows: Sequence[TokenBatches], scorer: Scorer, session: Session, progress: Progress
) -> list[CalibrationRun]:
    """Quantize and score what no earlier try, and no other seed with the same windows, has."""
    runs: list[CalibrationRun] = []
    finished = session.partial / RUNS_FILE
    if finished.exists():
        fix = "pass --overwrite without --resume to start again"
        with foreign(f"{finished}: damaged", fix):
            runs = [built(CalibrationRun, entry) for entry in read_json(finished, fix)["runs"]]
    done = {(run.dataset, run.samples, run.seq_len, run.fingerprint): run for run in runs}
    runs = []
    for number, (job, tokens) in enumerate(zip(jobs, windows, strict=True), 1):
        o, source = job.options, tokens.source
        key = (job.dataset, o.samples, job.seq_len, str(source["fingerprint"]))
        if key not in done:
            part = Part(progress, f"run {number} of {len(jobs)}")
            run_job(job, session.blocks / "run", overwrite=True, tokens=tokens, progress=part)
            found = scorer.evaluation(session.blocks / "run", o.trust_remote_code, part)
            assert found.divergence is not None
            kl, delta = found.divergence.kl_mean, found.divergence.delta_nll
            done[key] = CalibrationRun(*key[:3], o.seed, int(source["tokens"]), key[3], found.perplexity, kl, delta)
        runs.append(dataclasses.replace(done[key], seed=o.seed))
        write_atomically(finished, json.dumps({"runs": [dataclasses.asdict(r) for r in done.values()]}).encode())
    return runs


def _peaks_by_dataset(
    reference: Loaded, jobs: Sequence[Job], windows: Sequence[TokenBatches]
) -> dict[str, dict[str, torch.Tensor]]:
    """Of every data set's largest calibration set with the first seed."""
    largest: dict[str, TokenBatches] = {}
    for job, tokens in zip(jobs, windows, strict=True):
        kept = largest.get(job.dataset)
        if kept is None or tokens.input_ids.numel() > kept.input_ids.numel():
            largest[job.dataset] = tokens
    plan = jobs[0].plan
    widths = {linear.name: linear.shape[1] for linear in plan.layout.linears}
    return {name: channel_peaks(reference.model, plan.spec, widths, tokens) for name, tokens in largest.items()}


@torch.no_grad()
def channel_peaks(
    model: Any, spec: ArchitectureSpec, widths: Mapping[str, int], tokens: TokenBatches
) -> dict[str, torch.Tensor]:
    """The largest |x| per channel, float32 ``[in]``, of every distinct input of the blocks' linears, by the full name
    of the first linear that reads it. ``widths``: full name -> input channels."""
    found: dict[str, AbsMax] = {}
    hooks = {}
    device = next(model.parameters()).device
    for index in range(spec.n_blocks):
        for shared in spec.block(index).inputs:
            name = spec.prefix(index) + shared.linears[0]
            path = spec.prefix(index) + spec.module_name(shared.linears[0])
            found[name] = AbsMax(widths[name], device)
            hooks[path] = [found[name]]
    with accumulate(model, hooks):
        for ids in tokens.batches(max(1, BATCH_TOKENS // tokens.seq_len)):
            model.base_model(ids.to(device), use_cache=False)
    return {name: statistic.maximum.cpu() for name, statistic in found.items()}
