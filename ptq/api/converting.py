"""Public functions that make a checkpoint of a quantized one: `prepare`, `export`."""

from __future__ import annotations

from pathlib import Path

from ptq.api.inputs import Display, Text, display, text_file
from ptq.conversion import Exported, export_model
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
    overwrite: bool = False,
    trust_remote_code: bool = False,
    progress: Display | None = None,
) -> Exported:
    """Change the format of a quantized checkpoint: the same codes, laid out anew, read back and compared.

    Args:
        format: compressed-tensors, awq, gptq, gptq_v2 or native.
        adapter: write low-rank parts (lorc) as a PEFT LoRA adapter into ``out/adapter``.

    Raises:
        ToolkitError, PlanError: the input is not quantized, or the format cannot hold it.
    """
    return export_model(
        model,
        format=format,
        out=out,
        adapter=adapter,
        overwrite=overwrite,
        trust_remote_code=trust_remote_code,
        progress=display(progress),
    )
