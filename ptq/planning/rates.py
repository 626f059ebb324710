"""What this machine does in a second, measured in less than one: matrix products, elementwise operations, memory, disk.

Every rate is the best of a few tries, timed by the processor time of the thread that calls, so that what else the
machine is busy with does not count. Threads wait for each other, and take time for it where they lack a core: no rate
is taken to be lower than that of one thread.
"""

from __future__ import annotations

import functools
import hashlib
import mmap
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields

import torch

from calibration.walk.cost import Work

TRIES, LONG_TRIES, LONG = 12, 3, 0.2  # the last one in seconds of all tries
PRODUCT = (256, 1024, 1024)
CACHED, FRESH = 1 << 18, 1 << 21  # values
LARGE = 1.5  # large tensors get memory so much faster than 8 MB do (which stay below the memory of any run)
BYTES = 1 << 23  # of a file
TOKENIZED = 1.5e6  # bytes of text per second: byte-level BPE on one core; not measured
NO_DISK = 5e8  # bytes per second, where no file can be made to try


@dataclass(frozen=True)
class Rates:
    """Amounts per second, by the names that they have in `Work`."""

    products: float
    exact: float
    values: float
    fresh: float
    calls: float
    read: float
    written: float
    hashed: float
    text: float = TOKENIZED

    def seconds(self, work: Work) -> float:
        """How long work takes that is done one after the other."""
        return sum(float(getattr(work, field.name) / getattr(self, field.name)) for field in fields(Rates))


@functools.cache
def measure_rates(device: torch.device, dtype: torch.dtype, threads: int) -> Rates:
    """The rates here and now.

    Args:
        dtype: of forward passes.
        threads: of torch; measured with as many as it has, once for every number.
    """
    found = _processor_rates(device, dtype)
    if threads > 1 and device.type == "cpu":
        with _one_thread():
            alone = _processor_rates(device, dtype)
        found = {name: max(rate, alone[name]) for name, rate in found.items()}
    read, written = _disk_rates()
    data = bytes(BYTES)
    hashed = BYTES / _best(lambda: hashlib.sha256(data), torch.device("cpu"), LONG_TRIES)
    return Rates(**found, read=read, written=written, hashed=hashed)


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _processor_rates(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """What needs no files, by the names in `Rates`, with the threads that torch has."""
    m, k, n = PRODUCT
    operations = 2.0 * m * k * n

    def product_rate(width: torch.dtype) -> float:
        a, b = (torch.ones(shape, dtype=width, device=device) for shape in ((m, k), (k, n)))
        return operations / _best(lambda: a @ b, device)

    exact = product_rate(torch.float32)
    x = torch.ones(CACHED, device=device)
    y = torch.empty_like(x)
    small = torch.ones(8, device=device)
    large = torch.ones(FRESH, device=device)

    def elementwise() -> None:
        torch.div(x, 3.0, out=y)
        y.round_().clamp_(-8, 7).mul_(3.0)

    return {
        "products": exact if dtype == torch.float32 else product_rate(dtype),
        "exact": exact,
        "values": 4 * CACHED / _best(elementwise, device),
        "fresh": LARGE * FRESH / _best(lambda: _fresh(large), device),
        "calls": 200 / _best(lambda: [small + 1 for _ in range(200)], device),
    }


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


def rates_of(device: torch.device, dtype: torch.dtype) -> Rates:
    """`measure_rates` with the threads that torch has now."""
    return measure_rates(device, dtype, torch.get_num_threads())
