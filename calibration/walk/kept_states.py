"""Hidden states of every block, kept in a temporary file: for work that comes back to the blocks in reverse."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from types import TracebackType

import torch

from calibration.errors import ToolkitError
from calibration.model.checkpoint import disk_errors
from calibration.walk.states import HiddenStates


def check_room(needed: int) -> None:
    """Refuse early where the folder for temporary files has no room for ``needed`` bytes.

    Raises:
        ToolkitError: says where, and how much is free.
    """
    folder = tempfile.gettempdir()
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ToolkitError(
            f"{folder}: {free / 1e9:.2f} GB free, hidden states of every block take {needed / 1e9:.2f} GB",
            "set TMPDIR to a folder with more room, or take a shorter --seq-len",
        )


class KeptStates:
    """The states that enter each block, window by window, ``[1, seq_len, hidden]`` in the dtype of the forward pass.

    The file has no name: whatever ends the process ends it. It is read and written, not mapped, so that it never counts
    as memory of the process.
    """

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile(prefix="ptq-states-")  # noqa: SIM115 (closed by __exit__)
        self._like = torch.empty(0)
        self._windows = 0

    def __enter__(self) -> KeptStates:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()

    def append(self, states: HiddenStates) -> None:
        """Keep the states that enter the next block, one window to a batch, as many for every block.

        Raises:
            ToolkitError: the disk is full.
        """
        self._windows = len(states.batches)
        with disk_errors(Path(tempfile.gettempdir())):
            for window in states.batches:
                self._like = window.new_empty(0)
                self._file.write(window.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
            self._file.flush()

    def load(self, block: int, states: HiddenStates) -> None:
        """Put the states that enter ``block`` into ``states``, a stream of the same windows."""
        for window, other in enumerate(states.batches):
            size = other.numel() * self._like.element_size()
            self._file.seek((block * self._windows + window) * size)
            raw = torch.frombuffer(bytearray(self._file.read(size)), dtype=self._like.dtype)
            states.batches[window] = raw.view(other.shape).to(self._like.device)
