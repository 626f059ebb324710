"""``ptq prepare``"""

from __future__ import annotations

from typing import Annotated

import typer

from cli.options import Device, Model, Out, Overwrite, TrustRemoteCode


def prepare(
    model: Model,
    out: Out,
    dataset: Annotated[str | None, typer.Option(help="Text to train on; names and files as for quantize.")] = None,
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 1000,
    batch: Annotated[int, typer.Option(help="Sequences per step.")] = 4,
    seq_len: Annotated[int, typer.Option(help="Tokens per sequence; cut to the model's context.")] = 2048,
    rank: Annotated[int, typer.Option(help="Of the low-rank part that is trained.")] = 64,
    rate: Annotated[float, typer.Option(help="Learning rate of AdamW.")] = 1e-4,
    seed: Annotated[int, typer.Option(help="Of text, start and dropout.")] = 0,
    device: Device = "auto",
    overwrite: Overwrite = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Train what a first quantization broke, and write a float checkpoint to quantize again (PTQ1.61).

    MODEL is a quantized checkpoint. The whole model is in memory, in float32.

    Examples:

      ptq quantize M --method ptq1.61 --out Q && ptq prepare Q --out P && ptq quantize P --method ptq1.61 --out R
    """
    from cli.progress import TerminalProgress, load_libraries

    load_libraries("prepare")
    import ptq

    with TerminalProgress() as progress:
        found = ptq.prepare(
            model,
            out=out,
            dataset=dataset,
            steps=steps,
            batch=batch,
            seq_len=seq_len,
            rank=rank,
            rate=rate,
            seed=seed,
            device=device,
            overwrite=overwrite,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
    change = f"loss {found.first_loss:.4f} -> {found.last_loss:.4f} nats per token"
    print(f"{change}; float checkpoint written to {out}")
