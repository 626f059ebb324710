"""Memory that a run takes before and after it walks over the blocks, and whether the machine has it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from calibration.memory import available_bytes
from calibration.model.classes import text_config
from calibration.progress import Progress
from calibration.scoring.perplexity import CHUNK_ELEMENTS
from calibration.text.pieces import PIECE, folder_cuts_freely
from ptq.devices import evaluation_dtype
from ptq.evaluation import EVAL_TOKENS
from ptq.planning.peak import LIBRARIES, WITH_TEXT
from ptq.planning.plan import Plan
from ptq.planning.source import Source
from ptq.planning.texts import CALIBRATED, text_bytes

TOKENIZING = 95  # bytes per byte of text, measured with a byte-level BPE of 49 thousand words on wikitext
HOLDING = 12  # bytes per byte of text that is tokenized in pieces: file, rows, one string, tokens
SCORING = 6  # pieces of float32 logits of both models, their log-probabilities and products
CODES = 1.1  # bytes per weight of a quantized linear as it is loaded: codes and float32 steps


def tokenizing_bytes(source: Source, evaluate: str | None, plan: Plan) -> int:
    """What it takes to tokenize the calibration text and that of ``--eval``, where their sizes are known, one after the
    other."""
    return text_bytes_held(source, ([source.dataset] if plan.needs_data else []) + ([evaluate] if evaluate else []))


def text_bytes_held(source: Source, names: Sequence[str]) -> int:
    """What it takes to tokenize the largest of some texts: in pieces where the tokenizer allows it."""
    largest = max((text_bytes(name, CALIBRATED) for name in names), default=0)
    if largest > PIECE and folder_cuts_freely(source.folder):
        return TOKENIZING * PIECE + HOLDING * largest
    return TOKENIZING * largest


def evaluating_bytes(source: Source, evaluate: str | None, windows: int | None, plan: Plan) -> int:
    """What ``--eval`` holds: the float model and the quantized one, its linears as codes of a byte (the kernel that all
    machines have), logits of both for a batch of windows, and the larger of a forward pass and of a comparison.

    Args:
        windows: at most so many are scored.
    """
    if evaluate is None:
        return 0
    itemsize, config = evaluation_dtype("auto", source.device).itemsize, text_config(source.config)
    weights, quantized = sum(info.numel for info in source.reader.infos.values()), plan.sizes.quantized_weights
    models = itemsize * (2 * weights - quantized) + round(CODES * quantized)
    tokens = max(1, min(EVAL_TOKENS // source.seq_len, windows or EVAL_TOKENS)) * source.seq_len
    logits = tokens * int(config.vocab_size)
    widest = max((max(linear.shape) for linear in plan.layout.linears), default=0)
    forward = itemsize * tokens * (3 * widest + 4 * int(config.hidden_size))
    comparing = 4 * SCORING * min(CHUNK_ELEMENTS, source.seq_len * int(config.vocab_size))
    return models + 2 * itemsize * logits + max(forward, comparing) + LIBRARIES + WITH_TEXT


def tell_short_memory(plan: Plan, device: torch.device, progress: Progress) -> None:
    """A message where the plan needs more memory than is free now. (On a GPU the share of each is not known.)"""
    free, needed = available_bytes(), plan.sizes.peak_bytes
    if free is not None and device.type == "cpu" and needed > free:
        progress.message(
            f"the plan needs about {needed / 1e9:.2f} GB of memory, {free / 1e9:.2f} GB are free: "
            "fewer --samples, a shorter --seq-len or no --eval take less"
        )
