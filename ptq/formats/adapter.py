"""Low-rank corrections as a PEFT LoRA adapter, for programs that load the base in another format.

``adapter_model.safetensors`` holds ``base_model.model.<linear>.lora_A.weight`` ``[rank, in]`` and ``.lora_B.weight``
``[out, rank]``, float32, and ``adapter_config.json`` has ``lora_alpha = r``, so that PEFT adds exactly B A. A holds our
codes, which bfloat16 holds exactly too; the scales are in B. Source: PEFT 0.21, ``peft/tuners/lora``.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from calibration.errors import Problem
from calibration.model.checkpoint import CheckpointReader, save_tensors, write_atomically
from ptq.formats.checks import NATIVE, conv1d_problems, matching, refuse
from ptq.formats.write import Source
from ptq.linears import ModelLayout
from ptq.quantized import LORA, QuantizedTensor

FOLDER = "adapter"  # below the checkpoint that it belongs to
TENSORS = "adapter_model.safetensors"
PREFIX = "base_model.model."


def adapter_problems(layout: ModelLayout) -> list[Problem]:
    """Why low-rank parts of this model cannot be an adapter."""
    if not set(LORA) & set(layout.parts):
        fix = "leave --adapter out, or quantize with a method that ends in +lorc"
        return [Problem("--adapter", "the checkpoint has no low-rank parts", fix)]
    experts = matching(layout, lambda linear: linear.expert is not None)
    reason = "is part of an expert, which transformers keeps in one tensor that an adapter does not reach"
    return [*refuse(experts, reason, NATIVE), *conv1d_problems(layout, "a PEFT adapter")]


def base_of(layout: ModelLayout) -> ModelLayout:
    """The same model without its low-rank parts."""
    linears = tuple(dataclasses.replace(linear, part_bits=0) for linear in layout.linears)
    return dataclasses.replace(layout, linears=linears, parts=tuple(p for p in layout.parts if p not in LORA))


def without_low_rank(source: Source) -> Source:
    """The same linears without their low-rank parts."""

    def blocks() -> Iterator[tuple[dict[str, QuantizedTensor], dict[str, torch.Tensor]]]:
        for quantized, others in source():
            yield {name: _strip(q) for name, q in quantized.items()}, others

    return blocks


def _strip(q: QuantizedTensor) -> QuantizedTensor:
    return dataclasses.replace(q, parts={name: part for name, part in q.parts.items() if name not in LORA})


def write_adapter(source: Source, folder: Path, advance: Callable[[str], None]) -> None:
    """Write the low-rank parts of all linears into the new folder ``folder``."""
    tensors: dict[str, torch.Tensor] = {}
    names: list[str] = []
    rank = 0
    for quantized, _ in source():
        for name, q in quantized.items():
            if q.low_rank is not None:
                b, a, scale = q.low_rank
                tensors[f"{PREFIX}{name}.lora_A.weight"] = a.float()
                tensors[f"{PREFIX}{name}.lora_B.weight"] = b.float() * scale
                names.append(name)
                assert rank in (0, len(scale)), "one pass gives every linear the same rank"
                rank = len(scale)
            advance(name)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": names,
    }
    folder.mkdir()
    save_tensors(folder / TENSORS, tensors)
    write_atomically(folder / "adapter_config.json", (json.dumps(config, indent=2) + "\n").encode())


def read_adapter(checkpoint: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Low-rank parts of the adapter that was written with a checkpoint, by full name of the linear; else nothing."""
    path = checkpoint / FOLDER / TENSORS
    if not path.is_file():
        return {}
    found: dict[str, dict[str, torch.Tensor]] = {}
    with CheckpointReader.of_file(path) as file:
        for key in file.infos:
            name, _, kind = key.removeprefix(PREFIX).removesuffix(".weight").rpartition(".")
            found.setdefault(name, {})[kind.lower()] = file.tensor(key)
    return {name: {**parts, "lora_scale": torch.ones(len(parts["lora_a"]))} for name, parts in found.items()}
