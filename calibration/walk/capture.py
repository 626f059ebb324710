"""The only file that registers hooks: inside a ``with``, until the caller removes them (`place`), or for good
(`transform_input`)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from calibration.model.experts import Expert
from calibration.walk.statistics import BySequence, Statistic, TwoStreams

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""The positional and the keyword arguments of one call of a module."""


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
        rows = _rows(block, path)
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
def watching(block: nn.Module, watches: Iterable[Watch]) -> Iterator[None]:
    """`place` for the length of a ``with``."""
    handles = place(block, watches)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def transform_input(module: nn.Module, transform: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """From now on ``module`` sees ``transform(x)`` for its input x, and so do hooks that are registered later."""
    module.register_forward_pre_hook(lambda _, args: (transform(args[0]), *args[1:]))


@contextmanager
def record_calls(block: nn.Module, paths: Iterable[str]) -> Iterator[dict[str, list[Call]]]:
    """While open, the arguments of every call of the submodules at these paths ("" is the block itself)."""
    calls: dict[str, list[Call]] = {path: [] for path in paths}

    def hook_for(seen: list[Call]):  # type: ignore[no-untyped-def]
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen.append((args, dict(kwargs)))

        return hook

    handles = [
        block.get_submodule(path).register_forward_pre_hook(hook_for(seen), with_kwargs=True)
        for path, seen in calls.items()
    ]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


Inputs = dict[str, tuple[torch.Tensor, torch.Tensor | None]]
"""Module path -> its input ``[tokens, in]``, and in an `Expert` the rows of the batch that these are, int64
``[tokens]``."""


def _rows(block: nn.Module, path: str) -> torch.Tensor | None:
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


@contextmanager
def record_inputs(block: nn.Module, paths: Iterable[str]) -> Iterator[Inputs]:
    """While open, the last input of every submodule at these paths that was called."""
    inputs: Inputs = {}

    def hook_for(path: str):  # type: ignore[no-untyped-def]
        def hook(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            inputs[path] = args[0].flatten(0, -2), _rows(block, path)

        return hook

    handles = [block.get_submodule(path).register_forward_pre_hook(hook_for(path)) for path in paths]
    try:
        yield inputs
    finally:
        for handle in handles:
            handle.remove()


def _paired(x: torch.Tensor, rows: torch.Tensor | None, other: Inputs, path: str) -> torch.Tensor:
    """The float model's input for every token of ``x``; where its router sent the token elsewhere, ``x`` itself."""
    if rows is None:
        return other[path][0]
    found = x.clone()
    if path in other:
        values, known = other[path]
        assert known is not None
        here, there = torch.where(rows[:, None] == known[None, :])
        found[here] = values[there]
    return found


@contextmanager
def accumulate(
    block: nn.Module,
    statistics: Mapping[str, Iterable[Statistic]],
    weigh: Callable[[torch.Tensor], torch.Tensor] | None = None,
    other: Inputs | None = None,
) -> Iterator[None]:
    """While open, every forward pass of ``block`` folds the inputs of the named submodules into their statistics.

    Args:
        statistics: module path below ``block`` -> accumulators of its input. Linears that share an input need one
            entry, under the name of any of them.
        weigh: ``x [tokens, in]`` of one forward pass -> what each token counts, ``[tokens]``; None: all alike.
        other: for statistics of two streams, what the same submodules see in the float model, for one batch.
    """

    length = 0

    def entering(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        nonlocal length
        length = args[0].shape[1]

    def hook_for(path: str, accumulators: tuple[Statistic, ...]):  # type: ignore[no-untyped-def]
        def hook(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            x = args[0].flatten(0, -2)
            weight = weigh(x) if weigh is not None and x.shape[0] else None
            for accumulator in accumulators if x.shape[0] else ():
                if isinstance(accumulator, BySequence) and x.shape[0] % length == 0:
                    accumulator.update_sequences(x.unflatten(0, (-1, length)))
                elif isinstance(accumulator, TwoStreams):
                    assert other is not None, "this gathering has one stream"
                    accumulator.update_pair(x, _paired(x, _rows(block, path), other, path), weight)
                else:
                    accumulator.update(x, weight)

        return hook

    handles = [block.register_forward_pre_hook(entering)] + [
        block.get_submodule(path).register_forward_pre_hook(hook_for(path, tuple(accumulators)))
        for path, accumulators in statistics.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
