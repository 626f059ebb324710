"""Run by test_disks.py in a process of its own: a command in forks of it that have nearly no memory left.

    python little_memory.py WORDS...

A process that ran other tests has freed memory of its own (holes in its heap, arenas of its threads, what garbage
collection returns later), as much as chance had it, and a fork of it may never ask the system for any. Prints a JSON
list: for every room the exit code, what was printed and which of the outputs were left.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import resource
import shutil
import sys
from pathlib import Path

import torch
from command import done
from forked import start, wait

ROOMS = (1 << 18, 1 << 20, 1 << 23)
SECONDS = 900.0  # for machines with much else to do
OUTPUTS = (Path("out"), Path("out.partial"))


def leave_room(room: int) -> None:
    """Limit this process to ``room`` bytes more. What it freed before is taken first, which may be all there is."""
    malloc = ctypes.CDLL(None).malloc
    malloc.argtypes, malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used, most))
    with contextlib.suppress(MemoryError):
        for size in (1 << 20, 1 << 16, 1 << 12):
            while malloc(size):
                pass
    resource.setrlimit(resource.RLIMIT_AS, (used + room, used + room))


def remove(path: Path) -> None:
    """A file or a folder, if it is there."""
    path.unlink() if path.is_file() else shutil.rmtree(path, ignore_errors=True)


def main(words: list[str]) -> None:
    torch.set_num_threads(1)  # a forked process has no others
    for path in OUTPUTS:
        remove(path)
    done(*words)  # what is imported late is there: without memory an import can end in anything
    ended = []
    for room in ROOMS:
        for path in OUTPUTS:
            remove(path)
        log = Path("log")
        code = wait(start(words, Path.cwd(), log, lambda room=room: leave_room(room)), SECONDS)
        left = [str(path) for path in OUTPUTS if path.exists()]
        ended.append({"code": code, "printed": log.read_text(errors="replace"), "left": left})
    print(json.dumps(ended))


if __name__ == "__main__":
    main(sys.argv[1:])
