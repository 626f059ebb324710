"""The main job: plan, walk, export, verify, evaluate, report.

.. code-block:: python

    import ptq
    ptq.quantize("demo", method="awq", out="demo-awq")
    print(ptq.evaluate("demo-awq", reference="demo").perplexity)
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from calibration.checkpoint import CheckpointReader
from calibration.corpora import check_name
from calibration.errors import ToolkitError
from calibration.float_blocks import FloatBlocks
from calibration.generated import BATCH, GENERATED, check_can_write, first_tokens, generate_tokens
from calibration.memory import return_freed
from calibration.models import (
    DEMO,
    check_finite,
    fingerprint,
    forward_dtype,
    load_tokenizer,
    locate,
    open_model,
)
from calibration.passes import Gates
from calibration.progress import Progress, Silent
from calibration.random_tokens import RANDOM
from calibration.record import RunRecord
from calibration.samples import model_tokens
from calibration.skeleton import Skeleton
from calibration.text import TokenBatches, check_tokenizer
from calibration.walk import Walk
from ptq.committed import CommittedBlocks, Restore, encode_segment, input_quantizers
from ptq.devices import parse_dtype, resolve_device
from ptq.evaluation import check_text, context_length, default_dataset
from ptq.export.loadable import check_keys
from ptq.export.write import copy_small_files, verify_checkpoint, write_checkpoint
from ptq.gating import SparseRuntime
from ptq.methods import METHODS
from ptq.plan import Plan, make_plan
from ptq.recipe import Methods, Recipe, method_recipe, read_recipe
from ptq.reporting import Stopwatch, write_reports
from ptq.runtime.load import load_model
from ptq.scheme import parse_scheme
from ptq.session import Session

BATCH_TOKENS = 2048  # tokens per calibration forward: enough to fill the cores, few enough to stay in cache


@dataclass(frozen=True)
class Options:
    """Everything of a quantization run but the model, the recipe and the folder.

    Attributes:
        dataset: calibration text, ``generated`` to have the model write it, or ``random`` tokens; None: wikitext2, or
            the demo's own text for the demo.
        samples, seq_len, seed: of calibration.
        device, dtype: of forward passes; ``auto`` is the GPU where there is one, and the checkpoint's dtype where the
            machine is fast at it.
        evaluate: data set to score the result and the float model on, or None.
        unseen_experts: ``error``, or ``rtn`` to round experts without calibration tokens without data.
        trust_remote_code: run Python code that comes with the model.
        command: the command line, for the record.
    """

    dataset: str | None = None
    samples: int = 128
    seq_len: int = 2048
    seed: int = 0
    device: str = "auto"
    dtype: str = "auto"
    evaluate: str | None = None
    unseen_experts: str = "error"
    trust_remote_code: bool = False
    command: str = ""


@dataclass
class Job:
    """A run that passed its plan: everything open, nothing written.

    ``source`` is ``hub``, ``folder`` or ``demo``; ``name`` the hub id or the folder's own name (paths stay private).
    ``sparse`` saves and applies the thresholds of GATE passes, where ``methods`` had any.
    """

    name: str
    source: str
    reader: CheckpointReader
    config: Any
    plan: Plan
    options: Options
    dataset: str
    seq_len: int
    device: torch.device
    dtype: torch.dtype
    batch_size: int
    notes: list[str]
    sparse: SparseRuntime | None = None


def prepare(
    model: str | Path,
    *,
    method: str | None = None,
    scheme: str | None = None,
    recipe: str | Path | None = None,
    format: str | None = None,
    options: Options | None = None,
    methods: Methods = METHODS,
    sparse: SparseRuntime | None = None,
) -> Job:
    """Resolve model, recipe and plan from headers alone.

    Args:
        methods: passes that recipes may name; those of activation sparsity only with ``sparse``.

    Raises:
        ToolkitError, PlanError: whatever can be refused.
    """
    options = options or Options()
    if (method is None) == (recipe is None):
        raise ToolkitError("needs either a method or a recipe", "pass --method awq, or --recipe FILE.toml")
    if options.samples < 1 or options.seq_len < 2:
        raise ToolkitError(
            f"--samples {options.samples} --seq-len {options.seq_len}: too small", "use at least 1 sample of 2 tokens"
        )
    resolved: Recipe
    if recipe is not None:
        resolved = read_recipe(Path(recipe), scheme, format, methods)
    else:
        resolved = method_recipe(method or "", scheme, format, methods)
    folder = locate(model)
    reader, config, spec = open_model(folder, options.trust_remote_code)
    device = resolve_device(options.device)
    first = (i.dtype for n, i in reader.infos.items() if n.startswith(spec.prefix(0)) and n.endswith(".weight"))
    stored = next(first, torch.float32)  # a checkpoint without blocks is refused by the plan
    dtype = forward_dtype(stored, device) if options.dtype == "auto" else parse_dtype(options.dtype)
    notes = []
    seq_len, longest = options.seq_len, context_length(config)
    if seq_len > longest:
        notes.append(f"--seq-len {seq_len} is longer than the model's context: cut to {longest}")
        seq_len = longest
    batch_size = max(1, min(options.samples, BATCH_TOKENS // seq_len))
    plan = make_plan(
        reader,
        config,
        spec,
        resolved,
        samples=options.samples,
        seq_len=seq_len,
        batch_size=batch_size,
        forward_itemsize=dtype.itemsize,
    )
    dataset = options.dataset or default_dataset(folder)
    if plan.needs_data and dataset == GENERATED:
        check_can_write(reader, config, spec)
        first_tokens(load_tokenizer(folder, options.trust_remote_code))
        notes.append("the model writes its calibration text, and is in memory for that")
        plan = replace(plan, sizes=replace(plan.sizes, peak_bytes=max(plan.sizes.peak_bytes, reader.total_bytes)))
    elif plan.needs_data and dataset != RANDOM:
        check_name(dataset)
    if options.evaluate is not None:
        check_name(options.evaluate)
    source = "demo" if str(model) == DEMO else "folder" if Path(model).is_dir() else "hub"
    name = folder.name if source == "folder" else str(model)
    return Job(name, source, reader, config, plan, options, dataset, seq_len, device, dtype, batch_size, notes, sparse)


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
    identity = {
        "model": fingerprint(reader),
        "recipe": plan.recipe.to_json(),
        "format": plan.format.name,
        "calibration": tokens.source if tokens else {},
        "forward": f"{job.dtype} on {job.device.type}, {job.batch_size} sequences at a time",
        "threads": torch.get_num_threads(),
        "unseen_experts": options.unseen_experts,
        "evaluate": options.evaluate,
    }
    if resume:
        session.begin(identity, resume=True)
    skeleton = Skeleton(plan.model_config(job.config), plan.spec, job.dtype, job.device)
    skeleton.check_complete(reader.infos, plan.new_biases)
    with watch("check weights"):
        progress.stage("check weights", len(reader.infos))
        check_finite(reader, progress.advance)
    if not resume:
        session.begin(identity, resume=False)
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


def calibration_windows(job: Job, progress: Progress) -> TokenBatches:
    """The windows of the job's calibration text."""
    if job.dataset == GENERATED:
        return _written(job, progress)
    o = job.options
    folder = job.reader.folder
    return model_tokens(folder, job.config, job.dataset, o.samples, job.seq_len, o.seed, o.trust_remote_code)


def _written(job: Job, progress: Progress) -> TokenBatches:
    """Text of the model's own; the model is gone again afterwards."""
    tokenizer = load_tokenizer(job.reader.folder, job.options.trust_remote_code)
    check_tokenizer(tokenizer, int(job.config.vocab_size))
    progress.stage("write", -(-job.options.samples // BATCH))
    loaded = load_model(
        job.reader.folder, dtype=job.dtype, device=job.device, trust_remote_code=job.options.trust_remote_code
    )
    options = job.options
    tokens = generate_tokens(loaded.model, tokenizer, options.samples, job.seq_len, options.seed, progress.advance)
    del loaded
    return_freed()
    return tokens


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
