"""The only file that registers hooks, always inside a ``with``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from calibration.statistics import Statistic


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
