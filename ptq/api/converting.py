"""Public functions that make a checkpoint of a quantized one: `prepare`, `export`."""

from __future__ import annotations

from pathlib import Path

from calibration.errors import ToolkitError
from ptq.api.inputs import Display, Text, display, text_file
from ptq.conversion import Exported, export_model
from ptq.float_export import export_float
from ptq.preparation import Preparation, Training, prepare_checkpoint


def prepare(
    model: str | Path,
    *,
    out: str | Path,
    dataset: Text | None = None,
    steps: int = 1000,
    batch: int = 4,
    seq_len: int = 2048,
    rank: int = 64,
    rate: float = 1e-4,
    seed: int = 0,
    device: str = "auto",
    overwrite: bool = False,
    trust_remote_code: bool = False,
    progress: Display | None = None,
) -> Preparation:
    """Train what a first quantization broke, and write a float checkpoint to quantize again (PTQ1.61).

    Args:
        model: a quantized checkpoint. The whole model is in memory, in float32.
        dataset: text to train on; as for `quantize`.
        steps, batch: optimizer steps, and sequences of ``seq_len`` tokens in each.
        rank, rate: of the low-rank part that is trained, and the learning rate of AdamW.
        seed: of text, start and dropout.

    Raises:
        ToolkitError: the model is not quantized, settings that make no sense, a text that is too short.
    """
    training = Training(steps=steps, batch=batch, rank=rank, rate=rate, seed=seed)
    with text_file(dataset) as text:
        return prepare_checkpoint(
            model,
            out=out,
            dataset=text,
            seq_len=seq_len,
            training=training,
            device=device,
            overwrite=overwrite,
            trust_remote_code=trust_remote_code,
            progress=display(progress),
        )


def export(
    model: str | Path,
    *,
    out: str | Path,
    format: str,
    adapter: bool = False,
    metadata: str | Path | None = None,
    embeddings: str | None = None,
    head: str | None = None,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    progress: Display | None = None,
) -> Exported:
    """Change the format of a quantized checkpoint: the same codes, laid out anew, read back and compared.

    Args:
        model: a quantized checkpoint; for ``float`` also a GGUF file, and for ``gguf`` also a float checkpoint, whose
            floats are then written as they are.
        out: a folder, or ``FILE.gguf``.
        format: compressed-tensors, awq, gptq, gptq_v2, gguf or native; ``float``: the weights that the codes stand for,
            as an unquantized checkpoint.
        adapter: write low-rank parts (lorc) as a PEFT LoRA adapter into ``out/adapter``.
        metadata: a GGUF file of the same model whose tokenizer a GGUF output takes over.
        embeddings, head: schemes of the token embedding and of the head, or ``float``, where the source has them in
            float. None: as in the source, and q8_0 in GGUF files of quantized checkpoints.

    Raises:
        ToolkitError, PlanError: the input is float and the format another than gguf, or the format cannot hold it.
    """
    if format == "float":
        refused = {"adapter": adapter, "metadata": metadata, "embeddings": embeddings, "head": head}
        names = ", ".join(f"--{name}" for name, value in refused.items() if value)
        if names:
            raise ToolkitError(f"{names}: has no meaning for --format float", "leave it out")
        shown = display(progress)
        return export_float(model, out, overwrite=overwrite, trust_remote_code=trust_remote_code, progress=shown)
    return export_model(
        model,
        format=format,
        out=out,
        adapter=adapter,
        metadata=None if metadata is None else Path(metadata),
        embeddings=embeddings,
        head=head,
        overwrite=overwrite,
        trust_remote_code=trust_remote_code,
        progress=display(progress),
    )
