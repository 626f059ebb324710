"""How fast a model decodes: the same tokens several times, the fastest counts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ptq.runtime.generate import decode_tokens, weight_bytes_per_token


@dataclass(frozen=True)
class Speed:
    """Attributes:
    prefill_seconds: of the whole prompt, the fastest repeat.
    tokens_per_second: of decoding behind it, the fastest repeat: whatever else the machine does only adds time.
    weight_bytes: read by one decoding step if nothing is skipped.
    """

    prefill_seconds: float
    tokens_per_second: float
    weight_bytes: int


def measure_speed(model: Any, input_ids: torch.Tensor, new_tokens: int, repeats: int) -> Speed:
    """Greedy decoding of ``new_tokens`` behind ``input_ids [1, n]``, once to warm up and then ``repeats`` times."""
    decode_tokens(model, input_ids, min(4, new_tokens))
    prefill, step = float("inf"), float("inf")
    for _ in range(repeats):
        _, times = decode_tokens(model, input_ids, new_tokens)
        prefill = min(prefill, times[1] - times[0])
        step = min(step, (times[-1] - times[1]) / (len(times) - 2))
    return Speed(prefill, 1 / step, weight_bytes_per_token(model))
