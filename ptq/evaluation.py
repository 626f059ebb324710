"""Perplexity and divergence of float and quantized checkpoints, by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from calibration.architectures import resolve
from calibration.errors import ToolkitError
from calibration.model.classes import text_config
from calibration.model.opening import context_length, load_tokenizer, locate
from calibration.progress import Progress
from calibration.record import Evaluation
from calibration.scoring.perplexity import evaluate_text
from calibration.scoring.tasks import TaskRun, lm_eval_tasks
from calibration.scoring.windows import Scoring
from calibration.text.corpora import load_corpus
from calibration.text.crops import TokenBatches, check_tokenizer
from calibration.text.encoding import token_ids, too_short
from calibration.text.samples import default_dataset, model_tokens
from ptq.devices import evaluation_dtype, resolve_device
from ptq.gating import SparseRuntime
from ptq.numerics.logarithmic import LogQuant
from ptq.numerics.softmax import SoftmaxRule
from ptq.runtime.explicit_attention import exchange_softmax, parse_softmax
from ptq.runtime.load import Loaded, load_model
from ptq.runtime.log_search import WINDOW, WINDOWS, search_mlp_values, search_probabilities
from ptq.runtime.log_values import LogGrid, describe, log_probabilities, parse_log_grid, quantize_mlp_values

TASK_BATCH = 8  # sequences per forward in lm-eval tasks
EVAL_TOKENS = 2048  # tokens per forward


def logits_of(loaded: Loaded, device: torch.device) -> Callable[[torch.Tensor], torch.Tensor]:
    """ids int64 ``[B, L]`` -> logits ``[B, L, V]`` with an empty cache."""

    def logits(ids: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = loaded.model(ids.to(device), use_cache=False).logits
        return result.cpu()

    return logits


def check_text(folder: Path, dataset: str, window: int, vocabulary: int, trust_remote_code: bool = False) -> None:
    """Refuse before a long run what `evaluate` would refuse after it: a text that cannot be had or is too short, a
    tokenizer that does not belong to the model.

    Raises:
        ToolkitError: see above.
    """
    corpus = load_corpus(dataset, "score")
    tokenizer = load_tokenizer(folder, trust_remote_code)
    check_tokenizer(tokenizer, vocabulary)
    found = len(token_ids(tokenizer, corpus.text, corpus.special_tokens))
    if found < window:
        raise too_short(corpus.label, found, window)


def evaluate(
    model: str | Path,
    *,
    dataset: str | None = None,
    seq_len: int = 2048,
    protocol: str = "gptq",
    stride: int | None = None,
    reference: str | Path | None = None,
    device: str = "auto",
    dtype: str = "auto",
    kernel: str | None = None,
    trust_remote_code: bool = False,
    sparse: SparseRuntime | None = None,
    probabilities: str | None = None,
    mlp_values: str | None = None,
    softmax: str | None = None,
    calibration: str | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Score a checkpoint; with ``reference`` also its KL divergence and top-1 agreement against another.

    Args:
        dataset: a known set or a file; None: wikitext2, or the demo's own text for the demo.
        seq_len: window in tokens, cut to the model's context.
        sparse: prunes activations of checkpoints with thresholds: at all positions but the first of a window; under
            the protocol ``decode`` in its second half.
        probabilities, mlp_values: logarithmic grids for attention probabilities and for what enters the last linear of
            an MLP, simulated; see `parse_log_grid`. The reference keeps its own.
        calibration: text on which bases of these grids are searched; None: the training text of the default
            ``dataset``. It is not read where nothing is searched.
        softmax: what takes the place of softmax, see `parse_softmax`; the reference keeps its own.

    Raises:
        ToolkitError: unknown or broken model, data set, protocol, grid; text shorter than a window.
    """
    grids = {
        option: parse_log_grid(f"--{option}", text)
        for option, text in (("probabilities", probabilities), ("mlp-values", mlp_values))
        if text is not None
    }
    if calibration is not None and not any(grid.search for grid in grids.values()):
        fix = "leave it out, or search a base: --probabilities adalog-4, --mlp-values adalog-4"
        raise ToolkitError(f"--calibration {calibration}: no grid searches its base on it", fix)
    if softmax is not None:
        parse_softmax(softmax, seq_len)
    where = resolve_device(device)
    width = evaluation_dtype(dtype, where)
    folder = locate(model)
    corpus = load_corpus(dataset or default_dataset(folder), "score")
    loaded = load_model(folder, dtype=width, device=where, kernel=kernel, trust_remote_code=trust_remote_code)
    longest = context_length(loaded.model.config)
    if seq_len > longest:
        if progress is not None:
            progress.message(f"--seq-len {seq_len} is longer than the model's context: cut to {longest}")
        seq_len = longest
    tokenizer = load_tokenizer(folder, trust_remote_code)
    check_tokenizer(tokenizer, int(text_config(loaded.model.config).vocab_size))
    other = None
    if reference is not None:
        other = load_model(reference, dtype=width, device=where, trust_remote_code=trust_remote_code)
    path = _attached(loaded, sparse, protocol, seq_len)
    rule = None if softmax is None else parse_softmax(softmax, seq_len)
    tokens = None
    if any(grid.search for grid in grids.values()):
        source, length = calibration or default_dataset(folder), min(seq_len, WINDOW)
        tokens = model_tokens(folder, loaded.model.config, source, WINDOWS, length, 0, trust_remote_code)
    path += _simulated(loaded.model, grids, rule, tokens)
    if other is not None:
        _attached(other, sparse, protocol, seq_len)
    scoring = Scoring(
        protocol=protocol,
        window=seq_len,
        stride=stride,
        batch_size=max(1, EVAL_TOKENS // max(seq_len, 1)),
        dtype=str(width).removeprefix("torch."),
    )
    return evaluate_text(
        logits_of(loaded, where),
        corpus,
        tokenizer,
        scoring,
        model="float" if loaded.format is None else "quantized",
        path=path,
        reference_fn=None if other is None else logits_of(other, where),
        progress=None if progress is None else window_ticks(progress),
    )


def _attached(loaded: Loaded, sparse: SparseRuntime | None, protocol: str, window: int) -> str:
    """How a model's linears are computed, with the masks that were placed on it."""
    if sparse is None:
        return loaded.path
    dense = window // 2 if protocol == "decode" else 1
    masks = sparse.attach(loaded.model, resolve(loaded.model.config), loaded.folder, dense)
    return f"{loaded.path}; {masks}" if masks else loaded.path


def _simulated(model: Any, grids: Mapping[str, LogGrid], rule: SoftmaxRule | None, tokens: TokenBatches | None) -> str:
    """Install another softmax and the grids of the options of these names, their bases searched on ``tokens`` where
    they are; what to add to the path. All searches see the model without any grid."""
    spec, softmax = resolve(model.config), rule or SoftmaxRule()
    probabilities, values = grids.get("probabilities"), grids.get("mlp-values")
    by_layer: list[LogQuant] = []
    by_path: dict[str, LogQuant] = {}
    if tokens is not None and probabilities is not None and probabilities.search:
        by_layer = search_probabilities(model, spec, softmax, probabilities.quant, tokens)
    if tokens is not None and values is not None and values.search:
        by_path = search_mlp_values(model, spec, values.quant, tokens)
    if probabilities is not None:
        layers = by_layer or [probabilities.quant] * spec.n_blocks
        exchange_softmax(model, [log_probabilities(quant, softmax) for quant in layers])
    elif rule is not None:
        exchange_softmax(model, softmax)
    if values is not None:
        quantize_mlp_values(model, spec, by_path or values.quant)
    found = {"probabilities": by_layer, "mlp-values": list(by_path.values())}
    said = [describe(option, grid, found[option]) for option, grid in grids.items()]
    return "".join(f"; {words}" for words in (said if rule is None else [f"softmax: {rule}", *said]))


def window_ticks(progress: Progress) -> Callable[[int, int], None]:
    """A progress display as the scoring loop's callback (windows done, windows in all)."""
    before = 0

    def tick(done: int, total: int) -> None:
        nonlocal before
        if before == 0:
            progress.stage("evaluate", total)
        progress.advance(f"window {done}/{total}", done - before)
        before = done

    return tick


def evaluate_tasks(
    model: str | Path,
    tasks: Sequence[str],
    *,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    sparse: SparseRuntime | None = None,
) -> TaskRun:
    """lm-eval tasks on a float or quantized checkpoint.

    Raises:
        ToolkitError: lm-eval is not installed, or a task is unknown.
    """
    where = resolve_device(device)
    loaded = load_model(model, dtype=evaluation_dtype(dtype, where), device=where, trust_remote_code=trust_remote_code)
    _attached(loaded, sparse, "gptq", 0)
    tokenizer = load_tokenizer(loaded.folder, trust_remote_code)
    longest = context_length(loaded.model.config)
    return lm_eval_tasks(loaded.model, tokenizer, list(tasks), TASK_BATCH, min(2048, longest))
