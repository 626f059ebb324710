"""Device and dtype names of the command line."""

from __future__ import annotations

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
