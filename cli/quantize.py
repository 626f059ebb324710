"""``ptq quantize``"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli import shared
from cli.json_output import json_output
from cli.options import (
    Device,
    DryRun,
    Embeddings,
    Head,
    Metadata,
    Model,
    Overwrite,
    PlanJson,
    TrustRemoteCode,
    command_line,
    quiet_libraries,
)

if TYPE_CHECKING:
    from ptq.planning.job import Job


def quantize(
    model: Model,
    out: Annotated[Path | None, typer.Option(help="Output folder, or FILE.gguf; appears whole or not at all.")] = None,
    method: Annotated[
        str | None,
        typer.Option(
            help="Passes joined by +, in the order of their phases; without one that rounds, rtn is appended. "
            "Those of the phase gate take --target."
        ),
    ] = None,
    target: Annotated[
        str | None, typer.Option(help="Share of activations that a pass of the phase gate prunes: awq+scap, 0.5.")
    ] = None,
    recipe: Annotated[Path | None, typer.Option(help="TOML file with passes and schemes, instead of --method.")] = None,
    scheme: Annotated[
        str | None,
        typer.Option(
            help="w{2,3,4,5,6,8}a16-{g32,g64,g128,gchannel}[-sym|-asym|-asym_float], floats (fp4-e2m1-g128, mxfp4, "
            "nvfp4), with quantized inputs w8a8, w4a8, w4a4, w4a4kv4, fp8; for GGUF q4_0, q2_k to q6_k; also W4A16, "
            "FP8, int4 and the like. "
            "Default: the method's, mostly w4a16-g128-sym."
        ),
    ] = None,
    format: Annotated[
        str | None,
        typer.Option(
            help="compressed-tensors, awq, gptq, gptq_v2, gguf or native. Default: the first that holds the recipe."
        ),
    ] = None,
    dataset: Annotated[
        str | None,
        typer.Option(
            help="Calibration text: wikitext2, c4, ptb, pileval, builtin, generated (by the model itself), random "
            "(tokens), or FILE (text, .jsonl, .parquet, or input_ids in .safetensors)."
        ),
    ] = None,
    samples: Annotated[int, typer.Option(help="Calibration windows.")] = 128,
    seq_len: Annotated[int, typer.Option(help="Tokens per window; cut to the model's context.")] = 2048,
    seed: Annotated[int, typer.Option(help="The same seed gives the same bytes.")] = 0,
    device: Device = "auto",
    dtype: Annotated[str, typer.Option(help="Of calibration forwards: auto, float32, bfloat16 or float16.")] = "auto",
    eval: Annotated[str | None, typer.Option("--eval", help="Score result and float model on this data set.")] = None,
    eval_windows: Annotated[int | None, typer.Option(help="With --eval: score the first so many windows only.")] = None,
    unseen_experts: Annotated[
        str, typer.Option(help="Experts without calibration tokens: error, or rtn to round them without data.")
    ] = "error",
    token_weights: Annotated[
        str,
        typer.Option(help="What calibration tokens count: norm (as if all were equally long), or none (as they are)."),
    ] = "norm",
    overwrite: Overwrite = False,
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted run from OUT.partial.")] = False,
    dry_run: DryRun = False,
    measure: Annotated[
        bool, typer.Option("--measure", help="With --dry-run: run one block for real, and take the time from it.")
    ] = False,
    json: PlanJson = None,
    metadata: Metadata = None,
    embeddings: Embeddings = None,
    head: Head = None,
    push: Annotated[str | None, typer.Option(help="Send the result to org/name on the hub: ptq upload.")] = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Quantize MODEL into a folder that other programs load, with a report.

    Examples:

      ptq quantize demo --method awq --out demo-awq --eval builtin

      ptq quantize meta-llama/Llama-3.1-8B --method awq+gptq --scheme w3a16-g128 --out llama-w3 --dry-run
    """
    from calibration.errors import ToolkitError
    from cli.progress import load_libraries

    if method is not None and recipe is not None:
        raise ToolkitError("--method and --recipe exclude each other", "leave one out")
    if method is None and recipe is None:
        raise ToolkitError("--method or --recipe is missing", "pass e.g. --method awq")
    if out is None and not dry_run:
        raise ToolkitError("--out is missing", "pass --out DIR, or --dry-run to see the plan only")
    if measure and not dry_run:
        raise ToolkitError("--measure: belongs to a plan", "pass --dry-run too, or leave --measure out")
    load_libraries("quantize") if shared.first() else quiet_libraries()  # the first process shows progress
    import ptq
    from ptq.publishing import check_push

    if push is not None and not dry_run:
        check_push(push)
    options: Any = {
        "method": method,
        "scheme": scheme,
        "recipe": recipe,
        "format": format,
        "target": target,
        "dataset": dataset,
        "samples": samples,
        "seq_len": seq_len,
        "seed": seed,
        "device": device,
        "dtype": dtype,
        "evaluate": eval,
        "eval_windows": eval_windows,
        "unseen_experts": unseen_experts,
        "token_weights": token_weights,
        "metadata": metadata,
        "embeddings": embeddings,
        "head": head,
        "trust_remote_code": trust_remote_code,
    }
    with json_output(json if shared.first() else None) as write:
        _quantize(model, out, options, dry_run, measure, {"overwrite": overwrite, "resume": resume}, write)
    if push is not None and out is not None and not dry_run and shared.first():
        sent = ptq.upload(out, push)
        print(f"{len(sent.files)} files, {sum(sent.files.values()) / 1e9:.2f} GB, sent to {sent.url}")


def _quantize(
    model: str,
    out: Path | None,
    options: dict[str, Any],
    dry_run: bool,
    measure: bool,
    place: dict[str, Any],
    write: Callable[[Any], None],
) -> None:
    """The plan, and the run behind it; of several processes the first one writes, reports and shows progress."""
    import ptq
    from cli.plan_view import print_plan, print_result
    from cli.progress import TerminalProgress, planning

    with planning() as end, TerminalProgress() as progress:

        def planned(job: Job) -> None:
            end()
            with TerminalProgress() as trial:
                duration = ptq.plan_time(job, measure=measure, progress=trial)
            if shared.first():
                print_plan(job, duration)
                write({**job.to_json(), **duration.to_json()})

        if dry_run or out is None:
            planned(ptq.plan(model, **options, out=out, **place))
            return
        if not shared.first():
            ptq.quantize(model, out=out, **options, **place, command=command_line())
            return
        record = ptq.quantize(
            model, out=out, **options, **place, progress=progress, planned=planned, command=command_line()
        )
    print_result(record, out)
