"""The main job: plan, walk, export, verify, evaluate, report.

.. code-block:: python

    import ptq
    ptq.quantize("demo", method="awq", out="demo-awq")
    print(ptq.evaluate("demo-awq", reference="demo").perplexity)
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from calibration.errors import ToolkitError
from calibration.model.contents import check_weights, small_digest
from calibration.model.skeleton import Skeleton
from calibration.progress import Progress, Silent
from calibration.record import RunRecord
from calibration.text.crops import TokenBatches
from calibration.versions import versions
from calibration.walk.float_blocks import FloatBlocks
from calibration.walk.passes import Gates
from calibration.walk.walk import Walk
from ptq.committed import CommittedBlocks, Restore, encode_segment, input_quantizers
from ptq.evaluation import check_text
from ptq.formats.loadable import check_keys
from ptq.formats.write import copy_small_files, verify_checkpoint, write_checkpoint
from ptq.planning.job import Job, Options, calibration_windows, prepare
from ptq.planning.plan import Plan
from ptq.run.reporting import Stopwatch, write_reports
from ptq.scheme import parse_scheme
from ptq.session import BLOCKS, Session


def run(
    job: Job,
    out: str | Path,
    *,
    overwrite: bool = False,
    resume: bool = False,
    progress: Progress | None = None,
    tokens: TokenBatches | None = None,
) -> RunRecord:
    """Carry out a prepared job and return its record.

    Args:
        tokens: calibration windows, where they have been made already; see `calibration_windows`.

    Raises:
        ToolkitError: see the message; DIR is then not there, and DIR.partial can be resumed where it is.
    """
    progress = progress or Silent()
    watch = Stopwatch()
    session = Session(Path(out))
    session.check(overwrite, resume, job.reader.folder)
    for note in job.notes:
        progress.message(note)
    plan, reader, options = job.plan, job.reader, job.options
    _check_disk(session, plan)
    if options.evaluate is not None:
        words = int(job.config.vocab_size)
        check_text(reader.folder, options.evaluate, job.seq_len, words, options.trust_remote_code)
    if plan.needs_data:
        tokens = tokens or calibration_windows(job, progress)
    skeleton = Skeleton(plan.model_config(job.config), plan.spec, job.dtype, job.device)
    skeleton.check_complete(reader.infos, plan.new_biases)
    with watch("check weights"):
        progress.stage("check weights", len(reader.infos))
        weights = check_weights(reader, progress.advance)
    identity = {
        "weights": weights,
        "files": small_digest(reader.folder),
        "versions": versions(),
        "recipe": plan.recipe.to_json(),
        "format": plan.format.name,
        "calibration": tokens.source if tokens else {},
        "forward": f"{job.dtype} on {job.device.type}, {job.batch_size} sequences at a time",
        "threads": torch.get_num_threads(),
        "unseen_experts": options.unseen_experts,
        "evaluate": options.evaluate,
    }
    session.begin(identity, resume)
    session.keep(frozenset({BLOCKS}))
    walk = Walk(
        FloatBlocks(reader, skeleton, plan.recipe.passes, plan.schemes, job.batch_size),
        encode=encode_segment,
        restore=Restore(plan.layout),
        inputs=input_quantizers,
        folder=session.blocks,
        allow_unseen=options.unseen_experts == "rtn",
    )
    resumed = walk.finished.count()
    with watch("quantize"):
        walk.run(tokens, progress)
    committed = {n: e for i in range(plan.spec.n_blocks) for n, e in walk.finished.linears(i).items()}
    plan = job.plan = plan.with_schemes({name: parse_scheme(entry["scheme"]) for name, entry in committed.items()})
    blocks = CommittedBlocks([walk.finished.tensors_path(i) for i in range(plan.spec.n_blocks)], plan.layout)
    with watch("export"):
        progress.stage("export", len(plan.layout.quantized))
        fmt, written = write_checkpoint(
            blocks.blocks,
            walk.blocks.outside.tensors(),
            plan.layout,
            plan.format,
            session.partial,
            progress.advance,
        )
        reader.close()
        copy_small_files(reader.folder, session.partial)
    with watch("verify"):
        progress.stage("verify", len(plan.layout.quantized))
        verified = verify_checkpoint(blocks.blocks, fmt, session.partial, progress.advance)
        check_keys(session.partial, reader.infos, options.trust_remote_code)
    gating = [step for step in plan.recipe.passes if isinstance(step, Gates)]
    if gating:
        assert job.sparse is not None and tokens is not None, "GATE passes come with their runtime"
        job.sparse.write(session.partial, gating, walk.finished.all_gates(), tokens.source)
    record = write_reports(job, walk, fmt, written, verified, tokens, session.partial, watch, resumed, progress)
    session.finish()
    return record


def quantize(
    model: str | Path,
    *,
    out: str | Path,
    method: str | None = None,
    scheme: str | None = None,
    recipe: str | Path | None = None,
    format: str | None = None,
    overwrite: bool = False,
    resume: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> RunRecord:
    """Quantize a checkpoint into ``out``; see `Options` for the remaining keywords. Returns the run's record."""
    job = prepare(model, method=method, scheme=scheme, recipe=recipe, format=format, options=Options(**options))
    return run(job, out, overwrite=overwrite, resume=resume, progress=progress)


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
