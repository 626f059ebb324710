"""``ptq analyze``"""

from __future__ import annotations

from typing import Annotated

import typer

from cli.options import Device, Model, Out, Overwrite, TrustRemoteCode, command_line, quiet_libraries


def analyze(
    model: Model,
    out: Out,
    dataset: Annotated[str | None, typer.Option(help="Text to run, as for `ptq quantize`.")] = None,
    samples: Annotated[int, typer.Option(help="Windows of text.")] = 32,
    seq_len: Annotated[int, typer.Option(help="Tokens per window; cut to the model's context.")] = 512,
    seed: Annotated[int, typer.Option(help="The same seed gives the same text.")] = 0,
    device: Device = "auto",
    dtype: Annotated[str, typer.Option(help="Of forward passes: auto, float32, bfloat16 or float16.")] = "auto",
    overwrite: Overwrite = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Find what makes MODEL hard to quantize, float or quantized: outliers of activations and weights.

    Examples:

      ptq analyze demo --out demo-analysis
    """
    quiet_libraries()
    from cli.progress import TerminalProgress
    from ptq.analysis.job import analyze as run
    from ptq.report.analysis_markdown import number

    with TerminalProgress() as progress:
        record = run(
            model,
            out=out,
            overwrite=overwrite,
            progress=progress,
            dataset=dataset,
            samples=samples,
            seq_len=seq_len,
            seed=seed,
            device=device,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            command=command_line(),
        )
    for key, words in (("with_first_token", "all tokens"), ("without_first_token", "without first tokens")):
        found = record.summary[key]
        if found:
            print(
                f"{words}: max infinity norm {number(found['max_inf_norm'])} ({found['max_inf_norm_at']}), "
                f"avg kurtosis {number(found['avg_kurtosis'])}, max kurtosis {number(found['max_kurtosis'])}"
            )
    for role, channels in record.summary["outlier_channels"].items():
        print(f"outlier channels in {role}: {', '.join(map(str, list(channels)[:12]))}")
    for advice in record.advice:
        print(f"{advice.rule}: {advice.finding}")
        for words in advice.helps:
            print(f"  {'helps' if advice.alarm else 'try'}: {words}")
        for words in advice.cannot:
            print(f"  cannot help: {words}")
    print(f"written to {out}: report.html, report.md, report.json, channels.safetensors")
