"""``ptq analyze``"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli.json_output import json_output
from cli.options import (
    Device,
    DryRun,
    Model,
    Overwrite,
    PlanJson,
    PlannedOut,
    TrustRemoteCode,
    command_line,
    entries,
    needed,
)
from cli.verbosity import detail

if TYPE_CHECKING:
    from ptq.analysis.record import AnalysisRecord


def analyze(
    model: Model,
    out: PlannedOut = None,
    dataset: Annotated[str | None, typer.Option(help="Text to run, as for `ptq quantize`.")] = None,
    samples: Annotated[int, typer.Option(help="Windows of text.")] = 32,
    seq_len: Annotated[int, typer.Option(help="Tokens per window; cut to the model's context.")] = 512,
    seed: Annotated[int, typer.Option(help="The same seed gives the same text.")] = 0,
    clipped_softmax: Annotated[
        bool,
        typer.Option(
            "--clipped-softmax",
            help="Also try other softmaxes in the finished model: what they cost, and what they do to outliers. Holds "
            "the whole model in memory; everything else holds one block.",
        ),
    ] = False,
    gated: Annotated[
        bool, typer.Option("--gated", help="With --clipped-softmax: gates too, and every head shut by itself.")
    ] = False,
    softmax: Annotated[
        list[str] | None, typer.Option(help="With --clipped-softmax: one more to try, as for `ptq eval`; repeatable.")
    ] = None,
    head_windows: Annotated[
        int, typer.Option(help="With --clipped-softmax: windows on which single heads are judged; 0: none.")
    ] = 2,
    sensitivity: Annotated[
        str | None, typer.Option(help="Weight schemes, comma-separated: also what rounding each linear alone costs.")
    ] = None,
    try_advice: Annotated[
        bool,
        typer.Option("--try", help="Also carry out the advised recipes and score them. Holds the model in memory."),
    ] = False,
    windows: Annotated[
        int, typer.Option(help="Windows that --clipped-softmax and --try score; the others set ranges and calibrate.")
    ] = 16,
    probe_windows: Annotated[int, typer.Option(help="Windows that --sensitivity measures divergence on.")] = 4,
    device: Device = "auto",
    dtype: Annotated[str, typer.Option(help="Of forward passes: auto, float32, bfloat16 or float16.")] = "auto",
    overwrite: Overwrite = False,
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted analysis with --try.")] = False,
    dry_run: DryRun = False,
    json: PlanJson = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Find what makes MODEL hard to quantize, float or quantized: outliers of activations and weights.

    Examples:

      ptq analyze demo --out demo-analysis

      ptq analyze demo --clipped-softmax --gated --out demo-heads
    """
    from cli.plan_view import print_outlook
    from cli.progress import TerminalProgress, load_libraries

    place = needed(out, dry_run)
    load_libraries("analyze")
    import ptq

    options: Any = {
        "dataset": dataset,
        "samples": samples,
        "seq_len": seq_len,
        "seed": seed,
        "clipped_softmax": clipped_softmax,
        "gated": gated,
        "softmax": tuple(softmax or ()),
        "head_windows": head_windows,
        "sensitivity": entries("--sensitivity", sensitivity) if sensitivity else (),
        "try_advice": try_advice,
        "windows": windows,
        "probe_windows": probe_windows,
        "device": device,
        "dtype": dtype,
        "overwrite": overwrite,
        "resume": resume,
        "trust_remote_code": trust_remote_code,
    }
    with json_output(json, dry_run) as write:
        if dry_run:
            print_outlook(outlook := ptq.plan_analyze(model, out=out, **options))
            write(outlook.to_json())
            return
    with TerminalProgress() as progress:
        record = ptq.analyze(model, out=place, **options, progress=progress, command=command_line())
    _print(record)
    print(f"written to {out}: report.html, report.md, report.json, channels.safetensors")


def _print(record: AnalysisRecord) -> None:
    from ptq.report.figures import perplexity, short

    for key, words in (("with_first_token", "all tokens"), ("without_first_token", "without first tokens")):
        found = record.summary[key]
        if found:
            detail(
                f"{words}: max infinity norm {short(found['max_inf_norm'])} ({found['max_inf_norm_at']}), "
                f"avg kurtosis {short(found['avg_kurtosis'])}, max kurtosis {short(found['max_kurtosis'])}"
            )
    for role, channels in record.summary["outlier_channels"].items():
        detail(f"outlier channels in {role}: {', '.join(map(str, list(channels)[:12]))}")
    for advice in record.advice:
        detail(f"{advice.rule}: {advice.finding}")
        for words in advice.helps:
            detail(f"  {'helps' if advice.alarm else 'try'}: {words}")
        for words in advice.cannot:
            detail(f"  cannot help: {words}")
    if record.softmax is not None:
        for row in record.softmax.rows:
            norm, kurtosis = (row.with_first_token.get(key) for key in ("max_inf_norm", "avg_kurtosis"))
            detail(
                f"{row.softmax}: perplexity {row.perplexity:.4f}, zeros {row.zeros:.2%}, max infinity norm "
                f"{short(norm)}, avg kurtosis {short(kurtosis)}, 8-bit perplexity {perplexity(row.perplexity_8_bit)}"
            )
        detail(record.softmax.finding)
    for said in record.verdicts:
        detail(said)
