"""Public functions that run and compare models: `load_model`, `evaluate`, `evaluate_tasks`, `generate`, `inspect`,
`compare`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from calibration.errors import ToolkitError
from calibration.joining import joined
from calibration.model.opening import load_tokenizer
from calibration.progress import Silent
from calibration.record import Evaluation
from calibration.scoring.tasks import TaskOptions, TaskRun
from ptq import evaluation
from ptq.api.inputs import Display, Model, Text, checkpoint, display, text_file
from ptq.devices import parse_dtype, resolve_device
from ptq.inspection import Inspection, describe
from ptq.report.compare import Comparison, compare_paths
from ptq.runtime.decoding.native import Inputs
from ptq.runtime.generate import Generation
from ptq.runtime.generate import generate as continue_prompt
from ptq.runtime.load import Loaded
from ptq.sparse import loading
from ptq.sparse.loading import Sparse

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def load_model(
    model: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    kernel: str | None = None,
    sparse: Sparse = "masks",
    trust_remote_code: bool = False,
    decoding: bool = False,
) -> Loaded:
    """A checkpoint, float or in any format of ours, as a transformers model that runs from its integer codes.

    Args:
        model: a folder, a hub id, or ``demo``.
        dtype: of activations and of what is not quantized; ``auto`` is the checkpoint's.
        kernel: for quantized linears; None: the fastest that can run each.
        sparse: what to do with activation thresholds in the folder. ``masks``: every forward pass is pruned, at all
            positions but the first of a sequence (to score). ``decode``: weights are skipped while single tokens are
            decoded, and prompts are computed densely (to generate). False: nothing.
        decoding: on CPUs, hold codes in the layout that is fastest for single tokens (as `generate` does).

    Returns:
        the model, and in ``path`` how its linears are computed and what prunes them.

    Raises:
        ToolkitError: a broken or unknown checkpoint, thresholds for other weights, an unknown device, dtype or kernel.
    """
    width = None if dtype == "auto" else dtype if isinstance(dtype, torch.dtype) else parse_dtype(dtype)
    where = resolve_device(str(device))
    return loading.load_model(
        model,
        dtype=width,
        device=where,
        kernel=kernel,
        trust_remote_code=trust_remote_code,
        sparse=sparse,
        decoding=decoding,
    )


def evaluate(
    model: Model,
    *,
    dataset: Text | None = None,
    seq_len: int = 2048,
    protocol: str = "gptq",
    stride: int | None = None,
    max_windows: int | None = None,
    reference: Model | None = None,
    device: str = "auto",
    dtype: str = "auto",
    kernel: str | None = None,
    sparse: bool = True,
    probabilities: str | None = None,
    mlp_values: str | None = None,
    softmax: str | None = None,
    calibration: Text | None = None,
    trust_remote_code: bool = False,
    tokenizer: PreTrainedTokenizerBase | None = None,
    progress: Display | None = None,
) -> Evaluation:
    """Perplexity of a model; with ``reference`` also its KL divergence and top-1 agreement against another. Where a
    launcher has started several processes, they share the windows, and all return the same.

    Args:
        model, reference: a folder, a hub id, ``demo``, or a transformers model in memory with its ``tokenizer`` (which
            is written to a temporary checkpoint and loaded from there, as a second copy).
        dataset: text to score: a known set, a file, a list of strings, a ``datasets.Dataset`` with a column ``text``,
            or token ids, integers ``[n, >= seq_len]``; None: wikitext2, or the demo's own.
        seq_len: window in tokens, cut to the model's context.
        protocol: gptq (disjoint windows), llama.cpp, hf-stride, or decode (the second half of each window is scored,
            and only it is sparse). ``stride`` is for hf-stride.
        max_windows: score that many windows only, from the first on.
        device, dtype: ``auto`` is float32 on CPUs and bfloat16 on GPUs.
        kernel: for quantized linears; None: the fastest that can run each.
        sparse: prune by activation thresholds that lie in the folder; False: score the dense model.
        probabilities, mlp_values: simulated logarithmic grids, e.g. ``adalog-4``; ``calibration`` is the text that
            their bases are searched on.
        softmax: another softmax, e.g. ``gamma=-0.003,zeta=1.003``.
        progress: called with (stage, done, total, detail).

    Raises:
        ToolkitError: an unknown or broken model, text, protocol or grid; a text shorter than a window.
    """
    if tokenizer is not None and all(known is None or isinstance(known, (str, Path)) for known in (model, reference)):
        raise ToolkitError("tokenizer: models on disk have their own", "leave it out")
    with ExitStack() as files:
        folder = files.enter_context(checkpoint(model, _for(model, tokenizer)))
        other = None if reference is None else files.enter_context(checkpoint(reference, _for(reference, tokenizer)))
        processes = files.enter_context(joined(device))
        text, searched = files.enter_context(text_file(dataset)), files.enter_context(text_file(calibration))
        return evaluation.evaluate(
            folder,
            dataset=text,
            seq_len=seq_len,
            protocol=protocol,
            stride=stride,
            max_windows=max_windows,
            reference=other,
            device=device,
            dtype=dtype,
            kernel=kernel,
            trust_remote_code=trust_remote_code,
            sparse=sparse,
            probabilities=probabilities,
            mlp_values=mlp_values,
            softmax=softmax,
            calibration=searched,
            progress=display(progress) if processes.first else Silent(),
            processes=processes,
        )


def _for(model: Model, tokenizer: PreTrainedTokenizerBase | None) -> PreTrainedTokenizerBase | None:
    """The tokenizer, for a model in memory; those on disk have their own."""
    return None if isinstance(model, (str, Path)) else tokenizer


def evaluate_tasks(
    model: Model,
    tasks: Sequence[str],
    *,
    device: str = "auto",
    dtype: str = "auto",
    sparse: bool = True,
    trust_remote_code: bool = False,
    tokenizer: PreTrainedTokenizerBase | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    include_path: str | Path | None = None,
    show_log: bool = False,
) -> TaskRun:
    """Tasks of EleutherAI's lm-evaluation-harness, e.g. ``["piqa", "arc_easy"]``. Names are checked first.

    Args:
        model, device, dtype, sparse, tokenizer: as for `evaluate`.
        num_fewshot: examples in the prompt; None: the task's own number.
        limit: only that many items per task.
        batch_size: sequences per forward pass.
        include_path: folder with task files of your own.
        show_log: let through what the harness writes to stderr.

    Raises:
        ToolkitError: the harness is not installed, or a task is unknown.
    """
    folder_of_tasks = None if include_path is None else Path(include_path)
    options = TaskOptions(num_fewshot, limit, batch_size, folder_of_tasks, show_log)
    with checkpoint(model, tokenizer) as folder:
        return evaluation.evaluate_tasks(
            folder,
            tasks,
            device=device,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            sparse=sparse,
            options=options,
        )


def generate(
    model: str | Path | Loaded | PreTrainedModel,
    prompt: str,
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    seed: int = 0,
    device: str = "auto",
    dtype: str = "auto",
    kernel: str | None = None,
    sparse: bool = True,
    trust_remote_code: bool = False,
    tokenizer: PreTrainedTokenizerBase | None = None,
    stream: Callable[[str], None] | None = None,
    inputs: Inputs = "int15",
) -> Generation:
    """Continue a prompt with a model, float or quantized, and say how fast it was.

    Args:
        model: a folder, a hub id or ``demo``; what `load_model` returned; or a transformers model in memory with its
            ``tokenizer``. The last two run as they are: ``device``, ``dtype``, ``kernel`` and ``sparse`` are for the
            first.
        temperature: 0 is greedy, else tokens are sampled with ``seed``.
        dtype: ``auto`` is bfloat16.
        sparse: skip weights by activation thresholds that lie in the folder.
        stream: called with pieces of the text as it grows.
        inputs: what decoding steps on CPUs round the inputs of integer codes to: ``int15`` loses less than bfloat16
            does; ``int8``, per 64 values (32 in groups of 32), is faster and loses more.

    Raises:
        ToolkitError: an empty prompt, a model in memory without a tokenizer, one without integer codes where inputs are
            to be ``int8``, and those of `load_model`.
    """
    if isinstance(model, (str, Path)):
        width = "bfloat16" if dtype == "auto" else dtype
        mode: Sparse = "decode" if sparse else False
        model = load_model(
            model,
            dtype=width,
            device=device,
            kernel=kernel,
            sparse=mode,
            trust_remote_code=trust_remote_code,
            decoding=True,
        )
    network, path = (model.model, model.path) if isinstance(model, Loaded) else (model, "as given")
    if tokenizer is None and isinstance(model, Loaded):
        tokenizer = load_tokenizer(model.folder, trust_remote_code)
    if tokenizer is None:
        raise ToolkitError("model: one in memory comes without its tokenizer", "pass tokenizer= too")
    return continue_prompt(
        network, tokenizer, prompt, max_new_tokens, temperature, seed, stream=stream, linears=path, inputs=inputs
    )


def inspect(model: str | Path, *, device: str = "auto", trust_remote_code: bool = False) -> Inspection:
    """What a checkpoint is: architecture, linears and their groups; for quantized ones schemes and kernels.

    Raises:
        ToolkitError: a broken or unknown checkpoint.
    """
    return Inspection(tuple(describe(model, device, trust_remote_code)))


def compare(runs: Sequence[str | Path]) -> Comparison:
    """Runs of one evaluation protocol side by side: folders of `quantize`, their ``report.json``, or files that
    ``ptq eval --json`` wrote.

    Raises:
        ToolkitError: runs that were measured under different protocols, or not at all.
    """
    return compare_paths([Path(run) for run in runs])
