"""`StreamedShard`: a safetensors file that is written while its tensors are made."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from calibration.model.checkpoint import disk_errors, sync_folder
from calibration.model.headers import DTYPES

ALIGNED = 8  # bytes of the widest dtype: readers view tensors where they lie in the file
NAMES = {dtype: name for name, dtype in DTYPES.items()}
ENTRY = 80  # bytes of an entry of the header beside its name and sizes, at most
DIMENSION = 12  # bytes of one size


def entry_bytes(name: str, tensor: torch.Tensor) -> int:
    """What a tensor takes of the header, at most."""
    return len(json.dumps(name)) + ENTRY + DIMENSION * tensor.ndim


class StreamedShard:
    """The file ``path``, from the first tensor to `close`; under a temporary name until then.

    The header is in front and known last: room is left for it, and filled with the spaces that the format allows. Data
    may have no gaps, so that tensors of other than multiples of 8 bytes are kept and come last.

    Args:
        room: bytes of the header at most, see `entry_bytes`.
    """

    def __init__(self, path: Path, room: int) -> None:
        self._path = path
        self._room = -(-room // ALIGNED) * ALIGNED
        self._entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        self._last: dict[str, torch.Tensor] = {}
        self._end = 0
        self._temporary = path.with_name(path.name + ".tmp")
        with disk_errors(path):
            self._file = self._temporary.open("wb")
            self._file.seek(ALIGNED + self._room)

    def write(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Append tensors.

        Raises:
            ToolkitError: the disk is full or cannot be written.
        """
        for name, tensor in tensors.items():
            if tensor.nbytes % ALIGNED:
                self._last[name] = tensor
            else:
                self._append(name, tensor)

    def _append(self, name: str, tensor: torch.Tensor) -> None:
        start, self._end = self._end, self._end + tensor.nbytes
        where = {"data_offsets": [start, self._end]}
        self._entries[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), **where}
        with disk_errors(self._path):
            self._file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)

    def close(self) -> None:
        """Write what was kept and the header, and give the file its name.

        Raises:
            ToolkitError: as `write`.
        """
        for name, tensor in sorted(self._last.items(), key=lambda item: -item[1].element_size()):
            self._append(name, tensor)
        header = json.dumps(self._entries, separators=(",", ":")).encode()
        assert len(header) <= self._room, f"{len(header)} bytes of header, and room for {self._room}"
        with disk_errors(self._path):
            self._file.seek(0)
            self._file.write(self._room.to_bytes(ALIGNED, "little") + header.ljust(self._room))
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            self._temporary.rename(self._path)
            sync_folder(self._path.parent)
