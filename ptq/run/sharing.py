"""A run that several processes share: what each checks first, and what those do that neither write nor report."""

from __future__ import annotations

from pathlib import Path

from calibration.distributed import Processes
from calibration.errors import ToolkitError
from calibration.launcher import launched
from calibration.model.opening import weights_fingerprint
from calibration.model.skeleton import Skeleton
from calibration.progress import Progress, Silent
from calibration.record import RunRecord
from calibration.text.crops import TokenBatches
from calibration.walk.float_blocks import FloatBlocks
from calibration.walk.passes import undivided
from calibration.walk.walk import Walk
from ptq.committed import Restore, encode_segment, input_quantizers
from ptq.planning.job import Job
from ptq.run.agreement import tell_idle
from ptq.run.identity import run_identity
from ptq.session import Session


def check_shared(job: Job) -> None:
    """Refuse what several processes cannot share.

    Raises:
        ToolkitError: names the pass.
    """
    if launched()[1] == 1:
        return
    fix = "run the command without torchrun or accelerate launch"
    if not job.plan.needs_data:
        raise ToolkitError(f"{job.plan.recipe.method}: reads no calibration text, which is what processes share", fix)
    alone = undivided(job.plan.recipe.passes)
    if alone:
        raise ToolkitError(
            f"{', '.join(alone)}: looks at the calibration windows themselves, which must then be in one process", fix
        )


def agree(job: Job, tokens: TokenBatches | None, processes: Processes, progress: Progress) -> None:
    """Make sure that all processes are about to do the same, and say where some have nothing to do.

    Raises:
        ToolkitError: names what differs.
    """
    if processes.size == 1:
        return
    processes.refuse_differences(run_identity(job, tokens, weights_fingerprint(job.reader)))
    assert tokens is not None
    tell_idle(processes, -(-len(tokens) // job.batch_size), progress)


def walk_of(job: Job, skeleton: Skeleton, folder: Path, processes: Processes) -> Walk:
    """The walk over the blocks of a job."""
    return Walk(
        FloatBlocks(job.reader, skeleton, job.plan.recipe.passes, job.plan.schemes, job.batch_size),
        encode=encode_segment,
        restore=Restore(job.plan.layout),
        inputs=input_quantizers,
        folder=folder,
        allow_unseen=job.options.unseen_experts == "rtn",
        token_weights=job.options.token_weights,
        processes=processes,
    )


def run_share(job: Job, out: str | Path, processes: Processes) -> RunRecord:
    """The part of a run that all processes but the first one have: forward passes over their windows, and the searches
    that follow from the sums. Nothing is written, and the record is the one that the first process makes.

    Raises:
        ToolkitError: the processes do not fit together, or another one has ended.
    """
    silent = Silent()
    tokens = job.windows(silent)
    agree(job, tokens, processes, silent)
    skeleton = Skeleton(job.plan.model_config(job.config), job.spec, job.dtype, job.device)
    processes.barrier()  # the first one has read the weights, and made the folder
    walk_of(job, skeleton, Session(Path(out)).blocks, processes).run(tokens, silent)
    processes.mind_first_only()
    record: RunRecord = processes.agree_at_the_end(None)
    return record
