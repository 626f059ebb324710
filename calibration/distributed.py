"""Several processes that calibrate one model, started by ``torchrun`` or ``accelerate launch``.

The calibration batches are cut into lanes, whatever the number of processes: lane k has the k-th share of them, and its
sums start from zero. A process owns whole lanes (k modulo the number of processes), and the sums of the lanes are added
up in the order of the lanes. So every sum is made of the same additions in the same order for any number of processes,
one among them, and files are the same byte for byte where a process has the same number of threads.

The first process receives a lane when its turn has come, so that a process holds one lane at a time beside the total.
gloo carries tensors of CPUs and nccl those of GPUs.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist

from calibration.errors import ToolkitError
from calibration.launcher import launched, local_number

LANES = 8
HANGING = timedelta(hours=6)  # the others wait while the first one writes a large model
"""A process that says nothing for so long is given up. (One that ends is noticed at once: its connections close.)"""
RESUME = "what is finished is kept: run the same command again with --resume, on any number of processes"


def lanes_of(batches: int) -> list[range]:
    """The batches of every lane: at most `LANES` of them, contiguous, none empty, as equal as can be."""
    n = min(LANES, batches)
    ends = [batches * k // n for k in range(n + 1)] if n else [0]
    return [range(first, end) for first, end in pairwise(ends)]


@dataclass
class Processes:
    """The processes of a run, seen from one of them. ``Processes()`` is a run of one.

    Attributes:
        rank: of this one. The first writes, reports and shows progress.
        size: how many there are.
        moved: bytes of tensors that this one has sent to others and received from them.
    """

    rank: int = 0
    size: int = 1
    moved: int = field(default=0)

    @property
    def first(self) -> bool:
        return self.rank == 0

    def owner(self, lane: int) -> int:
        """The process that has a lane."""
        return lane % self.size

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """A function of `torch.distributed`.

        Raises:
            ToolkitError: another process has ended, or does not answer.
        """
        try:
            return function(*args, **kwargs)
        except (RuntimeError, dist.DistError) as error:
            raise ToolkitError(
                f"process {self.rank + 1} of {self.size}: another process of this run has ended "
                f"({str(error).splitlines()[0][:120]})",
                RESUME,
            ) from None

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

    def all_values(self, value: Any) -> list[Any]:
        """The values of all processes, by rank."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        self.call(dist.all_gather_object, found, value)
        return found

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


def join(on_gpu: bool) -> Processes:
    """The processes that the launcher has started, connected; a run of one without a launcher.

    Raises:
        ToolkitError: no connection comes about.
    """
    rank, size = launched()
    if size == 1:
        return Processes()
    if on_gpu:
        torch.cuda.set_device(local_number())
    if not dist.is_initialized():
        try:
            dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=HANGING)
        except (RuntimeError, ValueError, dist.DistError) as error:
            where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            raise ToolkitError(
                f"process {rank + 1} of {size}: no connection by {where} ({str(error).splitlines()[0][:160]})",
                "free that port, or choose another with --master-port of the launcher",
            ) from None
    return Processes(rank, size)
