"""OutlierTune's shift and steps of channels (Wang et al. 2024, arXiv 2406.18832).

There is one definition of the shift, used for the steps and in the model. (The published code divides the sum of
midpoints by a fixed 512 and drops negative shifts where it computes the steps, but not where it runs.)
"""

from __future__ import annotations

import torch

from ptq.numerics.integers import round_scale

FLOOR = 1e-5  # channels whose largest value is smaller carry nothing and keep the step 1


def shift_of(total: torch.Tensor, sequences: int) -> torch.Tensor:
    """z ``[channels]``: the mean over sequences of the midpoint between a channel's smallest and largest value."""
    return total / max(sequences, 1)


def channel_steps(low: torch.Tensor, high: torch.Tensor, shift: torch.Tensor, bits: int) -> torch.Tensor:
    """s = max|x - z| / (2^(bits-1) - 1), ``[channels]``, from the extremes of x before the shift."""
    largest = torch.maximum(high - shift, shift - low)
    return torch.where(largest < FLOOR, 1.0, largest / (2 ** (bits - 1) - 1))


def covering_scale(largest: float, bits: int) -> torch.Tensor:
    """float32 ``[1]``: the step of codes up to 2^(bits-1) - 1 that reaches ``largest`` without clipping. Steps of
    channels are in the weights already: it is 1 but for the rounding of stored gains."""
    return covering(largest / (2 ** (bits - 1) - 1))


def covering(step: float) -> torch.Tensor:
    """float32 ``[1]``: the next step from ``step`` up that is exact in bfloat16 and float16, to a millionth."""
    wanted = torch.tensor([step])
    scale = round_scale(wanted)
    return scale if bool(scale >= wanted * (1 - 1e-6)) else round_scale(wanted * (1 + 2.0**-7))
