"""What every rounding pass does with its result: measure it, and put it in place of the weight."""

from __future__ import annotations

import torch

from calibration.segment import Segment
from ptq.numerics.objective import output_error
from ptq.quantized import QuantizedTensor


def put(segment: Segment, linear: str, q: QuantizedTensor, gram: torch.Tensor | None) -> None:
    """Store ``q`` for a linear; its weight becomes the dequantized one, and its errors go into the record.

    Args:
        gram: Gram matrix ``[in, in]`` of the linear's input, or None where no data were gathered.
    """
    w = segment.weight(linear)
    rounded = q.dequantize(w.dtype)
    energy = float(w.square().sum())
    errors = {"weight": float((rounded - w).square().sum()) / energy if energy > 0 else 0.0}
    if gram is not None:
        errors["output"] = output_error(w, rounded, gram)
    segment.errors[linear] = errors
    segment.quantized[linear] = q
    segment.set_weight(linear, rounded)
