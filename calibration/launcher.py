"""What ``torchrun`` and ``accelerate launch`` tell a process about itself. (No torch: the command line asks first.)"""

from __future__ import annotations

import os
import time

STARTED = time.time()
"""When this process began, nearly: the command line imports this first."""


def launched() -> tuple[int, int]:
    """Which process of how many this is, counted from 0, by what a launcher has set; (0, 1) without one."""
    words = [os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")]
    if not all(words) or not (words[0].isdecimal() and words[1].isdecimal()):
        return 0, 1
    return int(words[0]), int(words[1])


def local_number() -> int:
    """Which process of this machine this is, counted from 0: the number of its GPU."""
    return int(os.environ.get("LOCAL_RANK") or launched()[0])


def on_one_machine() -> bool:
    """Whether all processes are on this machine, by what is known without asking another."""
    here, address = os.environ.get("LOCAL_WORLD_SIZE"), os.environ.get("MASTER_ADDR", "")
    if here is not None:
        return here == os.environ.get("WORLD_SIZE")
    return address in ("localhost", "::1") or address.startswith("127.")
