"""The steps of ``ptq sparsify``, of both packages: open, check, calibrate, copy, write."""

from __future__ import annotations

import math
import shutil
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import torch

from calibration.distributed import Processes
from calibration.errors import ToolkitError
from calibration.model.checkpoint import disk_errors
from calibration.model.contents import checkpoint_files
from calibration.model.opening import fingerprint
from calibration.progress import Progress
from calibration.text.crops import TokenBatches
from calibration.walk.cost import Work
from calibration.walk.passes import Pass
from ptq.devices import evaluation_dtype
from ptq.evaluation import logits_of
from ptq.linears import float_linears
from ptq.planning.outlook import Outlook, outlook, scoring, walk_outlook, whole_model_bytes
from ptq.planning.rates import rates_of
from ptq.planning.source import BATCH_TOKENS, Source, TextOptions, open_source
from ptq.run.agreement import refuse_other_models, tell_idle
from ptq.runtime.dequantized import float_weights
from ptq.runtime.load import load_model
from ptq.session import Session
from ptq.sparse.methods import Target
from sparsity.budget import ROUNDS, Profile, choose
from sparsity.coverage import with_bytes_skipped
from sparsity.files import SETTINGS_FILE, TENSORS_FILE, Sparsity, site_tensors
from sparsity.gate import GatePass
from sparsity.job import Base, calibrate, check_plan, write
from sparsity.masking import mask_model
from sparsity.rules import settings_of
from sparsity.sites import Site

NOT_COPIED = ("plan.json", SETTINGS_FILE, TENSORS_FILE)


@dataclass(frozen=True)
class SparsifyOptions(TextOptions):
    """Calibration text and where forward passes run; and goals instead of a target.

    Attributes:
        skip_bytes: share of the bytes of all linears of the blocks to be skipped per token.
        max_increase: relative increase of the perplexity that is allowed, 0.01 for one per cent; measured on windows of
            ``search_text``, or where there is none on other windows of the calibration text.
    """

    samples: int = 64
    skip_bytes: float | None = None
    max_increase: float | None = None
    search_text: str | None = None

    def check_goals(self, target: Target) -> None:
        """Refuse more than one goal.

        Raises:
            ToolkitError: see above.
        """
        if sum(goal is not None for goal in (target, self.skip_bytes, self.max_increase)) > 1:
            fix = "pass one of them"
            raise ToolkitError("--target, --skip-bytes and --max-ppl-increase exclude each other", fix)

    def on(self, dataset: str | None) -> SparsifyOptions:
        """The same on another calibration text."""
        return replace(self, dataset=dataset)


