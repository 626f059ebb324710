"""What this machine does in a second, measured in less than one: matrix products, elementwise operations, memory, disk.

Every rate is the best of a few tries, timed by the processor time of the thread that calls, so that what else the
machine is busy with does not count. Threads wait for each other, and take time for it where they lack a core: no rate
is taken to be lower than that of one thread.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import fields
from functools import cache, cached_property

import torch

from calibration.threads import one_thread
from calibration.walk.cost import Work

TRIES, LONG_TRIES, LONG = 12, 3, 0.2  # the last one in seconds of all tries
PRODUCT = (256, 1024, 1024)
CACHED, FRESH = 1 << 18, 1 << 21  # values
LARGE = 1.5  # large tensors get memory so much faster than 8 MB do (which stay below the memory of any run)
BYTES = 1 << 23  # of a file
TOKENIZED = 1.5e6  # bytes of text per second: byte-level BPE on one core; not measured
NO_DISK = 5e8  # bytes per second, where no file can be made to try


class Rates:
    """Amounts per second, by the names that they have in `Work`. Each is measured when a plan first has something of
    its kind: products in bfloat16 take seconds where the processor cannot, and rounding without text has no products.

    Args:
        dtype: of forward passes.
        threads: of torch; measured with as many as it has, and with one.
    """

    text = TOKENIZED

    def __init__(self, device: torch.device, dtype: torch.dtype, threads: int) -> None:
        self._device, self._dtype, self._threads = device, dtype, threads

    def seconds(self, work: Work) -> float:
        """How long work takes that is done one after the other."""
        amounts = {field.name: float(getattr(work, field.name)) for field in fields(Work)}
        return sum(amount / float(getattr(self, name)) for name, amount in amounts.items() if amount)

    @cached_property
    def products(self) -> float:
        return self.exact if self._dtype == torch.float32 else self._product_rate(self._dtype)

    @cached_property
    def exact(self) -> float:
        return self._product_rate(torch.float32)

    @cached_property
    def values(self) -> float:
        x = torch.ones(CACHED, device=self._device)
        y = torch.empty_like(x)

        def elementwise() -> None:
            torch.div(x, 3.0, out=y)
            y.round_().clamp_(-8, 7).mul_(3.0)

        return self._rate(4.0 * CACHED, elementwise)

    @cached_property
    def fresh(self) -> float:
        large = torch.ones(FRESH, device=self._device)
        return self._rate(LARGE * FRESH, lambda: _fresh(large))

    @cached_property
    def calls(self) -> float:
        small = torch.ones(8, device=self._device)
        return self._rate(200.0, lambda: [small + 1 for _ in range(200)])

    @cached_property
    def read(self) -> float:
        return self._disk[0]

    @cached_property
    def written(self) -> float:
        return self._disk[1]

    @cached_property
    def hashed(self) -> float:
        data = bytes(BYTES)
        return BYTES / _best(lambda: hashlib.sha256(data), torch.device("cpu"), LONG_TRIES)

    @cached_property
    def _disk(self) -> tuple[float, float]:
        return _disk_rates()

    def _product_rate(self, width: torch.dtype) -> float:
        m, k, n = PRODUCT
        a, b = (torch.ones(shape, dtype=width, device=self._device) for shape in ((m, k), (k, n)))
        return self._rate(2.0 * m * k * n, lambda: a @ b)

    def _rate(self, amount: float, work: Callable[[], object]) -> float:
        """``amount`` per second, of work on the processor with the threads that torch has, or with one."""
        found = amount / _best(work, self._device)
        if self._threads > 1 and self._device.type == "cpu":
            with one_thread():
                found = max(found, amount / _best(work, self._device))
        return found


def _fresh(values: torch.Tensor) -> None:
    """A copy in memory that the process did not have before. (An allocator would give what was freed a moment ago.)"""
    if values.device.type != "cpu":
        values.clone()
        return
    torch.frombuffer(mmap.mmap(-1, values.nbytes), dtype=values.dtype).copy_(values)


def _best(work: Callable[[], object], device: torch.device, tries: int = TRIES) -> float:
    """Seconds of the fastest of a few tries, the first one not counted; fewer where they take long, such as products in
    bfloat16 on processors that cannot."""
    clock = time.thread_time if device.type == "cpu" else time.perf_counter
    seconds: list[float] = []
    for _ in range(tries + 1):
        if sum(seconds[1:]) > LONG:
            break
        before = clock()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(clock() - before)
    return max(min(seconds[1:]), 1e-9)


def _disk_rates() -> tuple[float, float]:
    """Bytes read (from what the system keeps of a file) and written to the disk per second, by a file without a name in
    the folder for temporary files."""
    data, seconds = bytes(BYTES), []
    try:
        with tempfile.TemporaryFile(buffering=0) as file:
            for _ in range(LONG_TRIES):
                start = time.perf_counter()
                file.seek(0)
                file.write(data)
                os.fsync(file.fileno())
                written = time.perf_counter()
                file.seek(0)
                before = time.thread_time()  # a copy of what the system keeps: no disk is waited for
                file.read(BYTES)
                seconds.append((time.thread_time() - before, written - start))
    except OSError:
        return NO_DISK, NO_DISK
    read, write = (BYTES / max(min(column), 1e-9) for column in zip(*seconds, strict=True))
    return read, write


@cache
def _rates(device: torch.device, dtype: torch.dtype, threads: int) -> Rates:
    return Rates(device, dtype, threads)


def rates_of(device: torch.device, dtype: torch.dtype) -> Rates:
    """`Rates` with the threads that torch has now; none is measured twice in a process."""
    return _rates(device, dtype, torch.get_num_threads())
