"""Sums over the calibration set that are the same for any number of processes: lane by lane, in the order of lanes."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import singledispatch
from typing import Any, TypeVar

import torch

from calibration.distributed import Processes
from calibration.walk.products import plus
from calibration.walk.ranges import EqualBins, Extremes, Midpoints, TokenMaxima
from calibration.walk.statistics import AbsMax, CrossGram, Gram, Mean, Sample

K = TypeVar("K", bound=Hashable)
A = TypeVar("A")


def sum_of_lanes(
    lanes: Sequence[range],
    processes: Processes,
    accumulators: Callable[[], dict[K, A]],
    run: Callable[[range, Mapping[K, A]], None],
) -> dict[K, A]:
    """Statistics of the whole calibration set. A process holds the sums of one lane, and the first one the total.

    Args:
        lanes: the batches of this process in every lane, none where it is another's.
        accumulators: makes new ones, with the same keys in the same order in every process.
        run: folds the batches of a lane into some.

    Raises:
        ToolkitError: another process has ended.
    """
    total: dict[K, A] | None = None
    for lane, batches in enumerate(lanes):
        owner = processes.owner(lane)
        if owner == processes.rank:
            fresh = accumulators()
            run(batches, fresh)
            if not processes.first:
                processes.send(list(fresh.values()), 0)
            elif total is None:
                total = fresh
            else:
                for key, statistic in total.items():
                    merge(statistic, fresh[key])
            del fresh
        elif processes.first:
            assert total is not None, "the first process has the first lane"
            parts = list(total.values())

            def take(position: int, attributes: dict[str, Any], parts: Sequence[A] = parts) -> None:
                other = object.__new__(type(parts[position]))
                vars(other).update(attributes)
                merge(parts[position], other)

            processes.receive(parts, owner, take)
    found = accumulators() if total is None else total
    processes.share(list(found.values()))
    return found


@singledispatch
def merge(total: Any, other: Any) -> None:
    """Fold the sums of a later lane into those of the lanes before it."""
    raise TypeError(f"sums of {type(total).__name__} are not known to add up")


def _add(total: Any, other: Any, *names: str) -> None:
    """Attributes that add up; float64 where one of the two is."""
    for name in (*names, "tokens"):
        ours, theirs = getattr(total, name), getattr(other, name)
        if torch.is_tensor(ours):
            setattr(total, name, ours.to(torch.promote_types(ours.dtype, theirs.dtype)).add_(theirs))
        else:
            setattr(total, name, ours + theirs)


def _extend(total: Any, other: Any) -> None:
    """``low`` and ``high``: numbers, or one of each per channel."""
    for name, tensors, numbers in (("low", torch.minimum, min), ("high", torch.maximum, max)):
        ours, theirs = getattr(total, name), getattr(other, name)
        if torch.is_tensor(ours):
            dtype = torch.promote_types(ours.dtype, theirs.dtype)
            setattr(total, name, tensors(ours.to(dtype), theirs.to(dtype)))
        else:
            setattr(total, name, numbers(ours, theirs))


@merge.register(Gram)
@merge.register(CrossGram)
def _(total: Gram | CrossGram, other: Gram | CrossGram) -> None:
    total.matrix = plus(total.matrix, other.matrix)
    _add(total, other)


@merge.register
def _(total: Mean, other: Mean) -> None:
    _add(total, other, "total", "weight")


@merge.register
def _(total: AbsMax, other: AbsMax) -> None:
    dtype = torch.promote_types(total.maximum.dtype, other.maximum.dtype)
    total.maximum = torch.maximum(total.maximum.to(dtype), other.maximum.to(dtype))
    _add(total, other)


@merge.register
def _(total: TokenMaxima, other: TokenMaxima) -> None:
    _add(total, other, "_seen")  # lists, one behind the other


@merge.register
def _(total: Sample, other: Sample) -> None:
    total.rows = torch.cat([total.rows, other.rows])[: Sample.LIMIT]
    _add(total, other)


@merge.register
def _(total: EqualBins, other: EqualBins) -> None:
    for one, limit in ((total, other.limit), (other, total.limit)):
        while one.limit < limit:
            one._double()
    _extend(total, other)
    _add(total, other, "counts")


@merge.register
def _(total: Extremes, other: Extremes) -> None:
    _extend(total, other)
    _add(total, other)


@merge.register
def _(total: Midpoints, other: Midpoints) -> None:
    _extend(total, other)
    _add(total, other, "total", "sequences")
