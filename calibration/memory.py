"""The memory of this process: how much it took, how much there is, and freed memory back to the system. (No torch: the
progress display asks while libraries are being loaded.)"""

from __future__ import annotations

import ctypes
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
APART_BYTES = 8_000_000  # tensors from which on pages of their own are worth the faults that they cost
GROWN_BYTES = 32 << 20  # where the threshold of glibc itself ends up, which grows with what is freed


def return_freed() -> None:
    """Give the pages of freed allocations back where the C library can (glibc keeps them otherwise); else nothing.

    A tokenizer needs a kilobyte per token while it runs, and blocks of different sizes leave holes: without this the
    resident set keeps both and grows with depth.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


@contextmanager
def large_apart() -> Iterator[None]:
    """While open, what is large gets pages of its own, which go back when it is freed. Else glibc keeps up to 32 MB of
    each among smaller things, and how much lies between them is chance: runs of the same model took 191 to 277 MB.
    Fresh pages cost time: not for loops that free large tensors all the time. Nothing elsewhere than on glibc."""
    set_limit = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    try:
        if set_limit is not None:
            set_limit(M_MMAP_THRESHOLD, APART_BYTES)
            set_limit(M_TRIM_THRESHOLD, APART_BYTES)
        yield
    finally:
        if set_limit is not None:
            set_limit(M_MMAP_THRESHOLD, GROWN_BYTES)
            set_limit(M_TRIM_THRESHOLD, 2 * GROWN_BYTES)


def rss_bytes() -> int:
    """Resident set of this process now; where the system does not say, its highest so far."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmRSS:"))
        return int(line.split()[1]) * 1024
    return peak_rss_bytes()


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
