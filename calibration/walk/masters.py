"""`Masters`: the parameters of a block in float32, each read and made when something first asks for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping

import torch

HALVES = (torch.bfloat16, torch.float16)


class Masters(MutableMapping[str, torch.Tensor]):
    """Block-relative name -> parameter on ``device`` in ``dtype`` (float32; float64 in exactness tests).

    Rounding to nearest looks at a weight once and some rows at a time: where no text runs through the block nobody else
    asks for it, and its float32 copy, twice what the file has, is never made.

    Args:
        stored: the parameters as the file has them, by functions that read them; none is read twice.
    """

    def __init__(
        self, stored: Mapping[str, Callable[[], torch.Tensor]], device: torch.device, dtype: torch.dtype
    ) -> None:
        self.device, self.dtype = device, dtype
        self._names = dict.fromkeys(stored)
        self._unread = dict(stored)
        self._stored: dict[str, torch.Tensor] = {}
        self._later: dict[str, Callable[[], torch.Tensor]] = {}
        self._made: dict[str, torch.Tensor] = {}

    def __getitem__(self, name: str) -> torch.Tensor:
        if name in self._unread or name in self._stored:
            # as it is stored, and without waiting where it lies in pinned memory: the device makes the float32 of it
            self._made[name] = self._read(name).to(self.device, non_blocking=True).to(self.dtype)
            self._stored.pop(name)
        elif name in self._later:
            self._made[name] = self._later.pop(name)()
        return self._made[name]

    def __setitem__(self, name: str, value: torch.Tensor) -> None:
        self._forget(name)
        self._names[name] = None
        self._made[name] = value

    def __delitem__(self, name: str) -> None:
        del self._names[name]
        self._forget(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def clear(self) -> None:
        """Let go of all of them."""
        for held in (self._names, self._unread, self._stored, self._later, self._made):
            held.clear()

    def exact(self, name: str) -> torch.Tensor:
        """The same values, in 16 bits where they are stored so and nobody has read the master yet."""
        if self.dtype == torch.float32 and (name in self._unread or name in self._stored):
            stored = self._read(name)
            if stored.dtype in HALVES:
                return stored.to(self.device, non_blocking=True)
        return self[name]

    def overwrite(self, name: str, make: Callable[[], torch.Tensor]) -> None:
        """Let a master have the values that ``make`` gives. They are made when it is read; at once, and in its place,
        where somebody has it already."""
        if name in self._made:
            self._made[name].copy_(make())
            return
        self._forget(name)
        self._later[name] = make

    def _forget(self, name: str) -> None:
        for held in (self._unread, self._stored, self._later, self._made):
            held.pop(name, None)

    def _read(self, name: str) -> torch.Tensor:
        if name in self._unread:
            self._stored[name] = self._unread.pop(name)()
        return self._stored[name]
