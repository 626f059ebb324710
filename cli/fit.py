"""``ptq fit``"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli.options import Device, Model, TrustRemoteCode, quiet_libraries
from cli.verbosity import detail

if TYPE_CHECKING:
    from ptq.fitting.job import Choice, Fit
    from ptq.fitting.sensitivity import Sensitivities


def fit(
    model: Model,
    size: Annotated[str | None, typer.Option(help="Of all safetensors files together: 6GB, 950MB.")] = None,
    bpw: Annotated[float | None, typer.Option(help="Stored bits per quantized weight, everything counted.")] = None,
    max_ppl_increase: Annotated[str | None, typer.Option(help="Expected increase of perplexity: 2%.")] = None,
    out: Annotated[Path, typer.Option(help="The recipe, for `ptq quantize --recipe`.")] = Path("fit.toml"),
    method: Annotated[str, typer.Option(help="rtn, gptq, awq or awq+gptq.")] = "gptq",
    format: Annotated[str | None, typer.Option(help="compressed-tensors (default) or native.")] = None,
    schemes: Annotated[str, typer.Option(help="On offer, with commas. Default: all widths and groups.")] = "",
    dataset: Annotated[str | None, typer.Option(help="Calibration text, as for `ptq quantize`.")] = None,
    samples: Annotated[int, typer.Option(help="Calibration windows.")] = 128,
    seq_len: Annotated[int, typer.Option(help="Tokens per window; cut to the model's context.")] = 2048,
    seed: Annotated[int, typer.Option(help="The same seed gives the same recipe.")] = 0,
    device: Device = "auto",
    dtype: Annotated[str, typer.Option(help="Of forwards: auto, float32, bfloat16 or float16.")] = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the recipe.")] = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Choose a scheme for every linear of MODEL under a budget, and write the recipe.

    Examples:

      ptq fit demo --bpw 3.25 --out demo.toml

      ptq quantize demo --recipe demo.toml --out demo-3.25
    """
    quiet_libraries()
    from calibration.errors import ToolkitError
    from cli.progress import TerminalProgress
    from ptq.fitting.budget import parse_budget
    from ptq.fitting.job import prepare_fit
    from ptq.planning.job import Options

    budget = parse_budget(size, bpw, max_ppl_increase)
    if out.exists() and not overwrite:
        raise ToolkitError(f"--out {out}: exists", "choose another name, or pass --overwrite")
    if not out.absolute().parent.is_dir():
        raise ToolkitError(f"--out {out}: no such folder", f"make {out.parent} first")
    options = Options(dataset, samples, seq_len, seed, device, dtype, trust_remote_code=trust_remote_code)
    offered = [text.strip() for text in schemes.split(",") if text.strip()]
    job = prepare_fit(model, method=method, format=format, schemes=offered, options=options)
    job.check(budget)
    with TerminalProgress() as progress:
        sensitivities = job.measure(progress)
    choice = job.solve(sensitivities, budget)
    note = f"{job.job.name} under {budget}: {_summary(choice)}"
    out.write_text(job.recipe(choice, note), encoding="utf-8")
    _print(job, sensitivities, choice)
    print(f"{note}\nwritten to {out}; run it with: ptq quantize {model} --recipe {out} --out DIR")


def _summary(choice: Choice) -> str:
    return (
        f"{choice.bits_per_weight:.4f} bits per weight, {choice.file_bytes / 1e6:.2f} MB at most, "
        f"expected KL {choice.divergence:.4f}, perplexity +{100 * choice.ppl_increase:.2f}%"
    )


def _print(job: Fit, sensitivities: Sensitivities, choice: Choice) -> None:
    """The frontier beside the best uniform settings, and how many linears took which scheme."""
    from collections import Counter

    from rich.table import Table

    from cli.plan_view import wide_console
    from ptq.fitting.budget import Budget

    console, uniform = wide_console(), job.uniform(sensitivities)
    lowest = job.sizes(job.smallest())[0]
    table = Table("budget", "bits/weight", "expected KL", "best uniform", "its KL", box=None, pad_edge=False)
    for quarter in range(8, 23):
        budget = Budget(bpw=quarter / 4)
        if quarter / 4 < lowest:
            continue
        point = job.solve(sensitivities, budget)
        within = [u for u in uniform if u.bits_per_weight <= quarter / 4]
        best = min(within, key=lambda u: u.divergence, default=None)
        named = ("", "") if best is None else (str(best.uniform), f"{best.divergence:.4f}")
        table.add_row(f"{quarter / 4:.2f}", f"{point.bits_per_weight:.4f}", f"{point.divergence:.4f}", *named)
    console.print(table)
    counts = Counter(map(str, choice.schemes.values()))
    detail("chosen: " + ", ".join(f"{count} x {scheme}" for scheme, count in counts.most_common()))
