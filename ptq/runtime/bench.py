"""How fast a model decodes: the same tokens several times, the fastest step counts."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ptq.runtime.decoding.native import Inputs
from ptq.runtime.generate import decode_tokens, weight_bytes_per_token


@dataclass(frozen=True)
class Speed:
    """Attributes:
    prefill_seconds: of the whole prompt, the fastest repeat.
    tokens_per_second: of the fastest decoding step behind it. Steps do the same work (but for a cache that grows by
        one position), and whatever else the machine does only adds time.
    weight_bytes: read by one decoding step if nothing is skipped.
    one_call: steps were one call each, see `decode_tokens`.
    """

    prefill_seconds: float
    tokens_per_second: float
    weight_bytes: int
    one_call: bool


def measure_speed(
    model: Any,
    input_ids: torch.Tensor,
    new_tokens: int,
    repeats: int,
    settings: Sequence[Callable[[], None]] = (lambda: None,),
    inputs: Inputs = "int15",
) -> list[Speed]:
    """Greedy decoding of ``new_tokens`` behind ``input_ids [1, n]``, once to warm up and then ``repeats`` times.

    Args:
        settings: called before each repeat, by turns, so that what is compared is measured in the same minutes.
        inputs: see `decode_tokens`.

    Returns:
        one speed for each setting.
    """
    decode_tokens(model, input_ids, 3, inputs=inputs)
    prefill, step = [float("inf")] * len(settings), [float("inf")] * len(settings)
    one_call = [True] * len(settings)
    for _ in range(repeats):
        for number, setting in enumerate(settings):
            setting()
            _, times, taken_over = decode_tokens(model, input_ids, new_tokens, inputs=inputs)
            one_call[number] &= taken_over
            prefill[number] = min(prefill[number], times[1] - times[0])
            step[number] = min(step[number], *(b - a for a, b in itertools.pairwise(times[1:])))
    size = weight_bytes_per_token(model)
    return [Speed(first, 1 / seconds, size, how) for first, seconds, how in zip(prefill, step, one_call, strict=True)]
