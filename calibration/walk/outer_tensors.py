"""`OuterTensors`: the tensors outside the decoder blocks as the passes leave them, one at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from calibration.architectures.spec import ArchitectureSpec
from calibration.model.checkpoint import TensorSource
from calibration.walk.passes import Pass, Read


class OuterTensors:
    """Embeddings, final norm, head and whatever else no block holds, by full checkpoint names.

    Args:
        passes: those of the run; the ones that rewrite tensors here do so in their order, when a tensor is read.
    """

    def __init__(self, reader: TensorSource, architecture: ArchitectureSpec, passes: Sequence[Pass]) -> None:
        self.names = [n for n in reader.infos if architecture.block_of(n) is None]
        self._reader = reader
        self._rewritten: list[Mapping[str, Callable[[Read], Any]]] = []
        for step in passes:
            rewritten = dict(step.outside(architecture, self.names))
            self.names += [name for name in rewritten if name not in self.names]
            self._rewritten.append(rewritten)

    def tensor(self, name: str) -> torch.Tensor:
        """In the dtype in which it is stored."""
        return self._through_passes(self._reader.tensor)(name)

    def rows(self, name: str, indices: torch.Tensor) -> torch.Tensor:
        """Rows of an embedding by their numbers, int64 ``[count]`` and rising; passes make each of the row it was."""

        def read(other: str) -> torch.Tensor:
            return self._reader.rows(name, indices) if other == name else self._reader.tensor(other)

        return self._through_passes(read)(name)

    def _through_passes(self, read: Read) -> Read:
        for rewritten in self._rewritten:
            read = _after(read, rewritten) if rewritten else read
        return read

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """All of them, in the order of their names."""
        for name in sorted(self.names):
            yield name, self.tensor(name)


def _after(read: Read, rewritten: Mapping[str, Callable[[Read], Any]]) -> Read:
    def tensor(name: str) -> torch.Tensor:
        made = rewritten[name](read) if name in rewritten else read(name)
        assert isinstance(made, torch.Tensor)
        return made

    return tensor
