"""Public functions that write checkpoints: `plan`, `quantize`, `fit`, `sparsify`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from calibration.joining import joined
from calibration.progress import Silent
from calibration.walk.token_weights import TokenWeights
from ptq.api.inputs import Display, Model, Text, checkpoint, display, text_file
from ptq.fitting.budget import parse_budget
from ptq.fitting.result import Fitted, fit_model
from ptq.planning.job import Job, Options
from ptq.planning.job import prepare as prepare_job
from ptq.run.pipeline import look, look_at_texts, run
from ptq.run.sharing import check_shared, run_share
from ptq.session import Session
from ptq.sparse.methods import Target, sparsifier
from ptq.sparsification import SparsifyOptions, run_sparsify

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from calibration.record import RunRecord
    from sparsity.files import Sparsity


def plan(
    model: str | Path,
    *,
    method: str | None = None,
    scheme: str | None = None,
    recipe: str | Path | None = None,
    format: str | None = None,
    target: Target = None,
    dataset: str | Path | None = None,
    samples: int = 128,
    seq_len: int = 2048,
    seed: int = 0,
    device: str = "auto",
    dtype: str = "auto",
    evaluate: str | Path | None = None,
    eval_windows: int | None = None,
    unseen_experts: str = "error",
    token_weights: TokenWeights = "norm",
    metadata: str | Path | None = None,
    embeddings: str | None = None,
    head: str | None = None,
    trust_remote_code: bool = False,
    out: str | Path | None = None,
    overwrite: bool = False,
    resume: bool = False,
) -> Job:
    """What `quantize` would do, from headers alone: schemes, sizes, memory, forward passes. Nothing is written.

    The arguments are those of `quantize`; with ``out`` it is also seen whether the run could write there.

    Raises:
        ToolkitError, PlanError: whatever the run would be refused for.
    """
    options = Options(
        dataset=_name(dataset),
        samples=samples,
        seq_len=seq_len,
        seed=seed,
        device=device,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        evaluate=_name(evaluate),
        eval_windows=eval_windows,
        unseen_experts=unseen_experts,
        token_weights=token_weights,
        metadata=_path(metadata),
        embeddings=embeddings,
        head=head,
    )
    job = prepare_job(model, method=method, scheme=scheme, recipe=recipe, format=format, target=target, options=options)
    look_at_texts(job)
    if out is not None:
        look(job, out, overwrite, resume)
    return job


def quantize(
    model: Model,
    *,
    out: str | Path,
    method: str | None = None,
    scheme: str | None = None,
    recipe: str | Path | None = None,
    format: str | None = None,
    target: Target = None,
    dataset: Text | None = None,
    samples: int = 128,
    seq_len: int = 2048,
    seed: int = 0,
    device: str = "auto",
    dtype: str = "auto",
    evaluate: Text | None = None,
    eval_windows: int | None = None,
    unseen_experts: str = "error",
    token_weights: TokenWeights = "norm",
    metadata: str | Path | None = None,
    embeddings: str | None = None,
    head: str | None = None,
    overwrite: bool = False,
    resume: bool = False,
    trust_remote_code: bool = False,
    tokenizer: PreTrainedTokenizerBase | None = None,
    progress: Display | None = None,
    planned: Callable[[Job], None] | None = None,
    command: str = "",
) -> RunRecord:
    """Quantize a model into ``out``, with a report.

    Args:
        model: a folder, a hub id, a GGUF file, ``demo``, or a transformers model in memory with its ``tokenizer``
            (which is written to a temporary checkpoint of its size and dtype, and read from there block by block).
        out: appears whole or not at all; for format gguf a file, ``FILE.gguf``.
        method: passes joined by ``+``, e.g. ``awq+gptq``; or ``recipe``, a TOML file, instead.
        scheme: e.g. ``w4a16-g128``; None: the method's.
        format: None: the first that holds the recipe.
        target: share of activations that cats, chess, scap or teal in ``method`` prune.
        dataset: calibration text: a known set, a file, ``generated``, ``random``, a list of strings, a
            ``datasets.Dataset`` with a column ``text``, or token ids, integers ``[n, seq_len]``; None: wikitext2, or
            the demo's own.
        samples, seq_len, seed: windows of the text, tokens in each, and which they are.
        device, dtype: of calibration forwards.
        evaluate: text to score the result and the float model on.
        eval_windows: score the first so many of its windows only; None: all.
        unseen_experts: ``error``, or ``rtn`` to round experts without calibration tokens without data.
        token_weights: what calibration tokens count: ``norm`` (as if all vectors were equally long) or ``none``.
        metadata: a GGUF file of the same model whose tokenizer a GGUF output takes over.
        embeddings, head: schemes of the token embedding and of the head, or ``float``; None leaves them in float,
            but in GGUF they are q8_0 then.
        overwrite, resume: replace what is in ``out``; go on with an interrupted run.
        progress: called with (stage, done, total, detail).
        planned: called with the plan before any work.
        command: what the record says was typed.

    Where ``torchrun`` or ``accelerate launch`` has started several processes, they share the calibration windows; the
    first one writes, and calls ``progress`` and ``planned``.

    Returns:
        The run's record, which is ``out/report.json``; the same in every process.

    Raises:
        ToolkitError, PlanError: whatever can be refused; ``out`` is then not there.
    """
    source = Path(model) if isinstance(model, str | Path) and Path(model).is_dir() else None
    with (
        joined(device) as processes,
        checkpoint(model, tokenizer) as folder,
        text_file(dataset) as text,
        text_file(evaluate) as scored,
    ):
        if processes.first:
            Session(Path(out)).check(overwrite, resume, source)
        else:
            Session(Path(out)).follow()
        options = Options(
            dataset=text,
            samples=samples,
            seq_len=seq_len,
            seed=seed,
            device=device,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            evaluate=scored,
            eval_windows=eval_windows,
            unseen_experts=unseen_experts,
            token_weights=token_weights,
            metadata=_path(metadata),
            embeddings=embeddings,
            head=head,
            command=command,
        )
        job = prepare_job(
            folder, method=method, scheme=scheme, recipe=recipe, format=format, target=target, options=options
        )
        check_shared(job)
        if not processes.first:
            return run_share(job, out, processes)
        if planned is not None:
            planned(job)
        return run(job, out, overwrite=overwrite, resume=resume, progress=display(progress), processes=processes)


def fit(
    model: Model,
    *,
    size: str | int | None = None,
    bpw: float | None = None,
    max_ppl_increase: str | float | None = None,
    out: str | Path | None = None,
    method: str = "gptq",
    format: str | None = None,
    schemes: Sequence[str] = (),
    dataset: Text | None = None,
    samples: int = 128,
    seq_len: int = 2048,
    seed: int = 0,
    device: str = "auto",
    dtype: str = "auto",
    overwrite: bool = False,
    trust_remote_code: bool = False,
    tokenizer: PreTrainedTokenizerBase | None = None,
    progress: Display | None = None,
) -> Fitted:
    """Choose a scheme for every linear of a model under a budget: one of ``size``, ``bpw``, ``max_ppl_increase``.

    Args:
        model, dataset, samples, seq_len, seed, device, dtype, tokenizer, progress: as for `quantize`.
        size: of all safetensors files together: bytes, or ``6GB``.
        bpw: stored bits per quantized weight, everything counted.
        max_ppl_increase: expected: 0.02, or ``2%``.
        out: where to write the recipe, for ``quantize(recipe=...)``; None: nowhere.
        method: rtn, gptq, awq or awq+gptq.
        schemes: on offer; none: all widths and groups.

    Where ``torchrun`` or ``accelerate launch`` has started several processes, they share the work; the first one
    writes, and calls ``progress``.

    Returns:
        The same in every process.

    Raises:
        ToolkitError, PlanError: a budget that cannot be kept, and whatever else can be refused.
    """
    budget = parse_budget(_text(size), bpw, _text(max_ppl_increase))
    with joined(device) as processes, checkpoint(model, tokenizer) as folder, text_file(dataset) as text:
        options = Options(text, samples, seq_len, seed, device, dtype, trust_remote_code=trust_remote_code)
        where, shown = _path(out), display(progress) if processes.first else Silent()
        return fit_model(folder, budget, method, format, schemes, options, where, overwrite, shown, processes)


def sparsify(
    model: Model,
    *,
    out: str | Path,
    method: str,
    target: Target = None,
    skip_bytes: float | None = None,
    max_ppl_increase: float | None = None,
    search_text: str | Path | None = None,
    dataset: Text | None = None,
    samples: int = 64,
    seq_len: int = 2048,
    seed: int = 0,
    device: str = "auto",
    dtype: str = "auto",
    overwrite: bool = False,
    trust_remote_code: bool = False,
    tokenizer: PreTrainedTokenizerBase | None = None,
    progress: Display | None = None,
) -> Sparsity:
    """Find activation thresholds for a model, float or quantized, and write them beside a copy of its weights.

    Args:
        model, dataset, samples, seq_len, seed, device, dtype, tokenizer, progress: as for `quantize`.
        method: cats, chess, chess-qo, scap, teal or fatrelu.
        target: share pruned at every site, 0.5; or by name for scap and teal, ``down_proj=0.6,*=0.4``.
        skip_bytes: instead: share of the bytes of all linears to skip per token.
        max_ppl_increase: instead: relative increase of the perplexity that is allowed, 0.01 for one per cent.
        search_text: on which that is measured; None: other windows of ``dataset``.

    Raises:
        ToolkitError, PlanError: whatever can be refused; ``out`` is then not there.
    """
    options = SparsifyOptions(
        seq_len=seq_len,
        samples=samples,
        seed=seed,
        device=device,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        skip_bytes=skip_bytes,
        max_increase=max_ppl_increase,
        search_text=_name(search_text),
    )
    options.check_goals(target)
    step = sparsifier(method, target)
    with (
        joined(device) as processes,
        checkpoint(model, tokenizer) as folder,
        text_file(dataset) as text,
    ):
        shown = display(progress) if processes.first else Silent()
        return run_sparsify(folder, step, Path(out), options.on(text), overwrite, shown, processes)


def _name(dataset: str | Path | None) -> str | None:
    return None if dataset is None else str(dataset)


def _path(value: str | Path | None) -> Path | None:
    return None if value is None else Path(value)


def _text(value: str | float | None) -> str | None:
    return None if value is None else str(value)
