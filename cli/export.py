"""``ptq export``"""

from __future__ import annotations

from typing import Annotated

import typer

from cli.options import Embeddings, Head, Metadata, Model, Out, Overwrite, TrustRemoteCode, quiet_libraries


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
    """Change the format of a quantized checkpoint: the same codes, laid out anew."""
    quiet_libraries()
    import dataclasses

    from calibration.errors import ToolkitError
    from calibration.model.checkpoint import CheckpointReader
    from calibration.model.opening import locate, weights_fingerprint
    from cli.progress import TerminalProgress
    from ptq.conversion import export_model
    from ptq.float_export import export_float
    from sparsity.files import load_sparsity, save_sparsity

    if format == "float":
        refused = {"--adapter": adapter, "--metadata": metadata, "--embeddings": embeddings, "--head": head}
        if any(refused.values()):
            names = ", ".join(name for name, value in refused.items() if value)
            raise ToolkitError(f"{names}: has no meaning for --format float", "leave it out")
        with TerminalProgress() as progress:
            export_float(model, out, overwrite=overwrite, trust_remote_code=trust_remote_code, progress=progress)
        print(f"written to {out} as floats")
        return
    sparsity = load_sparsity(locate(model))
    if sparsity is not None and format == "gguf":
        raise ToolkitError(f"{model}: has thresholds of pruning, for which 'gguf' has no place", "use --format native")
    with TerminalProgress() as progress:
        fmt = export_model(
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
    if sparsity is not None:  # the codes are the same, so the thresholds fit
        with CheckpointReader(out) as reader:
            save_sparsity(dataclasses.replace(sparsity, base=weights_fingerprint(reader)), out)
    print(f"written to {out} as {fmt.name}; every linear read back and compared")
