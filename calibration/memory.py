"""The memory of this process: how much it took, how much there is, and freed memory back to the system. (No torch: the
progress display asks while libraries are being loaded.)"""

from __future__ import annotations

import ctypes
import resource
import sys
from pathlib import Path


def return_freed() -> None:
    """Give the pages of freed allocations back where the C library can (glibc keeps them otherwise); else nothing.

    A tokenizer needs a kilobyte per token while it runs, and blocks of different sizes leave holes: without this the
    resident set keeps both and grows with depth.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


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
