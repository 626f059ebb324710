"""A run before it runs: options, model, recipe and plan, resolved from headers alone; its calibration windows."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from calibration.errors import ToolkitError
from calibration.memory import return_freed
from calibration.model.checkpoint import CheckpointReader
from calibration.model.opening import DEMO, context_length, forward_dtype, load_tokenizer, locate, open_model
from calibration.progress import Progress
from calibration.text.corpora import check_name
from calibration.text.crops import TokenBatches, check_tokenizer
from calibration.text.generated import BATCH, GENERATED, check_can_write, first_tokens, generate_tokens
from calibration.text.random_tokens import RANDOM
from calibration.text.samples import default_dataset, model_tokens
from ptq.devices import parse_dtype, resolve_device
from ptq.formats.gguf_file import check_file
from ptq.gating import SparseRuntime
from ptq.methods import METHODS
from ptq.planning.outside_plan import with_outside
from ptq.planning.plan import Plan, make_plan
from ptq.planning.recipe import Methods, Recipe, method_recipe, read_recipe
from ptq.runtime.load import load_model

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
        metadata: a GGUF file whose tokenizer a GGUF output takes over.
        embeddings, head: schemes of the token embedding and of the head, or ``float``; None leaves them in float, but
            in GGUF they are q8_0 then.
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
    metadata: Path | None = None
    embeddings: str | None = None
    head: str | None = None


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
    plan = with_outside(plan, reader.infos, spec, options.embeddings, options.head)
    if plan.format.name == "gguf":
        check_file(folder, plan.layout.config, options.metadata)
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
    source = "demo" if str(model) == DEMO else "folder" if Path(model).exists() else "hub"
    name = Path(model).resolve().name if source == "folder" else str(model)
    return Job(name, source, reader, config, plan, options, dataset, seq_len, device, dtype, batch_size, notes, sparse)


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
