"""How long a run takes, by phase: what its work consists of, over rates that were measured on this machine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from calibration.launcher import launched
from calibration.model.classes import text_config
from calibration.model.headers import TensorInfo
from calibration.text.generated import BATCH, GENERATED
from calibration.text.random_tokens import RANDOM
from calibration.walk.cost import Work, total
from calibration.walk.proof import needs_proof
from calibration.walk.statistics import Gram
from ptq.linears import float_linears
from ptq.planning.block_time import block_shapes, walking
from ptq.planning.job import Job
from ptq.planning.rates import Rates, rates_of
from ptq.planning.source import Source
from ptq.planning.texts import CALIBRATED, scored_tokens, text_bytes

LOGITS = 8  # fresh values per logit of a model that is scored beside another
START = 0.4  # seconds of the class of the model, and of what is imported on the way
TURNED = 30  # fresh values per value of a tensor outside the blocks that a pass makes anew


@dataclass(frozen=True)
class Duration:
    """Seconds that are expected.

    Attributes:
        seconds: phase -> seconds, in order.
        processes: that share the work.
        unknown: texts whose length is not known before they are fetched, and that are not counted.
        measured: of one block, the seconds that it took and those that were expected; None where none was run.
    """

    seconds: Mapping[str, float]
    processes: int = 1
    unknown: tuple[str, ...] = ()
    measured: tuple[float, float] | None = None

    @property
    def total(self) -> float:
        return sum(self.seconds.values())

    def to_json(self) -> dict[str, Any]:
        """For ``--json``."""
        found: dict[str, Any] = {"seconds": dict(self.seconds), "total_seconds": self.total}
        if self.measured is not None:
            found |= {"block_seconds": self.measured[0], "block_seconds_expected": self.measured[1]}
        return {**found, "processes": self.processes, "not_counted": list(self.unknown)}


def front(source: Source, infos: Mapping[str, TensorInfo]) -> Work:
    """The embedding of all windows."""
    outside = sum(info.numel for name, info in infos.items() if source.spec.block_of(name) is None)
    states = source.options.samples * source.seq_len * int(text_config(source.config).hidden_size)
    return Work(read=2.0 * outside, fresh=float(outside + states), calls=1000.0)


def checking(source: Source) -> Work:
    """Every byte read, hashed and looked at."""
    size = source.reader.total_bytes
    values = sum(info.numel for info in source.reader.infos.values())
    return Work(read=float(size), hashed=float(size), values=2.0 * values)


def expected(job: Job, processes: int | None = None) -> Duration:
    """Seconds of every phase of a quantization.

    Args:
        processes: that share the work; None: those that a launcher has started.
    """
    processes = processes or launched()[1]
    rates, passes, dataset = rates_of(job.device, job.dtype), job.plan.recipe.passes, job.options.evaluate
    seconds: dict[str, float] = {}
    unknown: list[str] = []
    if job.plan.needs_data:
        seconds, unknown = preparing(job, rates)
    seconds["check weights"] = START + rates.seconds(checking(job))
    if job.plan.needs_data:
        seconds["embed"] = (1 + needs_proof(passes)) * rates.seconds(front(job, job.reader.infos))
    seconds["blocks"] = sum(block_seconds(job, processes))
    seconds["export"] = rates.seconds(writing(job))
    read_back = Work(read=2.0 * job.plan.sizes.output_bytes, fresh=0.7 * job.plan.sizes.quantized_weights)
    seconds["verify"] = START / 4 + rates.seconds(read_back)
    if dataset is not None:
        tokens = scored_tokens(job, dataset, job.options.eval_windows)
        seconds["evaluate"] = rates.seconds(evaluating(job, tokens))
        unknown += [] if tokens else [dataset]
    return Duration(seconds, processes, tuple(dict.fromkeys(unknown)))


def preparing(source: Source, rates: Rates) -> tuple[dict[str, float], list[str]]:
    """Seconds of the calibration text, and the texts whose length is not known. Text of the model's own is written
    token by token, each of them a pass over all weights."""
    if source.dataset == GENERATED:
        blocks = block_shapes(source, [*float_linears(source.spec, source.reader.infos)], False)
        steps = float(source.seq_len * -(-source.options.samples // BATCH))
        weights = float(sum(info.numel for info in source.reader.infos.values()))
        reading = Work(
            fresh=weights * source.dtype.itemsize / 16, calls=2.0 * sum(b.forward.calls / b.batches for b in blocks)
        )
        return {"write": rates.seconds(total(b.forward for b in blocks) + reading * steps)}, []
    size = text_bytes(source.dataset, CALIBRATED)
    known = size or source.dataset == RANDOM or source.dataset.endswith(".safetensors")
    return {"tokenize": rates.seconds(Work(text=size))}, [] if known else [source.dataset]


def writing(job: Job) -> Work:
    """The files of the format, from finished blocks and what lies outside them."""
    infos, out = job.reader.infos, float(job.plan.sizes.output_bytes)
    outside = sum(info.numel for name, info in infos.items() if job.spec.block_of(name) is None)
    rewritten = {name for p in job.plan.recipe.passes for name in p.outside(job.spec, list(infos))}
    turned = sum(infos[name].numel for name in rewritten if name in infos)
    return Work(read=out, written=out, fresh=float(job.plan.sizes.quantized_weights + outside / 2 + TURNED * turned))


def block_seconds(job: Job, processes: int) -> list[float]:
    """Of every block of a job."""
    passes = job.plan.recipe.passes
    has_gram = any(Gram in p.statistics for p in passes)
    blocks = block_shapes(job, job.plan.layout.linears, has_gram)
    stored = job.plan.sizes.quantized_bytes / len(blocks)
    return walking(job, passes, blocks, rates_of(job.device, job.dtype), processes, stored)


def evaluating(job: Job, tokens: float) -> Work:
    """The float model and the quantized one over a text, in float32 on CPUs, and their logits compared."""
    scored = block_shapes(job, [*float_linears(job.spec, job.reader.infos)], False)
    share = tokens / (job.options.samples * job.seq_len)
    forward = total(block.forward for block in scored) * share
    text = text_config(job.config)
    head = 2.0 * tokens * int(text.vocab_size) * int(text.hidden_size)
    weights = sum(info.numel for info in job.reader.infos.values())
    batches = max(1.0, tokens / 2048)
    unpacking = 2.0 * job.plan.sizes.quantized_weights * batches
    logits = LOGITS * tokens * int(text.vocab_size)
    return Work(
        exact=2 * (forward.products + head),
        fresh=2 * forward.fresh + 3.0 * weights + unpacking + logits,
        calls=2 * forward.calls,
        read=2.0 * weights,
    )
