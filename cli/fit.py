"""``ptq fit``"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli.json_output import json_output
from cli.options import Device, DryRun, Model, PlanJson, TrustRemoteCode
from cli.verbosity import detail

if TYPE_CHECKING:
    from ptq.fitting.result import Fitted


def fit(
    model: Model,
    size: Annotated[str | None, typer.Option(help="Of all safetensors files together: 6GB, 950MB.")] = None,
    bpw: Annotated[float | None, typer.Option(help="Stored bits per quantized weight, everything counted.")] = None,
    max_ppl_increase: Annotated[str | None, typer.Option(help="Expected increase of perplexity: 2%.")] = None,
    out: Annotated[Path, typer.Option(help="The recipe, for `ptq quantize --recipe`.")] = Path("fit.toml"),
    method: Annotated[str, typer.Option(help="One of:")] = "gptq",
    format: Annotated[str | None, typer.Option(help="compressed-tensors (default) or native.")] = None,
    schemes: Annotated[str, typer.Option(help="On offer, with commas. Default: all widths and groups.")] = "",
    dataset: Annotated[str | None, typer.Option(help="Calibration text, as for `ptq quantize`.")] = None,
    samples: Annotated[int, typer.Option(help="Calibration windows.")] = 128,
    seq_len: Annotated[int, typer.Option(help="Tokens per window; cut to the model's context.")] = 2048,
    seed: Annotated[int, typer.Option(help="The same seed gives the same recipe.")] = 0,
    device: Device = "auto",
    dtype: Annotated[str, typer.Option(help="Of forwards: auto, float32, bfloat16 or float16.")] = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the recipe.")] = False,
    dry_run: DryRun = False,
    json: PlanJson = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Choose a scheme for every linear of MODEL under a budget, and write the recipe.

    Examples:

      ptq fit demo --bpw 3.25 --out demo.toml

      ptq quantize demo --recipe demo.toml --out demo-3.25
    """
    from cli.plan_view import print_outlook
    from cli.progress import TerminalProgress, load_libraries

    load_libraries("fit")
    import ptq

    options: Any = {
        "size": size,
        "bpw": bpw,
        "max_ppl_increase": max_ppl_increase,
        "out": out,
        "method": method,
        "format": format,
        "schemes": [text.strip() for text in schemes.split(",") if text.strip()],
        "dataset": dataset,
        "samples": samples,
        "seq_len": seq_len,
        "seed": seed,
        "device": device,
        "dtype": dtype,
        "overwrite": overwrite,
        "trust_remote_code": trust_remote_code,
    }
    with json_output(json, dry_run) as write:
        if dry_run:
            print_outlook(outlook := ptq.plan_fit(model, **options))
            write(outlook.to_json())
            return
    with TerminalProgress() as progress:
        found = ptq.fit(model, **options, progress=progress)
    _print(found)
    print(f"{found.note}\nwritten to {out}; run it with: ptq quantize {model} --recipe {out} --out DIR")


def _print(found: Fitted) -> None:
    """The frontier beside the best uniform settings, and how many linears took which scheme."""
    from rich.table import Table

    from cli.plan_view import wide_console

    table = Table("budget", "bits/weight", "expected KL", "best uniform", "its KL", box=None, pad_edge=False)
    for point in found.frontier:
        best, choice = point.uniform, point.choice
        named = ("", "") if best is None else (str(best.uniform), f"{best.divergence:.4f}")
        table.add_row(f"{point.bpw:.2f}", f"{choice.bits_per_weight:.4f}", f"{choice.divergence:.4f}", *named)
    wide_console().print(table)
    detail(f"checked: {found.checked}")
    detail("chosen: " + ", ".join(f"{count} x {scheme}" for scheme, count in found.counts.items()))
