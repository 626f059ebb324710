"""Devices and dtypes by name, and the memory of this process."""

from __future__ import annotations

import resource
import sys

import torch

from calibration.errors import ToolkitError, unknown_value

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def resolve_device(name: str) -> torch.device:
    """``auto`` (the GPU where there is one), ``cpu``, ``cuda``, ``cuda:1``.

    Raises:
        ToolkitError: no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise unknown_value("--device", name, ("auto", "cpu", "cuda")) from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ToolkitError(f"--device {name}: this machine has no such GPU", "use --device cpu")
    if device.type not in ("cpu", "cuda"):
        raise unknown_value("--device", name, ("auto", "cpu", "cuda"))
    return device


def parse_dtype(name: str) -> torch.dtype:
    """``float32``, ``bfloat16`` or ``float16``.

    Raises:
        ToolkitError: any other name.
    """
    if name not in DTYPES:
        raise unknown_value("--dtype", name, ("auto", *DTYPES))
    return DTYPES[name]


def peak_rss_bytes() -> int:
    """Highest resident set of this process so far. Linux counts it in KiB, macOS in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
