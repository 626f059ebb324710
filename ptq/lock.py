"""One process at a time per output folder."""

from __future__ import annotations

import os
import weakref
from pathlib import Path

from calibration.errors import ToolkitError
from calibration.model.checkpoint import disk_errors

try:
    import fcntl
except ImportError:  # Windows has no flock: runs are not told apart there
    fcntl = None  # type: ignore[assignment]


_held: weakref.WeakValueDictionary[Path, Lock] = weakref.WeakValueDictionary()  # of this process


class Lock:
    """An advisory lock on the file ``.DIR.ptq-lock`` beside DIR, from construction to `release` (or the end of the
    process, however it ends: the system lets go of it). The file is removed with the lock.

    Within a process the newest lock has it: in a notebook the traceback of an interrupted run keeps the old one alive.

    Raises:
        ToolkitError: another process has it; names the process.
    """

    def __init__(self, target: Path) -> None:
        self.target = target
        self.path = self.path_of(target)
        self._descriptor: int | None = None
        self._process = os.getpid()
        if fcntl is None:
            return
        earlier = _held.get(self.path)
        if earlier is not None and earlier._process == self._process:
            self._descriptor, earlier._descriptor = earlier._descriptor, None
        if self._descriptor is None:
            with disk_errors(target):
                target.parent.mkdir(parents=True, exist_ok=True)
                self._descriptor = self._acquire()
                os.ftruncate(self._descriptor, 0)
                os.write(self._descriptor, str(self._process).encode())
        _held[self.path] = self

    @staticmethod
    def path_of(target: Path) -> Path:
        """The file that is locked."""
        return target.with_name(f".{target.name}.ptq-lock")

    def _acquire(self) -> int:
        while True:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                owner = os.read(descriptor, 32).decode("ascii", "replace") or "unknown"
                os.close(descriptor)
                out = self.path.name.removeprefix(".").removesuffix(".ptq-lock")
                raise ToolkitError(
                    f"--out {self.path.with_name(out)}: process {owner} is writing there",
                    "wait until it has ended, or choose another folder",
                ) from None
            try:
                same = os.path.samestat(os.fstat(descriptor), self.path.stat())
            except FileNotFoundError:
                same = False
            if same:
                return descriptor
            os.close(descriptor)  # its owner removed the file between our opening and locking it: once more

    @property
    def held(self) -> bool:
        return self._descriptor is not None and self._process == os.getpid()

    def release(self) -> None:
        """Let go of it, and remove the file; in a forked process only the copy is closed."""
        if self._descriptor is None:
            return
        if self._process == os.getpid():
            self.path.unlink(missing_ok=True)
            if _held.get(self.path) is self:
                del _held[self.path]
        os.close(self._descriptor)
        self._descriptor = None

    def __del__(self) -> None:
        self.release()


def release_all() -> None:
    """Let go of every lock of this process, when a command has ended in whatever way and has said what is kept."""
    for lock in list(_held.values()):
        lock.release()


def locked_targets() -> list[Path]:
    """The output folders that this process is writing."""
    return [lock.target for lock in _held.values() if lock.held]
