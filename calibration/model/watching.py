"""Watching the submodules of a block while it runs: what enters them, what leaves them, and in which order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from calibration.model.experts import Expert

Look = Callable[[torch.Tensor, torch.Tensor], torch.Tensor | None]
"""``(x [..., n], positions)`` -> what takes the place of x, or None to leave it. ``positions`` int64, broadcastable to
``x.shape[:-1]``: the index of each row in its sequence."""


@dataclass(frozen=True)
class Watch:
    """Look at what enters a submodule, or at what leaves it (``output``). ``path`` is below the block."""

    path: str
    look: Look
    output: bool = False

    @staticmethod
    def transforming(path: str, transform: Callable[[torch.Tensor], torch.Tensor]) -> Watch:
        """What enters the submodule is replaced by ``transform(x)``, of the same shape and dtype."""
        return Watch(path, lambda x, positions: transform(x))


Watches = Iterable[Watch] | AbstractContextManager[None]
"""Some, or what looks elsewhere than at submodules while it is open."""


def place(block: nn.Module, watches: Iterable[Watch]) -> list[RemovableHandle]:
    """Hooks that run until they are removed. Watches of one place run in order, each on what the one before left.

    Args:
        block: a decoder block, called with hidden states ``[batch, seq_len, hidden]``. Its submodules see tensors of
            that shape, their flattened rows, or (in an `Expert`) some of the flattened rows.
    """
    length = 0

    def entering(module: nn.Module, args: tuple[Any, ...]) -> None:
        nonlocal length
        length = args[0].shape[1]

    def positions(path: str, x: torch.Tensor) -> torch.Tensor:
        if x.ndim == 3:
            return torch.arange(x.shape[1], device=x.device)
        rows = rows_of(block, path)
        return (torch.arange(len(x), device=x.device) if rows is None else rows) % length

    def before(watch: Watch):  # type: ignore[no-untyped-def]
        def hook(module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
            changed = watch.look(args[0], positions(watch.path, args[0]))
            return None if changed is None else (changed, *args[1:])

        return hook

    def after(watch: Watch):  # type: ignore[no-untyped-def]
        def hook(module: nn.Module, args: Any, result: Any) -> torch.Tensor | None:
            if isinstance(result, tuple):  # a block, whose output is looked at, never replaced
                watch.look(result[0], positions(watch.path, result[0]))
                return None
            return watch.look(result, positions(watch.path, result))

        return hook

    handles = [block.register_forward_pre_hook(entering)]
    for watch in watches:
        module = block.get_submodule(watch.path)
        add = module.register_forward_hook if watch.output else module.register_forward_pre_hook
        handles.append(add(after(watch) if watch.output else before(watch)))
    return handles


@contextmanager
def watching(block: nn.Module, watches: Watches) -> Iterator[None]:
    """`place` for the length of a ``with``."""
    if isinstance(watches, AbstractContextManager):
        with watches:
            yield
        return
    handles = place(block, watches)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def rows_of(block: nn.Module, path: str) -> torch.Tensor | None:
    """In an `Expert` the rows of the batch that its linears see, int64 ``[tokens]``; elsewhere None."""
    parent = block.get_submodule(path.rpartition(".")[0])
    return parent.rows if isinstance(parent, Expert) else None


@dataclass(frozen=True)
class Seen:
    """One call of a submodule: its path, the tensors that were given to it and the tensor it returned (the first one
    of a tuple; None where it returned something else)."""

    path: str
    entered: tuple[torch.Tensor, ...]
    left: torch.Tensor | None


@contextmanager
def trace(block: nn.Module) -> Iterator[list[Seen]]:
    """While open, every call of every submodule, in the order in which the calls began."""
    calls: list[Seen] = []
    places: list[int] = []

    def before(path: str):  # type: ignore[no-untyped-def]
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            places.append(len(calls))
            calls.append(Seen(path, tuple(a for a in (*args, *kwargs.values()) if torch.is_tensor(a)), None))

        return hook

    def after(module: nn.Module, args: Any, result: Any) -> None:
        place, first = places.pop(), result[0] if isinstance(result, tuple) and result else result
        calls[place] = replace(calls[place], left=first if torch.is_tensor(first) else None)

    handles: list[RemovableHandle] = []
    for path, module in block.named_modules():
        if path:
            handles.append(module.register_forward_pre_hook(before(path), with_kwargs=True))
            handles.append(module.register_forward_hook(after))
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()
