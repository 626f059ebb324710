"""Devices and dtypes by name."""

from __future__ import annotations

import torch

from calibration.errors import ToolkitError, unknown_value
from calibration.launcher import launched, local_number

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def resolve_device(name: str) -> torch.device:
    """``auto`` (the GPU where there is one), ``cpu``, ``cuda``, ``cuda:1``. Of several processes that a launcher has
    started on one machine each has the GPU of its own number.

    Raises:
        ToolkitError: no such device here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and launched()[1] > 1:
        name = f"cuda:{local_number()}"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise unknown_value("--device", name, ("auto", "cpu", "cuda")) from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ToolkitError(
            f"--device {name}: this machine has no such GPU",
            "use --device cpu" + (", or start as many processes as there are GPUs" if launched()[1] > 1 else ""),
        )
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


def evaluation_dtype(name: str, device: torch.device) -> torch.dtype:
    """``auto``: float32 on CPUs, so that numbers compare between machines; bfloat16 on GPUs."""
    if name == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    return parse_dtype(name)
