"""What every rounding pass does with its result: measure it, and put it in place of the weight."""

from __future__ import annotations

from functools import partial

import torch

from calibration.walk.segment import Segment
from ptq.numerics.grids import global_scale_of, two_levels
from ptq.numerics.objective import output_error, relative_energy
from ptq.quantized import QuantizedTensor


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


def relative_errors(w: torch.Tensor, changed: torch.Tensor, gram: torch.Tensor | None) -> dict[str, float]:
    """Errors of ``changed`` against the weight ``w`` that it stands for: "weight", and "output" with a Gram matrix.

    Args:
        gram: Gram matrix ``[in, in]`` of the linear's input, or None where no data were gathered.
    """
    errors = {"weight": relative_energy(w, changed.__getitem__)}
    if gram is not None:
        errors["output"] = output_error(w, changed, gram)
    return errors


def place(segment: Segment, linear: str, q: QuantizedTensor, rounded: torch.Tensor, errors: dict[str, float]) -> None:
    """Store ``q`` for a linear, and its errors; the weight becomes ``rounded``, what q stands for."""
    segment.errors[linear] = errors
    segment.quantized[linear] = q
    segment.set_weight(linear, rounded)


def put(segment: Segment, linear: str, q: QuantizedTensor, gram: torch.Tensor | None) -> None:
    """`place`, and measure the errors; ``gram`` as in `relative_errors`. Without one only
    some rows at a time are looked at, and the whole weight is made when somebody asks for it."""
    if gram is None:
        dtype = segment.masters.dtype
        segment.errors[linear] = {"weight": relative_energy(segment.stored_weight(linear), q.by_rows(dtype), dtype)}
        segment.quantized[linear] = q
        segment.set_weight_later(linear, partial(q.dequantize, dtype))
        return
    w = segment.weight(linear)
    rounded = q.dequantize(w.dtype)
    place(segment, linear, q, rounded, relative_errors(w, rounded, gram))
