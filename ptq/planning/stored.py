"""Whether the tensors of a checkpoint are those of a float model."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from calibration.architectures import ArchitectureSpec
from calibration.errors import Problem
from calibration.model.checkpoint import CheckpointReader

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
SCALES = (".weight_scale", ".weight_scale_inv", ".weight_zero_point")


def stored_problems(reader: CheckpointReader, spec: ArchitectureSpec) -> Iterable[Problem]:
    """Weights that are no floats (of the blocks, the embeddings, the norms and the head), and steps beside
    them."""
    wrong = [n for n, i in reader.infos.items() if n.endswith(".weight") and i.dtype not in FLOATS]
    if wrong:
        kinds = ", ".join(sorted({str(reader.infos[n].dtype).removeprefix("torch.") for n in wrong}))
        yield Problem(
            some(wrong), f"stored as {kinds}, not as floats", "start from a checkpoint in bfloat16, float16 or float32"
        )
    scales = [n for n in reader.infos if n.startswith(f"{spec.blocks}.") and n.endswith(SCALES)]
    if scales:
        yield Problem(
            some(scales),
            "steps of quantized weights, which config.json does not describe",
            "start from the float checkpoint",
        )


def some(names: list[str]) -> str:
    """The first few names, and how many more there are."""
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
