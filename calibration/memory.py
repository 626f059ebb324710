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


_limits = [GROWN_BYTES]  # from which size on allocations have pages of their own: of what is open, the innermost last


@contextmanager
def large_apart() -> Iterator[None]:
    """While open, what is large gets pages of its own, which go back when it is freed. Else glibc keeps up to 32 MB of
    each among smaller things, and how much lies between them is chance: runs of the same model took 191 to 277 MB.
    Fresh pages cost time: loops that free large tensors all the time run `large_together`. Nothing elsewhere than on
    glibc."""
    with _limited(APART_BYTES):
        yield


@contextmanager
def large_together() -> Iterator[None]:
    """Inside of `large_apart`, what is large is taken from freed memory again, such as activations of forward passes.
    The caller gives it back at the end (`return_freed`)."""
    with _limited(GROWN_BYTES):
        yield


@contextmanager
def _limited(size: int) -> Iterator[None]:
    changed = size != _limits[-1]
    _limits.append(size)
    try:
        if changed:
            _set_limit(size)
        yield
    finally:
        _limits.pop()
        if changed:
            _set_limit(_limits[-1])


def _set_limit(size: int) -> None:
    set_limit = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if set_limit is not None:
        set_limit(M_MMAP_THRESHOLD, size)
        set_limit(M_TRIM_THRESHOLD, size if size == APART_BYTES else 2 * size)


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
