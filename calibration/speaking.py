"""Which process of a machine says why a run ends that never began: those that have not met cannot ask.

The first that ends writes the time into a file named after the launcher's address, and has the word; one that was
started before that time keeps silent.
"""

from __future__ import annotations

import hashlib
import os
import stat
import tempfile
import time
from pathlib import Path

from calibration.launcher import STARTED

try:
    import fcntl
except ImportError:  # Windows: each speaks for itself
    fcntl = None  # type: ignore[assignment]


def first_to_speak() -> bool:
    """Whether no other process of this run and machine has asked this before."""
    if fcntl is None:
        return True
    try:
        descriptor = os.open(_file(), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError:  # a temporary folder that cannot be written
        return True
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):  # somebody else's pipe or device
        os.close(descriptor)
        return True
    with os.fdopen(descriptor, "r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        spoken = file.read()
        if spoken and float(spoken) > STARTED:  # older words are of an earlier run at the same address
            return False
        file.seek(0)
        file.truncate()
        file.write(repr(time.time()))
        file.flush()
        return True


def _file() -> Path:
    """One per launcher's address; where a launcher names its runs, one per run."""
    names = [os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID")]
    number = hashlib.sha256(repr([os.getuid(), *names]).encode()).hexdigest()[:16]
    return Path(tempfile.gettempdir()) / f"ptq-run-{number}"
