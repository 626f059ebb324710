"""Scales of one byte in files: powers of two as E8M0 (MX formats), E4M3 beside a float32 for the tensor (NVFP4)."""

from __future__ import annotations

import torch

from calibration.errors import ToolkitError
from ptq.numerics.floats import LARGEST_EXPONENT
from ptq.scheme import ScaleFormat

E8M0_OFFSET = LARGEST_EXPONENT  # byte = exponent + 127; 255 is NaN


def encode_scale(scale: torch.Tensor, kind: ScaleFormat) -> torch.Tensor:
    """float32 scales exact in ``kind`` as uint8 (E8M0) or float8_e4m3fn, same shape."""
    if kind == "e8m0":
        return (torch.log2(scale).round() + E8M0_OFFSET).to(torch.uint8)
    assert kind == "e4m3", f"{kind} scales have two bytes"
    return scale.to(torch.float8_e4m3fn)


def decode_scale(stored: torch.Tensor) -> torch.Tensor:
    """float32 scales of stored ones of any kind; uint8 and float8_e8m0fnu are E8M0.

    Raises:
        ToolkitError: an E8M0 byte is 255, which stands for NaN.
    """
    if stored.dtype == torch.float8_e8m0fnu:
        stored = stored.view(torch.uint8)
    if stored.dtype != torch.uint8:
        return stored.float()
    if bool((stored == 255).any()):
        raise ToolkitError("an E8M0 scale is NaN (byte 255)", "the checkpoint is damaged: fetch or write it again")
    return torch.ldexp(torch.ones(stored.shape, device=stored.device), stored.int() - E8M0_OFFSET)
