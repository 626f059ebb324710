"""Several processes that calibrate one model, started by ``torchrun`` or ``accelerate launch``.

The calibration batches are cut into lanes, whatever the number of processes: lane k has the k-th share of them, and its
sums start from zero. A process owns whole lanes (k modulo the number of processes), and the sums of the lanes are added
up in the order of the lanes. So every sum is made of the same additions in the same order for any number of processes,
one among them, and files are the same byte for byte where a process has the same number of threads.

The first process receives a lane when its turn has come, so that a process holds one lane at a time beside the total.
gloo carries tensors of CPUs and nccl those of GPUs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from calibration.errors import ToolkitError
from calibration.nested import moved, nbytes
from calibration.presence import OtherEnded, Presence

T = TypeVar("T")
LANES = 8


def lanes_of(batches: int) -> list[range]:
    """The batches of every lane: at most `LANES` of them, contiguous, none empty, as equal as can be."""
    n = min(LANES, batches)
    ends = [batches * k // n for k in range(n + 1)] if n else [0]
    return [range(first, end) for first, end in pairwise(ends)]


def idle_words(processes: int, batches: int) -> str | None:
    """What to say where some processes have nothing to do."""
    busy = min(LANES, batches)
    if processes <= busy:
        return None
    return f"{processes} processes, and work for {busy}: {batches} calibration batches in at most {LANES} lanes"


@dataclass
class Processes:
    """The processes of a run, seen from one of them. ``Processes()`` is a run of one.

    Attributes:
        rank: of this one. The first writes, reports and shows progress.
        size: how many there are.
        moved: bytes of tensors that this one has sent to others and received from them.
        presence: notices those that end; None in a run of one.
    """

    rank: int = 0
    size: int = 1
    moved: int = field(default=0)
    presence: Presence | None = None

    @property
    def first(self) -> bool:
        return self.rank == 0

    def owner(self, lane: int) -> int:
        """The process that has a lane."""
        return lane % self.size

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """A function of `torch.distributed`.

        Raises:
            OtherEnded: another process has ended, or does not answer.
        """
        try:
            return function(*args, **kwargs)
        except (RuntimeError, dist.DistError) as error:
            if self.presence is not None:
                self.presence.await_name()
            raise OtherEnded(str(error).splitlines()[0][:120]) from None

    def refuse_differences(self, facts: Mapping[str, Any]) -> None:
        """Refuse a run whose processes are not about to do the same.

        Args:
            facts: what must be the same everywhere, by the names that a user knows it by.

        Raises:
            ToolkitError: in every process, naming what differs and where.
        """
        of_first, *rest = self.all_values(dict(facts))
        for rank, other in enumerate(rest, start=2):
            for name in dict.fromkeys([*of_first, *other]):
                if of_first.get(name) != other.get(name):
                    raise ToolkitError(
                        f"'{name}' differs between the processes of this run: {of_first.get(name)!r} in the first, "
                        f"{other.get(name)!r} in process {rank}",
                        "start the same command with the same model and the same versions everywhere",
                    )

    def barrier(self) -> None:
        """Wait for all."""
        if self.size > 1:
            self.call(dist.barrier)

    def agree(self, value: Any) -> Any:
        """The value that the first process has."""
        if self.size == 1:
            return value
        box = [value]
        self.call(dist.broadcast_object_list, box, src=0, device=CPU)
        return box[0]

    def agree_at_the_end(self, value: Any) -> Any:
        """As `agree`, when the first process has no more need of the others: those that have ended get nothing, and are
        not missed. `mind_first_only` goes before."""
        if self.size == 1:
            return value
        if not self.first:
            box: list[Any] = [None]
            self.call(dist.recv_object_list, box, src=0, device=CPU)
            return box[0]
        for rank in range(1, self.size):
            with suppress(RuntimeError, dist.DistError):
                dist.send_object_list([value], dst=rank, device=CPU)
        return value

    def mind_first_only(self) -> None:
        """What is left to do is the first process's."""
        if self.presence is not None:
            self.presence.stop_minding()

    def all_values(self, value: Any) -> list[Any]:
        """The values of all processes, by rank."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        self.call(dist.all_gather_object, found, value)
        return found

    def spread(self, costs: Sequence[float], work: Callable[[int], T]) -> Iterator[T]:
        """The results of tasks that depend on nothing but what all processes have, in order. Each is carried out once,
        by the process that `owners_by_cost` gives it, whose results then come to all; tensors in them (in dataclasses,
        mappings and tuples) come on the CPU where there are several processes.

        Args:
            costs: what each task takes, in any unit.
            work: carries out the task of a number.
        """
        if self.size == 1:
            yield from map(work, range(len(costs)))
            return
        owners = owners_by_cost(costs, self.size)
        own = {i: moved(work(i), CPU) for i, owner in enumerate(owners) if owner == self.rank}
        results: dict[int, T] = {}
        for rank in range(self.size):
            box = [own if rank == self.rank else None]
            self.call(dist.broadcast_object_list, box, src=rank, device=CPU)
            results |= box[0] or {}
            self.moved += nbytes(box[0]) * (self.size - 1 if rank == self.rank else 1)
        for i in range(len(costs)):
            yield results.pop(i)

    def send(self, items: Sequence[Any], to: int) -> None:
        """Hand over the attributes of some objects; see `receive`."""
        self.call(dist.send_object_list, [[_described(vars(item)) for item in items]], dst=to, device=CPU)
        for tensor in _tensors(items):
            self.moved += tensor.nbytes
            self.call(dist.send, tensor.contiguous(), dst=to)

    def receive(self, items: Sequence[Any], source: int, take: Callable[[int, dict[str, Any]], None]) -> None:
        """Take objects of another process one by one: ``take(position, attributes)``. ``items`` tell the devices."""
        box: list[Any] = [None]
        self.call(dist.recv_object_list, box, src=source, device=CPU)
        for position, description in enumerate(box[0]):
            attributes = _filled(description, items[position], lambda t: self.call(dist.recv, t, src=source))
            self.moved += sum(value.nbytes for value in attributes.values() if torch.is_tensor(value))
            take(position, attributes)

    def share(self, items: Sequence[Any]) -> None:
        """Give the objects of every process the attributes that those of the first one have."""
        if self.size == 1:
            return
        described = self.agree([_described(vars(item)) for item in items])
        for item, description in zip(items, described, strict=True):
            if self.first:
                for tensor in _tensors([item]):
                    self.moved += tensor.nbytes * (self.size - 1)
                    self.call(dist.broadcast, tensor.contiguous(), src=0)
            else:
                vars(item).update(_filled(description, item, lambda t: self.call(dist.broadcast, t, src=0)))
                self.moved += sum(tensor.nbytes for tensor in _tensors([item]))


CPU = torch.device("cpu")


def _described(attributes: dict[str, Any]) -> dict[str, Any]:
    """Attributes as they are, and shape and dtype in place of tensors."""
    return {
        name: (tuple(value.shape), value.dtype) if torch.is_tensor(value) else value
        for name, value in attributes.items()
    }


def _tensors(items: Sequence[Any]) -> list[torch.Tensor]:
    return [value for item in items for value in vars(item).values() if torch.is_tensor(value)]


def _filled(description: dict[str, Any], item: Any, fill: Callable[[torch.Tensor], Any]) -> dict[str, Any]:
    """The attributes that were described; ``fill`` reads a tensor."""
    attributes = {}
    for name, value in description.items():
        own = getattr(item, name)
        if torch.is_tensor(own):
            shape, dtype = value
            value = torch.empty(shape, dtype=dtype, device=own.device)
            fill(value)
        attributes[name] = value
    return attributes


def owners_by_cost(costs: Sequence[float], size: int) -> list[int]:
    """Which of ``size`` processes has every task: the dearest first, each to the one with the least to do."""
    load, owners = [0.0] * size, [0] * len(costs)
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        owners[i] = load.index(min(load))
        load[owners[i]] += costs[i]
    return owners
