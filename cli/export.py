"""``ptq export``"""

from __future__ import annotations

from typing import Annotated

import typer

from cli.options import Model, Out, Overwrite, TrustRemoteCode, quiet_libraries


def export(
    model: Model,
    out: Out,
    format: Annotated[str, typer.Option(help="compressed-tensors, awq, gptq, gptq_v2 or native.")],
    adapter: Annotated[
        bool, typer.Option("--adapter", help="Write low-rank parts (lorc) as a PEFT LoRA adapter into OUT/adapter.")
    ] = False,
    overwrite: Overwrite = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Change the format of a quantized checkpoint: the same codes, laid out anew."""
    quiet_libraries()
    import ptq
    from cli.progress import TerminalProgress

    with TerminalProgress() as progress:
        written = ptq.export(
            model,
            format=format,
            out=out,
            adapter=adapter,
            overwrite=overwrite,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
    print(f"written to {out} as {written.format}; every linear read back and compared")
