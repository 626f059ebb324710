"""``ptq export``"""

from __future__ import annotations

from typing import Annotated

import typer

from cli.options import Embeddings, Head, Metadata, Model, Out, Overwrite, TrustRemoteCode


def export(
    model: Model,
    out: Out,
    format: Annotated[str, typer.Option(help="compressed-tensors, awq, gptq, gptq_v2, gguf, native or float.")],
    adapter: Annotated[
        bool, typer.Option("--adapter", help="Write low-rank parts (lorc) as a PEFT LoRA adapter into OUT/adapter.")
    ] = False,
    metadata: Metadata = None,
    embeddings: Embeddings = None,
    head: Head = None,
    overwrite: Overwrite = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Change the format of a quantized checkpoint: the same codes, laid out anew; or make floats of it again.

    A float checkpoint becomes a GGUF file in its own dtype: ptq export MODEL --format gguf --out FILE.gguf
    """
    from cli.progress import TerminalProgress, load_libraries

    load_libraries("export")
    import ptq

    with TerminalProgress() as progress:
        written = ptq.export(
            model,
            format=format,
            out=out,
            adapter=adapter,
            metadata=metadata,
            embeddings=embeddings,
            head=head,
            overwrite=overwrite,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
    if written.linears:
        print(f"written to {out} as {written.format}; every linear read back and compared")
    else:
        compared = "; every tensor read back and compared" if written.format == "gguf" else ""
        print(f"written to {out} as floats{compared}")
