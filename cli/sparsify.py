"""``ptq sparsify``"""

from __future__ import annotations

from typing import Annotated, Any

import typer

from cli.json_output import json_output
from cli.options import Device, DryRun, Model, Overwrite, PlanJson, PlannedOut, TrustRemoteCode, needed, percentage
from cli.verbosity import detail


def sparsify(
    model: Model,
    method: Annotated[str, typer.Option(help="One of:")],
    out: PlannedOut = None,
    target: Annotated[
        str | None,
        typer.Option(
            help="Share pruned at every site; or by name for scap and teal: down_proj=0.6,*=0.4. Default: 0.5."
        ),
    ] = None,
    skip_bytes: Annotated[
        float | None, typer.Option(help="Instead of --target: share of the bytes of all linears to skip per token.")
    ] = None,
    max_ppl_increase: Annotated[
        str | None, typer.Option(help="Instead of --target: as sparse as it gets with the perplexity up by 1%.")
    ] = None,
    search_text: Annotated[
        str | None, typer.Option(help="Text for --max-ppl-increase. Default: other windows of the calibration text.")
    ] = None,
    dataset: Annotated[str | None, typer.Option(help="Calibration text, as for `ptq quantize`.")] = None,
    samples: Annotated[int, typer.Option(help="Calibration windows.")] = 64,
    seq_len: Annotated[int, typer.Option(help="Tokens per window; cut to the model's context.")] = 2048,
    seed: Annotated[int, typer.Option(help="The same seed gives the same bytes.")] = 0,
    device: Device = "auto",
    dtype: Annotated[str, typer.Option(help="Of calibration forwards: auto, float32, bfloat16 or float16.")] = "auto",
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    json: PlanJson = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Find activation thresholds for MODEL, float or quantized, and write them beside a copy of its weights.

    Examples:

      ptq sparsify demo --method chess --target 0.5 --out demo-chess

      ptq sparsify demo --method teal --max-ppl-increase 1% --out demo-teal

      ptq eval demo-chess --reference demo --dataset builtin
    """
    increase = None if max_ppl_increase is None else percentage("--max-ppl-increase", max_ppl_increase)
    from cli.plan_view import print_outlook
    from cli.progress import TerminalProgress, load_libraries

    place = needed(out, dry_run)
    load_libraries("sparsify")
    import ptq

    options: Any = {
        "method": method,
        "target": target,
        "skip_bytes": skip_bytes,
        "max_ppl_increase": increase,
        "search_text": search_text,
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
            print_outlook(outlook := ptq.plan_sparsify(model, out=out, **options))
            write(outlook.to_json())
            return
    with TerminalProgress() as progress:
        sparsity = ptq.sparsify(model, out=place, **options, progress=progress)
    found = sparsity.settings.get("search")
    if found is not None:
        shares = ", ".join(f"{share:.2f}" for share in found["targets"])
        detail(f"targets by block: {shares}; perplexity {found['perplexity_increase']:+.2%} on the search text")
    if sparsity.shared:
        detail(f"{len(sparsity.shared)} sites of experts with too few calibration tokens took the pool of their layer")
    most = max(sparsity.reached.values(), default=0.0)
    if most > sparsity.target + 0.1:
        detail(f"up to {most:.1%} of the values of a site are pruned: values that tie, such as zeros, go together")
    print(f"{sparsity.method} {sparsity.target:.4g}: {len(sparsity.sites)} sites, written to {out}")
