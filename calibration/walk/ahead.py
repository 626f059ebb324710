"""`Ahead`: the tensors of the next block are fetched while the present one is worked on."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from calibration.model.checkpoint import CheckpointReader, TensorSource


class Ahead:
    """Tensors of a checkpoint, of which some are expected to be read next.

    On CPUs the system is told, and reads them from the disk into memory of its own: nothing is held here. For a GPU a
    thread reads them into pinned memory, 2 bytes per weight of a block in 16 bits, from where they are copied while
    the GPU works.

    Args:
        device: on which blocks are worked on.
    """

    def __init__(self, source: TensorSource, device: torch.device) -> None:
        self._source = source
        self._reader = source.again() if isinstance(source, CheckpointReader) else None  # that nobody else closes
        self._pins = device.type == "cuda"
        self._thread = ThreadPoolExecutor(1) if self._pins else None
        self._now: dict[str, Future[torch.Tensor]] = {}
        self._next: dict[str, Future[torch.Tensor]] = {}

    def expect(self, names: Iterable[str]) -> None:
        """``names`` are those of the next block. Those of the call before are read now, and those of the one before
        that, if some were left, no more."""
        for waiting in self._now.values():
            waiting.cancel()
        self._now, self._next = self._next, {}
        if self._reader is None:
            return
        if self._thread is None:
            self._reader.expect(names)
            self._reader.close()
        else:
            self._next = {name: self._thread.submit(self._pinned, name) for name in names}

    def tensor(self, name: str) -> torch.Tensor:
        """As `CheckpointReader.tensor`; each that was expected is handed out once.

        Raises:
            ToolkitError: it cannot be read.
        """
        waiting = self._now.pop(name, None) or self._next.pop(name, None)
        return self._source.tensor(name) if waiting is None else waiting.result()

    def _pinned(self, name: str) -> torch.Tensor:
        assert self._reader is not None
        tensor = self._reader.tensor(name)
        return tensor.pin_memory() if tensor.numel() else tensor
