"""What every rounding pass does with its result: measure it, and put it in place of the weight."""

from __future__ import annotations

import torch

from calibration.walk.segment import Segment
from ptq.numerics.grids import global_scale_of, two_levels
from ptq.numerics.objective import output_error, row_chunks
from ptq.quantized import QuantizedTensor

CHUNK = 1_000_000  # bytes of a weight at a time, which stay in cache


def global_scales(segment: Segment) -> dict[str, torch.Tensor]:
    """The scale of the whole tensor ``[1]`` for every linear whose scheme has two levels (NVFP4).

    Linears of one scheme that read the same input share one, from their joint largest weight: engines run them as one
    matrix. To be asked for before any of them is rounded.
    """
    found: dict[str, torch.Tensor] = {}
    for shared in segment.spec.inputs:
        schemes = segment.schemes
        linears = [name for name in shared.linears if name in schemes and two_levels(schemes[name].weights)]
        for scheme in dict.fromkeys(schemes[name] for name in linears):
            members = [name for name in linears if schemes[name] == scheme]
            largest = torch.stack([segment.weight(name).abs().amax() for name in members]).amax()
            scale = global_scale_of(largest, scheme.weights)
            if scale is not None:
                found |= dict.fromkeys(members, scale)
    return found


def record_errors(
    segment: Segment, linear: str, w: torch.Tensor, changed: torch.Tensor, gram: torch.Tensor | None
) -> None:
    """Relative errors of ``changed`` against the weight ``w`` that it stands for go into the record.

    Args:
        gram: Gram matrix ``[in, in]`` of the linear's input, or None where no data were gathered.
    """
    energy = error = 0.0
    for rows in row_chunks(*w.shape, size=CHUNK):
        energy += float(w[rows].square().sum())
        error += float((changed[rows] - w[rows]).square_().sum())
    errors = {"weight": error / energy if energy > 0 else 0.0}
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
