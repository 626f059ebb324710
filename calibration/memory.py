"""Freed memory back to the system, so that what one stage needed for a moment does not add to the next one's peak."""

from __future__ import annotations

import ctypes
import sys


def return_freed() -> None:
    """Give the pages of freed allocations back where the C library can (glibc keeps them otherwise); else nothing.

    A tokenizer needs a kilobyte per token while it runs, and blocks of different sizes leave holes: without this the
    resident set keeps both and grows with depth.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
