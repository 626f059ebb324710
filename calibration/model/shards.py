"""`ShardWriter`: checkpoint files that appear whole."""

from __future__ import annotations

import json
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch

from calibration.model.checkpoint import save_tensors, sync_folder, write_atomically
from calibration.model.headers import INDEX_FILE, SINGLE_FILE

SHARD_BYTES = 500_000_000  # one is filled while another is written: twice this is less than one block needs


class ShardWriter:
    """Write a checkpoint shard by shard, holding two at most; the index comes last.

    A thread writes a full shard while the next one is filled; what it raises comes out of a later call. ``add`` tensors
    in any order, then ``finish``: shards get their final names (``model-00001-of-00003.safetensors``, or
    ``model.safetensors`` for one) and the index is written. Two tensors of one name are an error of ours.
    """

    def __init__(self, folder: Path, shard_bytes: int = SHARD_BYTES) -> None:
        self.folder = folder
        self.shard_bytes = shard_bytes
        self.total_bytes = 0
        self._pending: dict[str, torch.Tensor] = {}
        self._pending_bytes = 0
        self._shard_of: dict[str, int] = {}
        self._shards = 0
        self._thread = ThreadPoolExecutor(1)
        self._writing: Future[None] | None = None

    def add(self, name: str, tensor: torch.Tensor) -> None:
        assert name not in self._shard_of and name not in self._pending, f"{name} written twice"
        size = tensor.numel() * tensor.element_size()
        if self._pending and self._pending_bytes + size > self.shard_bytes:
            self._flush()
        self._pending[name] = tensor
        self._pending_bytes += size
        self.total_bytes += size

    def _path(self, shard: int) -> Path:
        return self.folder / f"shard-{shard:05d}.safetensors.part"

    def _flush(self) -> None:
        self._wait()
        self._writing = self._thread.submit(save_tensors, self._path(self._shards), self._pending)
        self._shard_of |= dict.fromkeys(self._pending, self._shards)
        self._pending, self._pending_bytes = {}, 0
        self._shards += 1

    def _wait(self) -> None:
        if self._writing is not None:
            self._writing.result()
            self._writing = None

    def finish(self) -> list[str]:
        """Write what is pending, give the shards their names, write the index; returns the file names."""
        if self._pending:
            self._flush()
        self._wait()
        self._thread.shutdown()
        n = self._shards
        names = [SINGLE_FILE] if n == 1 else [f"model-{i + 1:05d}-of-{n:05d}.safetensors" for i in range(n)]
        for shard, name in enumerate(names):
            self._path(shard).rename(self.folder / name)
        if n > 1:
            weight_map = {name: names[shard] for name, shard in sorted(self._shard_of.items())}
            index = {"metadata": {"total_size": self.total_bytes}, "weight_map": weight_map}
            write_atomically(self.folder / INDEX_FILE, (json.dumps(index, indent=2) + "\n").encode())
        sync_folder(self.folder)
        return names
