"""Perplexity and divergence of float and quantized checkpoints, by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from calibration.architectures import resolve
from calibration.distributed import Processes
from calibration.errors import ToolkitError
from calibration.model.classes import text_config
from calibration.model.contents import small_digest
from calibration.model.opening import context_length, load_tokenizer, locate
from calibration.progress import Progress, Silent
from calibration.record import Evaluation
from calibration.scoring.perplexity import score
from calibration.scoring.tasks import TaskOptions, TaskRun, check_tasks, lm_eval_tasks
from calibration.scoring.windows import Scoring
from calibration.text.chats import as_text
from calibration.text.corpora import load_corpus
from calibration.text.crops import TokenBatches, check_tokenizer, read_ids
from calibration.text.encoding import EncodedText, encode_text, token_ids, too_short, wanted_bos
from calibration.text.samples import model_tokens
from ptq.devices import evaluation_dtype, resolve_device
from ptq.numerics.logarithmic import LogQuant
from ptq.numerics.softmax import SoftmaxRule
from ptq.planning.source import cut_to_context, default_dataset
from ptq.run.agreement import refuse_other_models
from ptq.runtime.explicit_attention import exchange_softmax, parse_softmax
from ptq.runtime.load import Loaded, load_model
from ptq.runtime.log_search import WINDOW, WINDOWS, search_mlp_values, search_probabilities
from ptq.runtime.log_values import LogGrid, describe, log_probabilities, parse_log_grid, quantize_mlp_values
from ptq.sparse.masks import Pruning, attach_masks
from sparsity.masking import FIRST, total_tallies

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
    if is_ids(dataset):
        read_ids(Path(dataset), 1, window, vocabulary)
        return
    corpus = load_corpus(dataset, "score")
    tokenizer = load_tokenizer(folder, trust_remote_code)
    check_tokenizer(tokenizer, vocabulary)
    corpus = as_text(corpus, tokenizer)
    found = len(token_ids(tokenizer, corpus.text, corpus.special_tokens or wanted_bos(tokenizer) is not None))
    if found < window:
        raise too_short(corpus.label, found, window)


def is_ids(dataset: str) -> bool:
    """Whether a data set is a file of token ids."""
    return Path(dataset).suffix == ".safetensors" and Path(dataset).is_file()


def evaluate(
    model: str | Path,
    *,
    dataset: str | None = None,
    seq_len: int = 2048,
    protocol: str = "gptq",
    stride: int | None = None,
    max_windows: int | None = None,
    reference: str | Path | None = None,
    device: str = "auto",
    dtype: str = "auto",
    kernel: str | None = None,
    trust_remote_code: bool = False,
    sparse: bool = True,
    probabilities: str | None = None,
    mlp_values: str | None = None,
    softmax: str | None = None,
    calibration: str | None = None,
    progress: Progress | None = None,
    processes: Processes | None = None,
) -> Evaluation:
    """Score a checkpoint; with ``reference`` also its KL divergence and top-1 agreement against another.

    Args:
        dataset: a known set or a file; None: wikitext2, or the demo's own text for the demo.
        seq_len: window in tokens, cut to the model's context.
        max_windows: score that many windows only, from the first on.
        sparse: prune activations of checkpoints with thresholds: at all positions but the first of a window; under
            the protocol ``decode`` in its second half. False: score the dense model.
        probabilities, mlp_values: logarithmic grids for attention probabilities and for what enters the last linear of
            an MLP, simulated; see `parse_log_grid`. The reference keeps its own.
        calibration: text on which bases of these grids are searched; None: the training text of the default
            ``dataset``. It is not read where nothing is searched.
        softmax: what takes the place of softmax, see `parse_softmax`; the reference keeps its own.
        processes: that share the windows; each loads the models, and gets the result.

    Raises:
        ToolkitError: unknown or broken model, data set, protocol, grid; text shorter than a window; processes that
            differ.
    """
    progress, processes = progress or Silent(), processes or Processes()
    grids = _grids(probabilities, mlp_values, calibration)
    if softmax is not None:
        parse_softmax(softmax, seq_len)
    if max_windows is not None and max_windows < 1:
        raise ToolkitError(f"--max-windows {max_windows}: less than 1", "give a positive number, or leave it out")
    where = resolve_device(device)
    width = evaluation_dtype(dtype, where)
    folder = locate(model)
    dataset = dataset or default_dataset(folder)
    corpus = None if is_ids(dataset) else load_corpus(dataset, "score")
    progress.stage("load models", 1 + (reference is not None))
    loaded = load_model(folder, dtype=width, device=where, kernel=kernel, trust_remote_code=trust_remote_code)
    progress.advance(folder.name)
    config = loaded.model.config
    seq_len, notes = cut_to_context(seq_len, config)
    for note in notes:
        progress.message(note)
    scoring = Scoring(
        protocol=protocol,
        window=seq_len,
        stride=stride,
        batch_size=max(1, EVAL_TOKENS // max(seq_len, 1)),
        max_windows=max_windows,
        dtype=str(width).removeprefix("torch."),
    )
    if corpus is None:
        text = _windows_of_ids(Path(dataset), scoring, int(text_config(config).vocab_size))
    else:
        tokenizer = load_tokenizer(folder, trust_remote_code)
        check_tokenizer(tokenizer, int(text_config(config).vocab_size))
        text = encode_text(corpus, tokenizer)
    facts = {
        "text": text.fingerprint,
        "scoring": dataclasses.asdict(scoring),
        "reference": None if reference is None else small_digest(locate(reference)),
        "simulated": [probabilities, mlp_values, softmax, calibration],
        "device": where.type,
        "kernel": loaded.path,
        "sparse": sparse,
    }
    refuse_other_models(processes, folder, facts, trust_remote_code)
    other = None
    if reference is not None:
        other = load_model(reference, dtype=width, device=where, trust_remote_code=trust_remote_code)
        progress.advance("reference")
    dense, pruning = seq_len // 2 if protocol == "decode" else FIRST, None
    if sparse:
        loaded, pruning = attach_masks(loaded, dense)
        other = None if other is None else attach_masks(other, dense)[0]
    tokens = None
    if any(grid.search for grid in grids.values()):
        source, length = calibration or default_dataset(folder), min(seq_len, WINDOW)
        tokens = model_tokens(folder, config, source, WINDOWS, length, 0, trust_remote_code)
    rule = None if softmax is None else parse_softmax(softmax, seq_len)
    result = score(
        logits_of(loaded, where),
        text,
        scoring,
        model="float" if loaded.format is None else "quantized",
        path=loaded.path + _simulated(loaded.model, grids, rule, tokens),
        reference_fn=None if other is None else logits_of(other, where),
        progress=window_ticks(progress),
        processes=processes,
    )
    return _with_pruning(result, pruning, processes)


def _grids(probabilities: str | None, mlp_values: str | None, calibration: str | None) -> dict[str, LogGrid]:
    """Option -> grid; a text to search on is refused where nothing is searched."""
    asked = (("probabilities", probabilities), ("mlp-values", mlp_values))
    grids = {option: parse_log_grid(f"--{option}", text) for option, text in asked if text is not None}
    if calibration is not None and not any(grid.search for grid in grids.values()):
        fix = "leave it out, or search a base: --probabilities adalog-4, --mlp-values adalog-4"
        raise ToolkitError(f"--calibration {calibration}: no grid searches its base on it", fix)
    return grids


def _windows_of_ids(path: Path, scoring: Scoring, vocabulary: int) -> EncodedText:
    """A file of token ids, one window from each of its rows."""
    if scoring.step != scoring.window:
        fix = "use --protocol gptq, or give the text itself"
        raise ToolkitError(
            f"--protocol {scoring.protocol}: overlaps windows of one text, {path.name} holds windows", fix
        )
    return EncodedText.of_windows(read_ids(path, 1, scoring.window, vocabulary)[:, : scoring.window], path.name)


def _with_pruning(result: Evaluation, pruning: Pruning | None, processes: Processes) -> Evaluation:
    if pruning is None:
        return result
    pruning.masks.tallies = total_tallies(processes.all_values(pruning.masks.tallies))
    return replace(result, pruned=pruning.shares(), weights_skipped=pruning.weights_skipped())


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
    before = -1

    def tick(done: int, total: int) -> None:
        nonlocal before
        if before < 0:
            progress.stage("evaluate", total)
            before = 0
        if done:
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
    sparse: bool = True,
    options: TaskOptions | None = None,
) -> TaskRun:
    """lm-eval tasks on a float or quantized checkpoint. Names are checked before the model is loaded.

    Args:
        sparse: as for `evaluate`.

    Raises:
        ToolkitError: lm-eval is not installed, or a task is unknown.
    """
    check_tasks(tasks, options or TaskOptions())
    where = resolve_device(device)
    loaded = load_model(model, dtype=evaluation_dtype(dtype, where), device=where, trust_remote_code=trust_remote_code)
    if sparse:
        loaded, _ = attach_masks(loaded)
    tokenizer = load_tokenizer(loaded.folder, trust_remote_code)
    longest = context_length(loaded.model.config)
    return lm_eval_tasks(loaded.model, tokenizer, list(tasks), min(2048, longest), options)
