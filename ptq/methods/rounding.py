"""What every rounding pass does with its result: measure it, and put it in place of the weight."""

from __future__ import annotations

import torch

from calibration.segment import Segment
from ptq.numerics.objective import output_error
from ptq.quantized import QuantizedTensor


def record_errors(
    segment: Segment, linear: str, w: torch.Tensor, changed: torch.Tensor, gram: torch.Tensor | None
) -> None:
    """Relative errors of ``changed`` against the weight ``w`` that it stands for go into the record.

    Args:
        gram: Gram matrix ``[in, in]`` of the linear's input, or None where no data were gathered.
    """
    energy = float(w.square().sum())
    errors = {"weight": float((changed - w).square().sum()) / energy if energy > 0 else 0.0}
    if gram is not None:
        errors["output"] = output_error(w, changed, gram)
    segment.errors[linear] = errors


def put(segment: Segment, linear: str, q: QuantizedTensor, gram: torch.Tensor | None) -> None:
    """Store ``q`` for a linear; its weight becomes the dequantized one. ``gram`` as in `record_errors`."""
    w = segment.weight(linear)
    rounded = q.dequantize(w.dtype)
    record_errors(segment, linear, w, rounded, gram)
    segment.quantized[linear] = q
    segment.set_weight(linear, rounded)
