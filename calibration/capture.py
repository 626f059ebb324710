"""The only file that registers hooks, always inside a ``with``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from calibration.statistics import Statistic

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""The positional and the keyword arguments of one call of a module."""


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


@contextmanager
def accumulate(block: nn.Module, statistics: Mapping[str, Iterable[Statistic]]) -> Iterator[None]:
    """While open, every forward pass of ``block`` folds the inputs of the named submodules into their statistics.

    Args:
        statistics: module path below ``block`` -> accumulators of its input. Linears that share an input need one
            entry, under the name of any of them.
    """

    def hook_for(accumulators: tuple[Statistic, ...]):  # type: ignore[no-untyped-def]
        def hook(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            x = args[0].flatten(0, -2)
            if x.shape[0]:
                for accumulator in accumulators:
                    accumulator.update(x)

        return hook

    handles = [
        block.get_submodule(path).register_forward_pre_hook(hook_for(tuple(accumulators)))
        for path, accumulators in statistics.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
