"""The main job: plan, walk, export, verify, evaluate, report."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import torch

from calibration.distributed import Processes
from calibration.errors import ToolkitError
from calibration.memory import return_freed
from calibration.model.classes import text_config
from calibration.model.contents import check_weights
from calibration.model.skeleton import Skeleton
from calibration.progress import Progress, Silent
from calibration.record import RunRecord
from calibration.text.crops import TokenBatches
from calibration.walk.passes import Phase
from calibration.walk.proof import needs_proof, prove
from calibration.walk.walk import Walk
from ptq.committed import CommittedBlocks
from ptq.evaluation import check_text
from ptq.formats.gguf import check_target
from ptq.formats.loadable import check_keys
from ptq.formats.write import Origin, copy_small_files, verify_checkpoint, write_checkpoint
from ptq.planning.job import Job
from ptq.planning.memory import tell_short_memory
from ptq.planning.outside_plan import rounded_outside
from ptq.planning.plan import Plan
from ptq.planning.source import is_short_file
from ptq.quantized import QuantizedTensor
from ptq.run.identity import run_identity
from ptq.run.reporting import Outcome, Stopwatch, write_reports
from ptq.run.sharing import agree, walk_of
from ptq.scheme import parse_scheme
from ptq.session import BLOCKS, Session
from sparsity.job import write as write_thresholds


def run(
    job: Job,
    out: str | Path,
    *,
    overwrite: bool = False,
    resume: bool = False,
    progress: Progress | None = None,
    tokens: TokenBatches | None = None,
    processes: Processes | None = None,
) -> RunRecord:
    """Carry out a prepared job and return its record.

    Args:
        tokens: calibration windows, where they have been made already; see `Source.windows`.
        processes: that share the run; this is the first of them.

    Raises:
        ToolkitError: see the message; DIR is then not there, and DIR.partial can be resumed where it is.
    """
    progress, processes = progress or Silent(), processes or Processes()
    watch = Stopwatch()
    session = Session(Path(out))
    tokens = _check(job, session, overwrite, resume, tokens, progress)
    agree(job, tokens, processes, progress)
    progress.stage("check weights", len(job.reader.infos))  # the class of the model is made first, which takes seconds
    skeleton = Skeleton(job.plan.model_config(job.config), job.spec, job.dtype, job.device)
    skeleton.check_complete(job.reader.infos, job.plan.new_biases)
    with watch("check weights"):
        weights = check_weights(job.reader, progress.advance)
    session.begin(run_identity(job, tokens, weights), resume)
    session.keep(frozenset({BLOCKS}))
    walk = walk_of(job, skeleton, session.blocks, processes)
    if needs_proof(job.plan.recipe.passes) and not resume:
        with watch("prove"):
            prove(walk.blocks, progress)
    processes.barrier()
    resumed = walk.finished.count()
    with watch("quantize"):
        walk.run(tokens, progress)
    processes.mind_first_only()
    outcome = _export(job, walk, tokens, session, watch, progress)
    record = write_reports(outcome, session.partial, watch, resumed, progress)
    session.finish()
    processes.agree_at_the_end(record)
    return record


def look(job: Job, out: str | Path, overwrite: bool, resume: bool) -> None:
    """For a plan: refuse what `run` would refuse before its work, and write nothing. Texts of the hub are not fetched,
    and the disk need not be free yet: the plan says what is needed.

    Raises:
        ToolkitError: see above.
    """
    session = Session(Path(out))
    check_target(session.out, job.plan.format.name)
    session.look(overwrite, resume, job.folder)


def look_at_texts(job: Job) -> None:
    """For a plan: refuse texts on this machine that are too short, or whose tokens do not belong to the model.

    Raises:
        ToolkitError: see above.
    """
    options, words = job.options, int(text_config(job.config).vocab_size)
    if options.evaluate is not None and is_short_file(options.evaluate):
        check_text(job.folder, options.evaluate, job.seq_len, words, options.trust_remote_code)
    if job.plan.needs_data:
        job.check_length()


def _check(
    job: Job, session: Session, overwrite: bool, resume: bool, tokens: TokenBatches | None, progress: Progress
) -> TokenBatches | None:
    """Refuse what can be refused before any work, and make the calibration windows, where the plan needs some."""
    check_target(session.out, job.plan.format.name)
    session.check(overwrite, resume, job.folder)
    job.tell(progress)
    _check_disk(session, job.plan)
    tell_short_memory(job.plan, job.device, progress)
    options = job.options
    if options.evaluate is not None:
        words = int(text_config(job.config).vocab_size)
        check_text(job.folder, options.evaluate, job.seq_len, words, options.trust_remote_code)
    return (tokens or job.windows(progress)) if job.plan.needs_data else tokens


def _export(
    job: Job, walk: Walk, tokens: TokenBatches | None, session: Session, watch: Stopwatch, progress: Progress
) -> Outcome:
    """From committed blocks to verified files."""
    committed = {n: e for i in range(job.spec.n_blocks) for n, e in walk.finished.linears(i).items()}
    plan = job.plan.with_schemes({name: parse_scheme(entry["scheme"]) for name, entry in committed.items()})
    layout = plan.layout
    blocks = CommittedBlocks([walk.finished.tensors_path(i) for i in range(job.spec.n_blocks)], layout)

    def outside() -> Iterable[tuple[str, torch.Tensor | QuantizedTensor]]:
        return rounded_outside(walk.blocks.outside.tensors(), layout)

    with watch("export"):
        progress.stage("export", len(layout.quantized))
        origin = Origin(job.folder, job.reader.stored_name, job.options.metadata)
        source = partial(blocks.stored, progress.advance) if plan.format.name == "native" else blocks.blocks
        fmt, written = write_checkpoint(source, outside, layout, plan.format, session.partial, origin, progress.advance)
        job.reader.close()
        return_freed()
        if not session.single:
            copy_small_files(job.folder, session.partial)
    with watch("verify"):
        progress.stage("verify", len(layout.quantized) + len(layout.outside))
        names = job.reader.stored_name
        verified = verify_checkpoint(blocks.blocks, outside, fmt, layout, session.partial, progress.advance, names)
        if not session.single:
            check_keys(session.partial, job.reader.infos, job.options.trust_remote_code)
        return_freed()
    gating = [step for step in plan.recipe.passes if Phase.GATE in step.phases]
    if gating:
        assert tokens is not None, "thresholds are quantiles of activations"
        write_thresholds(session.partial, gating, walk.finished.all_gates(), tokens.source, job.provenance)
    return Outcome(job, plan, walk, fmt, written, verified, tokens)


def _check_disk(session: Session, plan: Plan) -> None:
    parent = session.out.absolute().parent
    while not parent.exists():
        parent = parent.parent
    free = shutil.disk_usage(parent).free
    if free < plan.sizes.disk_bytes:
        raise ToolkitError(
            f"--out {session.out}: {free / 1e9:.2f} GB free, the run needs {plan.sizes.disk_bytes / 1e9:.2f} GB",
            "free some space or choose another disk",
        )
