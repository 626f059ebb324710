"""``ptq eval``"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from calibration.launcher import launched
from cli.json_output import Json, json_output
from cli.options import Dense, Device, Model, TrustRemoteCode, entries
from cli.verbosity import detail, verbosity

if TYPE_CHECKING:
    from calibration.record import Evaluation
    from calibration.scoring.tasks import TaskRun


def evaluate(
    model: Model,
    dataset: Annotated[
        str | None,
        typer.Option(help="wikitext2, c4, ptb, builtin, or FILE. Default: wikitext2; the demo's own for demo."),
    ] = None,
    seq_len: Annotated[int, typer.Option(help="Window in tokens; cut to the model's context.")] = 2048,
    protocol: Annotated[
        str,
        typer.Option(
            help="gptq (disjoint windows), llama.cpp, hf-stride, or decode: the second half of each window is scored, "
            "and only it is sparse."
        ),
    ] = "gptq",
    max_windows: Annotated[int | None, typer.Option(help="Score the first so many windows only.")] = None,
    stride: Annotated[int | None, typer.Option(help="For hf-stride; default half a window.")] = None,
    reference: Annotated[
        str | None, typer.Option(help="Model to measure KL divergence and top-1 agreement against.")
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            help="lm-eval tasks, comma-separated (pip install 'ptq\\[eval]'); no perplexity then, unless --dataset or "
            "--reference is named."
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="With --tasks: only so many items of each.")] = None,
    num_fewshot: Annotated[int | None, typer.Option(help="With --tasks: examples in the prompt.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="With --tasks: sequences per forward pass; default 8.")] = None,
    include_path: Annotated[Path | None, typer.Option(help="With --tasks: folder with task files of your own.")] = None,
    json: Json = None,
    device: Device = "auto",
    dtype: Annotated[
        str, typer.Option(help="auto (float32 on CPU, bfloat16 on GPU), float32, bfloat16, float16.")
    ] = "auto",
    kernel: Annotated[
        str | None, typer.Option(help="Kernel for quantized linears; default: the fastest that can run.")
    ] = None,
    probabilities: Annotated[
        str | None,
        typer.Option(
            help="Simulate a grid for attention probabilities: log2-4, log-sqrt2-4, adalog20-4 (bits last), or "
            "adalog-4, whose base is searched per layer on --calibration. -published behind it: zero is no code."
        ),
    ] = None,
    mlp_values: Annotated[
        str | None,
        typer.Option(
            help="The same for what enters the last linear of an MLP, with a sign bit (adalog-4 behind GELU or ReLU: "
            "shifted to be positive)."
        ),
    ] = None,
    calibration: Annotated[
        str | None,
        typer.Option(
            help="Text on which adalog-4 searches: a set's training part, or FILE. Default: wikitext2; demo's own."
        ),
    ] = None,
    softmax: Annotated[
        str | None,
        typer.Option(
            help="Score with another softmax: gamma=-0.003,zeta=1.003 (clipped), alpha=4 (gamma = -alpha / window), "
            "off-by-one, closed=0.9 (heads output 0 where the first token gets so much), normalise."
        ),
    ] = None,
    dense: Dense = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Score MODEL: perplexity, and with --reference the distance from another model.

    The last line printed is `perplexity N.NNNN`; with --tasks alone, one line per score.
    """
    from cli.progress import TerminalProgress, load_libraries

    load_libraries("evaluate")
    names = [] if tasks is None else list(entries("--tasks", tasks))
    asked = {"limit": limit, "num_fewshot": num_fewshot, "batch_size": batch_size, "include_path": include_path}
    given: dict[str, Any] = {name: value for name, value in asked.items() if value is not None}
    _check(names, given)
    import dataclasses

    import ptq
    from calibration.record import SCHEMA_VERSION

    score_tasks = partial(
        ptq.evaluate_tasks,
        model,
        names,
        device=device,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        sparse=not dense,
        **given,
    )
    with json_output(json) as write_json:
        if names and dataset is None and reference is None:
            scores = score_tasks()
            _tell_tasks(scores)
            tasks_json = dataclasses.asdict(scores)
            write_json({"schema_version": SCHEMA_VERSION, "model": model, "evaluations": [], "tasks": tasks_json})
            return
        with TerminalProgress() as progress:
            result = ptq.evaluate(
                model,
                dataset=dataset,
                seq_len=seq_len,
                protocol=protocol,
                stride=stride,
                max_windows=max_windows,
                reference=reference,
                device=device,
                dtype=dtype,
                kernel=kernel,
                probabilities=probabilities,
                mlp_values=mlp_values,
                softmax=softmax,
                calibration=calibration,
                trust_remote_code=trust_remote_code,
                sparse=not dense,
                progress=progress,
            )
        task_run = score_tasks() if names else None
        _tell(result)
        if task_run:
            _tell_tasks(task_run)
        tasks_json = dataclasses.asdict(task_run) if task_run else {}
        evaluations = [dataclasses.asdict(result)]
        write_json({"schema_version": SCHEMA_VERSION, "model": model, "evaluations": evaluations, "tasks": tasks_json})
        print(f"perplexity {result.perplexity:.4f}")


def _check(names: list[str], given: dict[str, Any]) -> None:
    """Names of tasks and their options, before a model is loaded or a text scored."""
    from calibration.errors import ToolkitError
    from calibration.scoring.tasks import TaskOptions, check_tasks

    if given and not names:
        option = "--" + next(iter(given)).replace("_", "-")
        raise ToolkitError(f"{option}: has a meaning only with --tasks", "name tasks, or leave it out")
    if names and launched()[1] > 1:
        fix = "run the command without torchrun or accelerate launch, or score a text only"
        raise ToolkitError(f"--tasks {','.join(names)}: the harness runs in one process", fix)
    given["show_log"] = verbosity.verbose
    if names:
        check_tasks(names, TaskOptions(**given))
    else:
        given.clear()


def _tell_tasks(run: TaskRun) -> None:
    for t in run.scores:
        error = f" +- {t.standard_error:.4f}" if t.standard_error is not None else ""
        print(f"{t.task}: {t.metric} {t.value:.4f}{error} ({t.samples} items, {t.shots} shots)")


def _tell(result: Evaluation) -> None:
    """Everything but the result."""
    p = result.protocol
    detail(
        f"text {p.dataset} (sha256 {p.text_fingerprint}), rows joined by {p.join!r}, special tokens: {p.special_tokens}"
    )
    bos = ", BOS in front of every window" if p.bos else ""
    detail(
        f"protocol {p.name}, window {p.window}, stride {p.stride}{bos}, {p.tokens_scored} tokens of {result.windows} "
        f"windows scored, {p.dtype}"
    )
    detail(f"linears computed by: {result.path}")
    if result.weights_skipped is not None:
        shares = ", ".join(f"{kind} {share:.2%}" for kind, share in result.pruned.items())
        detail(f"pruned on {p.dataset}: {shares or 'nothing'}")
        detail(f"weights of the blocks skipped per decoded token: {result.weights_skipped:.2%}")
    if result.divergence is not None:
        d = result.divergence
        detail(f"reference perplexity {d.reference_perplexity:.4f}")
        detail(f"KL mean {d.kl_mean:.6f} ± {d.kl_se:.6f}, 99th percentile {d.kl_p99:.6f} nats")
        detail(f"top-1 agreement {d.top1_agreement:.4%}")
        detail(f"NLL difference {d.delta_nll:+.6f} ± {d.delta_nll_se:.6f} nats per token")
