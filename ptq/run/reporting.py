"""From a finished walk to its record: per-linear numbers, sizes, evaluations, and the files that show them."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from calibration.distributed import Processes
from calibration.memory import peak_rss_bytes, rss_bytes
from calibration.model.checkpoint import write_atomically
from calibration.model.opening import fingerprint
from calibration.progress import Progress
from calibration.record import REPORT_FILE, TIMINGS_FILE, Evaluation, LinearRecord, RunRecord, Timings
from calibration.recorded import LeftFacts
from calibration.text.crops import TokenBatches
from calibration.versions import versions
from calibration.walk.walk import Walk
from ptq.committed import SATURATED
from ptq.evaluation import evaluate
from ptq.formats.registry import Format
from ptq.planning.job import Job
from ptq.planning.plan import Plan
from ptq.report import card, html, markdown
from ptq.session import SINGLE_FILE

REPORTS = (REPORT_FILE, "report.md", "report.html", "README.md", TIMINGS_FILE)


class Stopwatch:
    """Wall time by stage, and memory from here on."""

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.base_rss = rss_bytes()
        self.stages: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        before = time.perf_counter()
        yield
        self.stages[name] = round(self.stages.get(name, 0.0) + time.perf_counter() - before, 3)

    def timings(self, device: str, resumed_from: int, processes: Processes) -> Timings:
        return Timings(
            seconds=round(time.perf_counter() - self.started, 3),
            stages=self.stages,
            peak_rss_bytes=peak_rss_bytes(),
            base_rss_bytes=self.base_rss,
            device=device,
            threads=torch.get_num_threads(),
            resumed_from=resumed_from,
            processes=processes.size,
            wire_bytes=processes.moved,
        )


@dataclass(frozen=True)
class Outcome:
    """A job that was carried out, up to files that were written and read back.

    Attributes:
        plan: as it was carried out: passes may have chosen schemes.
        format: as written (GPTQ settles on version 1 or 2).
        written: bytes of all tensors.
        verified: linears that were read back and compared.
        tokens: calibration windows, or None where no pass needed any.
    """

    job: Job
    plan: Plan
    walk: Walk
    format: Format
    written: int
    verified: int
    tokens: TokenBatches | None


def linear_records(walk: Walk, plan: Plan) -> tuple[LinearRecord, ...]:
    """One record per quantized linear, from what the walk wrote beside each block."""
    records = []
    planned = {linear.name: linear for linear in plan.layout.quantized}
    for index in range(plan.spec.n_blocks):
        for name, entry in walk.finished.linears(index).items():
            linear = planned[name]
            assert linear.scheme is not None
            records.append(
                LinearRecord(
                    name=linear.name,
                    block=index,
                    shape=linear.shape,
                    scheme=str(linear.scheme),
                    bits_per_weight=plan.layout.bits_per_weight(linear),
                    weight_error=entry["errors"]["weight"],
                    relative_error=entry["errors"].get("output"),
                    notes=entry["notes"],
                )
            )
    return tuple(records)


def left_in_float(job: Job, plan: Plan) -> tuple[LeftFacts, ...]:
    """What stayed in float, by reason."""
    reasons = Counter((linear.why, "linears of the blocks") for linear in plan.layout.left)
    entries: list[LeftFacts] = [{"what": what, "why": why, "count": n} for (why, what), n in sorted(reasons.items())]
    blocks, chosen = plan.spec.blocks + ".", plan.layout.outside
    outside = sum(not n.startswith(blocks) for n in job.reader.infos) - len(chosen)
    why = "not asked for with --embeddings or --head" if chosen else "embeddings, norms and head stay as they are"
    entries.append({"what": "tensors outside the blocks", "why": why, "count": outside})
    routers = sum(len(plan.spec.block(i).routers) for i in range(plan.spec.n_blocks))
    if routers:
        entries.append({"what": "routers", "why": "small and sensitive", "count": routers})
    return tuple(entries)


def evaluations(job: Job, folder: Path, progress: Progress) -> tuple[Evaluation, ...]:
    """The result against the float model on ``--eval``; both numbers come from the same windows."""
    dataset = job.options.evaluate
    if dataset is None:
        return ()
    result = evaluate(
        folder,
        dataset=dataset,
        seq_len=job.seq_len,
        reference=job.folder,
        device=job.options.device,
        trust_remote_code=job.options.trust_remote_code,
        max_windows=job.options.eval_windows,
        progress=progress,
    )
    assert result.divergence is not None
    reference = Evaluation(
        model="float",
        protocol=result.protocol,
        perplexity=result.divergence.reference_perplexity,
        nll=result.nll - result.divergence.delta_nll * result.protocol.tokens_scored,
        words=result.words,
        bytes=result.bytes,
        windows=result.windows,
    )
    return (reference, result)


def write_reports(outcome: Outcome, folder: Path, watch: Stopwatch, resumed: int, progress: Progress) -> RunRecord:
    """Evaluate if asked, then write report.json, report.md, report.html, README.md and timings.json into ``folder``.

    Args:
        resumed: blocks that were finished before this run.
    """
    job = outcome.job
    with watch("evaluate"):
        scores = evaluations(job, folder / SINGLE_FILE if outcome.format.name == "gguf" else folder, progress)
    progress.stage("report", len(REPORTS))
    record = run_record(outcome, scores)
    counts = {entry.name: entry.notes[SATURATED] for entry in record.linears if SATURATED in entry.notes}
    if counts:
        progress.message(
            f"{sum(map(int, counts.values()))} steps of {len(counts)} linears ({next(iter(counts))} first) are at the "
            "ends of what 16 bits hold, 2^-24 and 65280: these weights are cut off or lose digits; rescale the model"
        )
    written_files = [*folder.glob("*.safetensors"), *folder.glob("*.gguf")]
    files = {p.name: p.stat().st_size for p in sorted(written_files)}
    texts = {
        REPORT_FILE: record.to_json(),
        "report.md": markdown.render(record),
        "report.html": html.render(record),
        "README.md": card.model_card(
            record, job.name if job.origin == "hub" else f"./{job.name}", files, card.facts_of(job.folder)
        ),
        TIMINGS_FILE: watch.timings(str(job.device), resumed, outcome.walk.processes).to_json(),
    }
    assert texts.keys() == set(REPORTS)
    for name, text in texts.items():
        write_atomically(folder / name, text.encode("utf-8"))
        progress.advance(name)
    return record


def run_record(outcome: Outcome, scores: tuple[Evaluation, ...]) -> RunRecord:
    """Everything about a run that is the same whenever it is repeated."""
    job, plan, fmt, tokens = outcome.job, outcome.plan, outcome.format, outcome.tokens
    return RunRecord(
        model={
            "name": job.name,
            "source": job.origin,
            "architecture": plan.spec.family,
            "parameters": sum(i.numel for i in job.reader.infos.values()),
            "dtype": plan.layout.dtype,
            "fingerprint": fingerprint(job.reader),
            "bytes": plan.sizes.float_bytes,
        },
        recipe={**plan.recipe.to_json(), "command": job.options.command},
        calibration=tokens.source if tokens else {},
        result={
            "format": fmt.name,
            "format_reason": plan.format_reason,
            "bytes": outcome.written,
            "quantized_bytes": plan.sizes.quantized_bytes,
            "bits_per_weight": plan.sizes.bits_per_weight,
            "quantized_linears": len(plan.layout.quantized),
            "quantized_weights": plan.sizes.quantized_weights,
            "forward_passes": plan.sizes.forwards,
            "loads_in": fmt.loads_in(plan.layout),
            "verified": outcome.verified,
            "outside": {linear.name: str(linear.scheme) for linear in plan.layout.outside},
        },
        linears=linear_records(outcome.walk, plan),
        left=left_in_float(job, plan),
        evaluations=scores,
        versions=versions(),
    )
