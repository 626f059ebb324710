"""Memory that a run takes before and after it walks over the blocks, and whether the machine has it."""

from __future__ import annotations

from pathlib import Path

import torch

from calibration.memory import available_bytes
from calibration.progress import Progress
from ptq.devices import evaluation_dtype
from ptq.planning.plan import Plan
from ptq.planning.source import Source

TOKENIZING = 95  # bytes per byte of text, measured with a byte-level BPE of 49 thousand words on wikitext
PUBLISHED = {"wikitext2": 10_900_000}  # bytes of the text that calibration tokenizes


def tokenizing_bytes(source: Source, evaluate: str | None, plan: Plan) -> int:
    """What it takes to tokenize the calibration text and that of ``--eval``, where their sizes are known: whole texts
    at once, one after the other."""
    named = ([source.dataset] if plan.needs_data else []) + ([evaluate] if evaluate else [])
    sizes = [Path(n).stat().st_size if Path(n).is_file() else PUBLISHED.get(n, 0) for n in named]
    return TOKENIZING * max(sizes, default=0)


def evaluating_bytes(source: Source, evaluate: str | None) -> int:
    """What ``--eval`` loads: the float model and the quantized one, both in the dtype of the evaluation."""
    if evaluate is None:
        return 0
    itemsize = evaluation_dtype("auto", source.device).itemsize
    return 2 * itemsize * sum(info.numel for info in source.reader.infos.values())


def tell_short_memory(plan: Plan, device: torch.device, progress: Progress) -> None:
    """A message where the plan needs more memory than is free now. (On a GPU the share of each is not known.)"""
    free, needed = available_bytes(), plan.sizes.peak_bytes
    if free is not None and device.type == "cpu" and needed > free:
        progress.message(
            f"the plan needs about {needed / 1e9:.2f} GB of memory, {free / 1e9:.2f} GB are free: "
            "fewer --samples, a shorter --seq-len or no --eval take less"
        )
