"""Hooks of a walk: inside a ``with``, or for good (`transform_input`). They and `calibration.model.watching` are the
only places that register hooks."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from calibration.model.watching import rows_of
from calibration.walk.ranges import BySequence
from calibration.walk.statistics import Statistic, TwoStreams

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""The positional and the keyword arguments of one call of a module."""


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


Watcher = Callable[[torch.Tensor, torch.Tensor], None]
"""Takes the input ``[tokens, in]`` of a linear, and the gradient of a loss at its output ``[tokens, out]``."""


@contextmanager
def watch_gradients(block: nn.Module, watchers: Mapping[str, Watcher]) -> Iterator[None]:
    """While open, every backward pass through a call of the submodules at these paths is told to their watchers."""

    def hook_for(watcher: Watcher):  # type: ignore[no-untyped-def]
        def hook(module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            x = args[0].detach().flatten(0, -2)
            if output.requires_grad:
                output.register_hook(lambda gradient: watcher(x, gradient.flatten(0, -2)))

        return hook

    handles = [block.get_submodule(path).register_forward_hook(hook_for(w)) for path, w in watchers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


Inputs = dict[str, tuple[torch.Tensor, torch.Tensor | None]]
"""Module path -> its input ``[tokens, in]``, and in an `Expert` the rows of the batch that these are, int64
``[tokens]``."""


@contextmanager
def record_inputs(block: nn.Module, paths: Iterable[str]) -> Iterator[Inputs]:
    """While open, the last input of every submodule at these paths that was called."""
    inputs: Inputs = {}

    def hook_for(path: str):  # type: ignore[no-untyped-def]
        def hook(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            inputs[path] = args[0].flatten(0, -2), rows_of(block, path)

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
    writes: Container[str] = (),
) -> Iterator[None]:
    """While open, every forward pass of ``block`` folds the inputs of the named submodules into their statistics.

    Args:
        statistics: module path below ``block`` -> accumulators of its input. Linears that share an input need one
            entry, under the name of any of them.
        weigh: ``x [tokens, in]`` of one forward pass -> what each token counts, ``[tokens]``; None: all alike.
        other: for statistics of two streams, what the same submodules see in the float model, for one batch.
        writes: paths whose output is added to what the block returns. Their tokens are weighed by that instead, so
            their inputs are kept until it is there.
    """

    length = 0
    waiting: list[Callable[[torch.Tensor], None]] = []

    def entering(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        nonlocal length
        length = args[0].shape[1]

    def hook_for(path: str, accumulators: tuple[Statistic, ...]):  # type: ignore[no-untyped-def]
        def hook(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            x, rows = args[0].detach().flatten(0, -2), rows_of(block, path)
            if not x.shape[0]:
                return
            if weigh is not None and path in writes:
                waiting.append(lambda stream: fold(x, rows, weigh(stream if rows is None else stream[rows])))
            else:
                fold(x, rows, None if weigh is None else weigh(x))

        def fold(x: torch.Tensor, rows: torch.Tensor | None, weight: torch.Tensor | None) -> None:
            for accumulator in accumulators:
                if isinstance(accumulator, BySequence) and x.shape[0] % length == 0:
                    accumulator.update_sequences(x.unflatten(0, (-1, length)))
                elif isinstance(accumulator, TwoStreams):
                    assert other is not None, "this gathering has one stream"
                    accumulator.update_pair(x, _paired(x, rows, other, path), weight)
                else:
                    accumulator.update(x, weight)

        return hook

    def leaving(module: nn.Module, args: tuple[torch.Tensor, ...], output: Any) -> None:
        stream = (output[0] if isinstance(output, tuple) else output).detach().flatten(0, -2)
        for fold in waiting:
            fold(stream)
        waiting.clear()

    handles = [block.register_forward_pre_hook(entering), block.register_forward_hook(leaving)] + [
        block.get_submodule(path).register_forward_pre_hook(hook_for(path, tuple(accumulators)))
        for path, accumulators in statistics.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
