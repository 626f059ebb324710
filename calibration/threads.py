"""Threads of torch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def one_thread() -> Iterator[None]:
    """Operations of this thread take one thread of torch each.

    Threads that share an operation wait for each other at its end, and do so by spinning. Operations of a tenth of a
    millisecond, on what lies in cache, gain next to nothing from a second one where both cores are free, and take many
    times as long where one of them is busy with something else.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
