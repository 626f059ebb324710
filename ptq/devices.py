"""Devices and dtypes by name, and the memory of this process."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

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


def peak_rss_bytes() -> int:
    """Highest resident set of this process so far.

    Linux: VmHWM, which starts anew with the program; ``ru_maxrss`` would count the process that launched this one.
    """
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def available_bytes() -> int | None:
    """Memory that this machine can still give, None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def evaluation_dtype(name: str, device: torch.device) -> torch.dtype:
    """``auto``: float32 on CPUs, so that numbers compare between machines; bfloat16 on GPUs."""
    if name == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    return parse_dtype(name)
