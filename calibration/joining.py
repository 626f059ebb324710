"""How the processes that a launcher has started find each other: a store, a hub, a process group."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from calibration.distributed import Processes
from calibration.errors import ToolkitError
from calibration.launcher import launched, local_number, on_one_machine
from calibration.presence import OtherEnded, Presence, seek
from calibration.presence_hub import Hub

TOGETHER = 20.0  # seconds from the first process that comes to the last one, where all are on one machine
APART = 600.0  # the same on several machines, whose launchers may start far from each other
ANSWERING = timedelta(seconds=5)  # for what listens at the port to prove that it is the store
HANGING = timedelta(hours=6)  # the others wait while the first one writes a large model
"""A process that says nothing for so long is given up. (One that ends is noticed at once, see `Presence`.)"""

_store: dist.Store | None = None
_runs = 0  # of this process: every one has a hub of its own


@contextmanager
def joined(device: str) -> Iterator[Processes]:
    """The processes that the launcher has started, connected, for one run; a run of one without a launcher. Where the
    run ends with an error, the others are told.

    Args:
        device: as a user names it. Tensors on GPUs are carried by nccl, where there are any.

    Raises:
        ToolkitError: no connection comes about; names the processes that are missing, or the port that is taken.
    """
    rank, size = launched()
    if size == 1:
        yield Processes()
        return
    presence = _meet(rank, size)
    try:
        _connect(rank, size, device != "cpu" and torch.cuda.is_available(), presence)
        yield Processes(rank, size, presence=presence)
    except BaseException:
        presence.fail()
        raise
    presence.leave()


def _meet(rank: int, size: int) -> Presence:
    """Wait until all processes are there."""
    global _store, _runs
    patience, local = (TOGETHER, True) if on_one_machine() else (APART, False)
    place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    name, hub = f"run {_runs}", None
    seek()
    try:
        _store = _store or _open_store(rank, patience)
        if rank == 0:
            hub = Hub(size, local)
            _store.set(name, f"{hub.port} {hub.key}")
        port, key = _store.get(name).decode().split()
    except (TimeoutError, dist.DistStoreError):
        raise ToolkitError(
            f"process 1 of {size} ended before the run, or did not come within {patience:.0f} seconds: it has not been "
            f"heard of at {place}",
            "start all processes at once, and look at what this one has printed; nothing was begun",
        ) from None
    except (RuntimeError, ValueError, OSError, dist.DistError) as error:
        raise ToolkitError(
            f"process {rank + 1} of {size}: no connection by {place} ({str(error).splitlines()[0][:160]})",
            "start all processes at once; if the port is taken, choose another with --master-port of the launcher",
        ) from None
    _runs += 1
    return Presence("127.0.0.1" if local else os.environ["MASTER_ADDR"], int(port), key, patience, hub)


def _open_store(rank: int, patience: float) -> dist.Store:
    """The store of the launcher, or one that the first process opens."""
    theirs = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    opens = rank == 0 and not theirs
    if not opens:
        _await_port(address, port, patience)  # the store would print its stack where nobody answers
    store = _within(patience, lambda: dist.TCPStore(address, port, None, opens, ANSWERING, wait_for_workers=False))
    store.set_timeout(timedelta(seconds=patience))
    return dist.PrefixStore(f"ptq {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)


def _within(seconds: float, connect: Callable[[], dist.Store]) -> dist.Store:
    """What ``connect`` returns, in a thread: torch waits without end for a listener that accepts and says nothing."""
    came: Future[dist.Store] = Future()

    def run() -> None:
        try:
            came.set_result(connect())
        except Exception as error:  # noqa: BLE001  (it is raised where the result is asked for)
            came.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    try:
        return came.result(seconds)
    except TimeoutError:
        raise OSError("what listens there is no store of torch.distributed") from None


def _await_port(address: str, port: int, patience: float) -> None:
    """Wait until somebody listens there."""
    ends = time.monotonic() + patience
    while True:
        try:
            socket.create_connection((address, port), timeout=patience).close()
            return
        except OSError:
            if time.monotonic() >= ends:
                raise TimeoutError from None
        time.sleep(0.1)


def _connect(rank: int, size: int, on_gpu: bool, presence: Presence) -> None:
    """The process group, once per process."""
    if dist.is_initialized():
        return
    assert _store is not None
    if on_gpu:
        torch.cuda.set_device(local_number() % torch.cuda.device_count())
    backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
    try:
        dist.init_process_group(backend, store=_store, rank=rank, world_size=size, timeout=HANGING)
    except (RuntimeError, dist.DistError) as error:
        presence.await_name()
        raise OtherEnded(str(error).splitlines()[0][:120]) from None
    _store.set_timeout(HANGING)
