"""`ShardWriter`: checkpoint files that appear whole."""

from __future__ import annotations

import json
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch

from calibration.model.checkpoint import save_tensors, sync_folder, write_atomically
from calibration.model.headers import INDEX_FILE, SINGLE_FILE
from calibration.model.streamed import StreamedShard, entry_bytes

SHARD_BYTES = 500_000_000
PIECE_BYTES = 32_000_000  # one is filled while another is written
SPARE, MOST_ROOM = 4096, 1 << 20  # bytes of a shard's header beyond what its first piece has: a full one ends the shard


class ShardWriter:
    """Write a checkpoint shard by shard, holding two pieces of one at most; the index comes last.

    A thread writes a piece while the next one is filled; what it raises comes out of a later call. ``add`` tensors
    in any order, then ``finish``: shards get their final names (``model-00001-of-00003.safetensors``, or
    ``model.safetensors`` for one) and the index is written. Two tensors of one name are an error of ours.
    """

    def __init__(self, folder: Path, shard_bytes: int = SHARD_BYTES) -> None:
        self.folder = folder
        self.shard_bytes = shard_bytes
        self.total_bytes = 0
        self._pending: dict[str, torch.Tensor] = {}
        self._piece_bytes = self._bytes = self._header = 0
        self._shard_of: dict[str, int] = {}
        self._shards = 0
        self._room = 0
        self._stream: StreamedShard | None = None
        self._thread = ThreadPoolExecutor(1)
        self._writing: Future[None] | None = None

    def add(self, name: str, tensor: torch.Tensor) -> None:
        assert name not in self._shard_of, f"{name} written twice"
        size, entry = tensor.numel() * tensor.element_size(), entry_bytes(name, tensor)
        full = self._bytes + size > self.shard_bytes or (self._stream is not None and self._header + entry > self._room)
        if self._bytes and full:
            self._end_shard()
        self._pending[name] = tensor
        self._shard_of[name] = self._shards
        self._piece_bytes += size
        self._bytes += size
        self._header += entry
        self.total_bytes += size
        if self._piece_bytes >= PIECE_BYTES:
            self._write_piece()

    def _path(self, shard: int) -> Path:
        return self.folder / f"shard-{shard:05d}.safetensors.part"

    def _write_piece(self) -> None:
        self._wait()
        if self._stream is None:
            expected = self._header * max(1.0, 1.25 * self.shard_bytes / self._bytes)
            self._room = self._header + min(round(expected - self._header), MOST_ROOM) + SPARE
            self._stream = StreamedShard(self._path(self._shards), self._room)
        self._writing = self._thread.submit(self._stream.write, self._pending)
        self._pending, self._piece_bytes = {}, 0

    def _end_shard(self) -> None:
        if self._stream is None:  # it is small: all of it is here
            self._wait()
            self._writing = self._thread.submit(save_tensors, self._path(self._shards), self._pending)
        else:
            self._write_piece()
            self._wait()
            self._writing = self._thread.submit(self._stream.close)
        self._pending, self._piece_bytes, self._bytes, self._header = {}, 0, 0, 0
        self._stream = None
        self._shards += 1

    def _wait(self) -> None:
        if self._writing is not None:
            self._writing.result()
            self._writing = None

    def finish(self) -> list[str]:
        """Write what is pending, give the shards their names, write the index; returns the file names."""
        if self._bytes or self._pending:
            self._end_shard()
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
