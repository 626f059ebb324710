"""Blocks that a run has finished: a file of tensors each, a record of its linears, thresholds where it has some."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, TypedDict

import torch

from calibration.architectures.spec import ArchitectureSpec
from calibration.errors import ToolkitError
from calibration.model.checkpoint import CheckpointReader, save_tensors, write_atomically
from calibration.model.reading import file_digest, read_json
from calibration.model.typed import Count, built
from calibration.walk.segment import Segment

DIGESTS = "sha256"


class LinearEntry(TypedDict):
    """What is recorded of a linear: its scheme, its errors (``weight``, ``output``), what passes reported."""

    scheme: str
    errors: dict[str, float]
    notes: dict[str, float | str]


class BlockRecord(TypedDict):
    """``block-00007.json``: forward passes that the block took, its linears by their names in it."""

    forwards: Count
    linears: dict[str, LinearEntry]
    sha256: dict[str, str]


@dataclass(frozen=True)
class FinishedBlocks:
    """The files of a run in ``folder``: ``block-00007.safetensors`` and ``block-00007.json``."""

    folder: Path
    spec: ArchitectureSpec

    def count(self) -> int:
        """Blocks from the first on that are finished and as they were written: the tensor file is renamed into place
        last, and every file must have the digest that the record has of it. A damaged block is made again, and so are
        those behind it, which were calibrated on its outputs."""
        count = 0
        while count < self.spec.n_blocks and self._intact(count):
            count += 1
        return count

    def _intact(self, index: int) -> bool:
        if not (self.tensors_path(index).exists() and self.record_path(index).exists()):
            return False
        try:
            record: dict[str, Any] = {**self._record(index)}
            return bool(record.pop(DIGESTS) == self._digests(index, record))
        except (ToolkitError, TypeError):
            return False

    def _record(self, index: int) -> BlockRecord:
        return built(BlockRecord, read_json(self.record_path(index)))

    def _digests(self, index: int, record: Mapping[str, Any]) -> dict[str, str]:
        """sha256 of everything that is kept of a block: its record and its files."""
        found = {"record": hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()}
        for path in (self.tensors_path(index), self.gates_path(index)):
            if path.exists():
                found[path.name] = file_digest(path)
        return found

    def tensors_path(self, index: int) -> Path:
        return self.folder / f"block-{index:05d}.safetensors"

    def record_path(self, index: int) -> Path:
        return self.folder / f"block-{index:05d}.json"

    def gates_path(self, index: int) -> Path:
        return self.folder / f"block-{index:05d}.gates.safetensors"

    def tensors(self, index: int) -> dict[str, torch.Tensor]:
        """As written, by full checkpoint name."""
        with CheckpointReader.of_file(self.tensors_path(index)) as file:
            return {name: file.tensor(name) for name in file.infos}

    def gates(self, index: int) -> dict[str, torch.Tensor]:
        """Activation thresholds of a block, as its passes left them in ``segment.gates``."""
        if not self.gates_path(index).exists():
            return {}
        with CheckpointReader.of_file(self.gates_path(index)) as file:
            return {name: file.tensor(name) for name in file.infos}

    def all_gates(self) -> dict[str, torch.Tensor]:
        """`gates` of every block."""
        return {name: t for index in range(self.spec.n_blocks) for name, t in self.gates(index).items()}

    def linears(self, index: int) -> dict[str, LinearEntry]:
        """What is recorded of a block's linears, by full name."""
        return {self.spec.prefix(index) + name: entry for name, entry in self._record(index)["linears"].items()}

    def commit(self, segment: Segment, tensors: Mapping[str, torch.Tensor], forwards: int) -> Callable[[], None]:
        """What commits one block when it is called; it holds the tensors, and nothing else of the segment.

        Args:
            tensors: of its file, full checkpoint names.
            forwards: passes of the calibration set through the block that it took.
        """
        record = {
            "forwards": forwards,
            "linears": {
                name: {
                    "scheme": str(scheme),
                    "errors": segment.errors[name],
                    "notes": segment.notes.get(name, {}),
                }
                for name, scheme in segment.schemes.items()
            },
        }
        return partial(self._write, segment.index, record, tensors, dict(segment.gates))

    def _write(
        self,
        index: int,
        record: dict[str, Any],
        tensors: Mapping[str, torch.Tensor],
        gates: Mapping[str, torch.Tensor],
    ) -> None:
        for path in (self.gates_path(index), self.tensors_path(index), self.record_path(index)):
            _remove(path)  # of a damaged block that is made again
        if gates:
            save_tensors(self.gates_path(index), gates)
        save_tensors(self.tensors_path(index), tensors)
        record = json.loads(json.dumps(record))  # as it will be read back: NaN and numbers alike
        record[DIGESTS] = self._digests(index, record)
        write_atomically(self.record_path(index), (json.dumps(record, sort_keys=True) + "\n").encode())


class Committing:
    """Writes finished blocks in a thread, one at a time and in order, while the next one is worked on. What that raises
    comes out of a later call; leaving the ``with`` waits for the last one, so that it can be resumed from."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1)
        self._writing: Future[None] | None = None

    def begin(self, write: Callable[[], None]) -> None:
        self.wait()
        self._writing = self._thread.submit(write)

    def wait(self) -> None:
        """Until what was begun is written."""
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.result()

    def __enter__(self) -> Committing:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._thread.shutdown()
        if error is None:
            self.wait()


def _remove(path: Path) -> None:
    """A file, a link or a folder, if one is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
