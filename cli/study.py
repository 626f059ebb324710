"""``ptq study``: questions that many runs of one model answer."""

from __future__ import annotations

from typing import Annotated

import typer

from cli.options import Device, Model, Out, Overwrite, TrustRemoteCode, entries
from cli.scheme_hint import Command
from cli.verbosity import detail, with_verbosity

app = typer.Typer(help="Questions that many runs of one model answer.", no_args_is_help=True, rich_markup_mode="rich")


@app.command("calibration", cls=Command)
@with_verbosity
def calibration(
    model: Model,
    out: Out,
    method: Annotated[str, typer.Option(help="As of ptq quantize.")] = "gptq",
    scheme: Annotated[str | None, typer.Option(help="As of ptq quantize.")] = None,
    datasets: Annotated[
        str, typer.Option(help="Comma-separated: names and files as of ptq quantize, generated, random.")
    ] = "wikitext2,c4,generated,random",
    samples: Annotated[str, typer.Option(help="Calibration windows, comma-separated.")] = "8,32,128",
    seq_len: Annotated[str, typer.Option(help="Tokens per window, comma-separated.")] = "2048",
    seeds: Annotated[int, typer.Option(help="Runs per setting, with seeds 0, 1, ...")] = 3,
    eval: Annotated[str | None, typer.Option("--eval", help="Text to score on; as of ptq eval.")] = None,
    window: Annotated[
        int | None, typer.Option(help="Tokens per scoring window. Default: the longest --seq-len.")
    ] = None,
    windows: Annotated[int | None, typer.Option(help="Score that many windows only.")] = None,
    device: Device = "auto",
    dtype: Annotated[str, typer.Option(help="Of scoring: auto (float32 on CPU), float32, bfloat16, float16.")] = "auto",
    overwrite: Overwrite = False,
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted study.")] = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """How much the choice of calibration text matters: perplexity over data sets, sizes, lengths and seeds.

    Example:

      ptq study calibration demo --scheme w3a16-g128 --datasets builtin,generated,random --samples 8,32 --seq-len 512 \\
          --out study
    """
    from cli.progress import TerminalProgress, load_libraries

    sizes, lengths = _integers("--samples", samples), _integers("--seq-len", seq_len)
    texts = entries("--datasets", datasets)
    load_libraries("study_calibration")
    import ptq
    from ptq.report.calibration_markdown import render

    with TerminalProgress() as progress:
        study = ptq.study_calibration(
            model,
            out=out,
            method=method,
            scheme=scheme,
            datasets=texts,
            samples=sizes,
            seq_lens=lengths,
            seeds=seeds,
            evaluate=eval,
            window=window,
            windows=windows,
            device=device,
            dtype=dtype,
            overwrite=overwrite,
            resume=resume,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
    detail(render(study))
    print(f"written to {out}")


@app.command("sensitivity", cls=Command)
@with_verbosity
def sensitivity(
    model: Model,
    out: Out,
    schemes: Annotated[str, typer.Option(help="Weight schemes, comma-separated.")] = "w2a16,w3a16,w4a16",
    dataset: Annotated[str | None, typer.Option(help="Calibration text, as of ptq quantize.")] = None,
    samples: Annotated[int, typer.Option(help="Calibration windows.")] = 32,
    seq_len: Annotated[int, typer.Option(help="Tokens per window; cut to the model's context.")] = 2048,
    seed: Annotated[int, typer.Option(help="Of the calibration windows.")] = 0,
    windows: Annotated[int, typer.Option(help="The first of them, on which divergence is measured as well.")] = 4,
    device: Device = "auto",
    dtype: Annotated[str, typer.Option(help="Of forwards: auto, float32, bfloat16 or float16.")] = "auto",
    overwrite: Overwrite = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """What rounding each linear alone costs: the layer objective, the divergence of the model, and their ranks."""
    from cli.progress import TerminalProgress, load_libraries

    offered = entries("--schemes", schemes)
    load_libraries("study_sensitivity")
    import ptq
    from ptq.report.sensitivity_markdown import render

    with TerminalProgress() as progress:
        study = ptq.study_sensitivity(
            model,
            out=out,
            schemes=offered,
            dataset=dataset,
            samples=samples,
            seq_len=seq_len,
            seed=seed,
            windows=windows,
            device=device,
            dtype=dtype,
            overwrite=overwrite,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
    detail(render(study))
    print(f"written to {out}")


def _integers(option: str, text: str) -> tuple[int, ...]:
    from calibration.errors import ToolkitError

    found = entries(option, text)
    if not all(word.isdecimal() and int(word) > 0 for word in found):
        raise ToolkitError(f"{option} {text}: not positive whole numbers", "write them as 8 or 8,32,128")
    return tuple(int(word) for word in found)