def run_sparsify(
    model: str | Path,
    step: GatePass,
    out: Path,
    options: SparsifyOptions,
    overwrite: bool,
    progress: Progress,
    processes: Processes | None = None,
) -> Sparsity:
    """Thresholds of one method, beside a copy of the checkpoint.

    Args:
        processes: that share the calibration windows; the first one writes, and all get the result.

    Raises:
        ToolkitError, PlanError: whatever can be refused; ``out`` is then not there.
    """
    processes = processes or Processes()
    source = open_source(model, options)
    session = Session(out)
    if processes.first:
        session.check(overwrite, resume=False, source=source.folder, resumable=False)
    step, walked = _checked(source, step)
    _check_shared(walked, processes)
    source.tell(progress)
    reader, spec = source.reader, source.spec
    tokens = source.windows(progress)
    if options.max_increase is not None:
        held_out = source.windows(progress, seed=options.seed + 1, dataset=options.search_text)
    facts = {"calibration": tokens.source, "method": step.name, "settings": settings_of(step)}
    forward = f"{source.dtype} on {source.device.type}, {source.batch_size} sequences at a time"
    refuse_other_models(processes, source.folder, {**facts, "forward": forward}, options.trust_remote_code)
    tell_idle(processes, -(-len(tokens) // source.batch_size), progress)
    if processes.first:
        session.begin({"sparsify": fingerprint(reader), "method": step.name}, resume=False)
    processes.barrier()
    with session.unless_done() if processes.first else nullcontext():
        gates = calibrate(
            Base(float_weights(reader, spec), source.config, spec),
            walked,
            tokens,
            session.blocks,
            dtype=source.dtype,
            device=source.device,
            batch_size=source.batch_size,
            progress=progress,
            processes=processes,
        )
        reader.close()
        processes.mind_first_only()
        if not processes.first:
            return cast(Sparsity, processes.agree_at_the_end(None))
        choice = None
        if options.max_increase is not None:
            progress.stage("search", ROUNDS)
            choice = choose(gates, spec, options.max_increase, Increase(source, held_out, progress))
            gates = site_tensors(choice.sites)
        _copy(source.folder, session.partial)
        sparsity = write(session.partial, [step], gates, tokens.source, source.provenance, choice)
        session.finish()
    processes.agree_at_the_end(sparsity)
    return sparsity


def _check_shared(walked: Pass, processes: Processes) -> None:
    """Refuse what several processes cannot share."""
    if processes.size > 1 and isinstance(walked, Profile):
        raise ToolkitError(
            f"--max-ppl-increase: {walked.step.name} is searched for in one process",
            "run the command without torchrun or accelerate launch, or give a --target",
        )


def _copy(folder: Path, partial: Path) -> None:
    """The files of the checkpoint but those that are made anew."""
    with disk_errors(partial):
        for path in checkpoint_files(folder):
            if path.name not in NOT_COPIED:
                target = partial / path.relative_to(folder)
                target.parent.mkdir(exist_ok=True)
                shutil.copyfile(path, target)


def _checked(source: Source, step: GatePass) -> tuple[GatePass, Pass]:
    """The step with the target that its options ask for, and the pass that is calibrated.

    Raises:
        ToolkitError, PlanError: whatever headers and the text rule out.
    """
    options, spec = source.options, source.spec
    assert isinstance(options, SparsifyOptions)
    if options.skip_bytes is not None:
        step = with_bytes_skipped(step, options.skip_bytes, source.reader.infos, spec)
    walked = step if options.max_increase is None else Profile(step)
    check_plan(walked, spec, source.config, options.samples * source.seq_len)
    source.check_text()
    return step, walked


def plan_sparsify(
    model: str | Path, step: GatePass, out: Path | None, options: SparsifyOptions, overwrite: bool
) -> Outlook:
    """What `run_sparsify` would take; nothing is written.

    Raises:
        ToolkitError, PlanError: whatever it would be refused for.
    """
    source = open_source(model, options)
    if out is not None:
        Session(out).look(overwrite, resume=False, source=source.folder, resumable=False)
    step, walked = _checked(source, step)
    source.check_length()
    infos = float_weights(source.reader, source.spec).infos
    linears = list(float_linears(source.spec, infos))
    rates = rates_of(source.device, source.dtype)
    blocks, peak = walk_outlook(source, (walked,), linears, infos)
    seconds, size = {"blocks": blocks}, sum(path.stat().st_size for path in checkpoint_files(source.folder))
    if options.max_increase is not None:
        once = scoring(source, linears, options.samples * source.seq_len, infos)
        seconds["search"] = rates.seconds(once * (ROUNDS + 1.0))
        peak = max(peak, whole_model_bytes(source, infos))
    seconds["copy"] = rates.seconds(Work(read=2.0 * size, written=float(size), hashed=float(size)))
    return outlook(f"sparsify {step.name}", source, seconds, peak, size, infos=infos)


class Increase:
    """Sites -> relative increase of the perplexity on some windows, with masks on all positions but the first."""

    def __init__(self, source: Source, tokens: TokenBatches, progress: Progress) -> None:
        where, trust = source.device, source.options.trust_remote_code
        dtype = evaluation_dtype(source.options.dtype, where)
        loaded = load_model(source.folder, dtype=dtype, device=where, trust_remote_code=trust)
        self._model, self._logits = loaded.model, logits_of(loaded, where)
        self._spec, self._tokens, self._progress = source.spec, tokens, progress
        self._batch = max(1, BATCH_TOKENS // tokens.seq_len)
        self._dense = self._mean_nll()

    def __call__(self, sites: tuple[Site, ...]) -> float:
        masks = mask_model(self._model, self._spec, sites)
        try:
            found = math.expm1(self._mean_nll() - self._dense)
        finally:
            masks.remove()
        self._progress.advance(f"perplexity {found:+.2%}")
        return found

    @torch.no_grad()
    def _mean_nll(self) -> float:
        """Nats per token, float32 log-softmax, the first token of a window not scored."""
        total = 0.0
        for ids in self._tokens.batches(self._batch):
            logits = self._logits(ids)[:, :-1].float().flatten(0, 1)
            total += float(torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten(), reduction="sum"))
        return total / (len(self._tokens) * (self._tokens.seq_len - 1))
