"""What a method is: one pass over one segment, with its place in the order of things."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from enum import IntEnum
from itertools import pairwise
from typing import Any, ClassVar, Generic, Literal, TypeVar

import torch
from torch import nn

from calibration.architectures.spec import ArchitectureSpec, BlockSpec
from calibration.errors import Problem
from calibration.walk.context import Context
from calibration.walk.cost import BlockShape, Work, rounding
from calibration.walk.segment import Segment
from calibration.walk.states import Reference
from calibration.walk.statistics import Statistic, TwoStreams

Stream = Literal["none", "either", "quantized"]
"""Which calibration inputs a pass wants: none at all; those of the float model or of the quantized one, whichever the
run has (float where nothing asks for more, as AWQ was published); or what the quantized blocks before it produce."""


class Phase(IntEnum):
    """The composition rule: passes of a recipe must not go back to an earlier phase.

    TRANSFORM and BALANCE keep the function of the block (without data, with data). CHOOSE fills schemes and grids and
    leaves weights alone. ROUND quantizes every linear that has a scheme, exactly once. REPAIR moves what is left. GATE
    adds activation thresholds.
    """

    TRANSFORM = 0
    BALANCE = 1
    CHOOSE = 2
    ROUND = 3
    REPAIR = 4
    GATE = 5


Transform = Callable[[torch.Tensor], torch.Tensor]
Read = Callable[[str], torch.Tensor]
"""A tensor of the checkpoint by its full name."""

Layout = TypeVar("Layout", covariant=True)


@dataclass(frozen=True)
class PlanView(Generic[Layout]):
    """The plan under construction, as passes see it.

    Attributes:
        layout: the linears with their schemes; None where weights stay as they are.
        config: of transformers.
        passes: all of the run, in order.
        tokens: of calibration.
    """

    layout: Layout
    spec: ArchitectureSpec
    config: Any
    passes: tuple[Pass, ...]
    tokens: int


class Pass(ABC):
    """A method. Its frozen dataclass *is* its configuration; nothing survives from one segment to the next.

    A subclass says what it is (`name`, `summary`, `phases`), implements `apply`, and overrides what it needs of the
    rest: by default a pass reads no data, checks nothing and edits nothing but its segment.

    Attributes:
        name: as recipes and ``--method`` spell it.
        title: as reports write it, where that is not the name: ``GPTQ``.
        summary: what it does, after "the pass": a few words with a verb, no full stop.
        default_scheme: what ``--method`` alone means; None where that is 4-bit integers or an earlier pass says it.
        phases: what it promises, in order (AWQ balances, then chooses clipping ranges).
        expected_errors: what `ptq fit` may expect of it: errors as of rounding to nearest, or as with GPTQ's feedback;
            None where it was not measured.
        learned_bytes: per weight of a block, what it holds beside the block while it trains: parameters, gradients.
        by_window: it trains on single windows, not on whole batches.
        spreads: several processes share the tasks of its `cost`.
        looks_at_batches: it reads calibration batches themselves and not only sums over them, so that they must all be
            in one process. (Passes with `references` do so too.)
    """

    name: ClassVar[str]
    title: ClassVar[str | None] = None
    summary: ClassVar[str]
    default_scheme: ClassVar[str | None] = None
    phases: ClassVar[tuple[Phase, ...]]
    expected_errors: ClassVar[Literal["nearest", "feedback"] | None] = None
    learned_bytes: ClassVar[int] = 0
    by_window: ClassVar[bool] = False
    spreads: ClassVar[bool] = False
    looks_at_batches: ClassVar[bool] = False

    @property
    def stream(self) -> Stream:
        """Which calibration inputs it wants."""
        return "none"

    @property
    def statistics(self) -> tuple[type[Statistic], ...]:
        """Accumulators it reads, gathered for all passes of a run in one forward."""
        return ()

    @property
    def references(self) -> tuple[Reference, ...]:
        """Outputs of the float block that it fits parameters to, and that the walk then computes."""
        return ()

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the tensors that it puts into ``segment.parts``."""
        return ()

    @property
    def reorders(self) -> bool:
        """Whether groups of columns follow an activation order, so that files need a column index."""
        return False

    @abstractmethod
    def apply(self, segment: Segment, context: Context) -> None:
        """Edit the segment in place; report numbers through ``segment.note``."""

    def forwards(self) -> int:
        """Forward passes per block beyond the one that gathers the statistics."""
        return 0

    def units(self) -> int:
        """How often it calls ``context.advance`` per calibration batch: once per forward pass, more often where that
        takes longer than others."""
        return self.forwards()

    def cost(self, block: BlockShape) -> Sequence[Work]:
        """What its tasks on one block take beyond `forwards` and what `statistics` need: a list entry for each task.
        By default that of rounding to nearest for passes that round, and the backward passes of those that train."""
        backward = [block.forward * (2.0 * self.forwards())] if self.references else []
        return [*(rounding(block) if Phase.ROUND in self.phases else ()), *backward]

    def check(self, view: PlanView[Any]) -> Iterable[Problem]:
        """What can be refused before a weight is read."""
        return ()

    def refusals(self, architecture: ArchitectureSpec) -> Iterable[Problem]:
        """Why the pass cannot keep the function of this architecture, and what still works."""
        return ()

    def remarks(self, view: PlanView[Any]) -> Iterable[str]:
        """Sentences for the plan about what the pass does here that a user may not expect."""
        return ()

    def alternatives(self, scheme: Any, shape: tuple[int, int]) -> Sequence[Any]:
        """Every scheme that the pass may give to a linear ``W [out, in]`` planned with this one, where it replaces
        entries of ``segment.schemes``: no format is to meet a scheme that it cannot hold."""
        return ()

    def part_bits(self, out_features: int, in_features: int) -> int:
        """Bits stored beside the codes of one linear ``[out, in]``, where they are enough to be counted."""
        return 0

    def calibrated(self, block: BlockSpec) -> Collection[str]:
        """The linears whose inputs get a range, as the part ``input_scale``, where their scheme has static inputs."""
        return ()

    def input_transforms(self, spec: BlockSpec, quantized: Collection[str]) -> Mapping[str, Transform]:
        """Linear -> the function of its input ``[..., in]`` while the model runs, for a block with these quantized
        linears."""
        return {}

    def outside(self, architecture: ArchitectureSpec, names: Collection[str]) -> Mapping[str, Callable[[Read], Any]]:
        """Changes outside the blocks (embeddings, final norm, head): full name -> how to make the tensor from those
        before the pass. May add names to ``names``. An embedding is made row by row: what it is read from may have the
        rows of some tokens only."""
        return {}

    def new_biases(self, architecture: ArchitectureSpec, index: int, stored: Collection[str]) -> Collection[str]:
        """Linears of a block that get a bias which the checkpoint does not have, zeros until a pass edits it, from the
        names that the block stores. (An entry of ``config.json`` switches on biases of several linears, needed or
        not.)"""
        return ()

    def config_changes(self, config: Any) -> Mapping[str, Any]:
        """Entries of ``config.json`` that differ afterwards, from the transformers config before."""
        return {}

    def masked(
        self, block: nn.Module, spec: ArchitectureSpec, index: int, gates: Mapping[str, torch.Tensor]
    ) -> AbstractContextManager[Any]:
        """While open, forward passes of a block are as sparse as the calibration of later blocks wants it; dense by
        default."""
        return nullcontext()


def references_of(passes: Sequence[Pass]) -> tuple[Reference, ...]:
    """The outputs of the float block that some pass trains towards, each once."""
    return tuple(dict.fromkeys(kind for p in passes for kind in p.references))


def watches_float(passes: Sequence[Pass]) -> bool:
    """Whether some pass reads a statistic of two streams, so that the walk carries the float model's states along."""
    return any(issubclass(kind, TwoStreams) for p in passes for kind in p.statistics)


def undivided(passes: Sequence[Pass]) -> list[str]:
    """Names of the passes that cannot share the calibration batches with other processes."""
    return [p.name for p in passes if p.looks_at_batches or p.references]


def keeps_originals(passes: Sequence[Pass]) -> bool:
    """Whether some pass needs the weights as they were before rounding, which then stay in memory: to compare with
    them, or to run the float block beside the rounded one."""
    return watches_float(passes) or any(Phase.REPAIR in p.phases for p in passes)


def check_order(passes: Sequence[Pass]) -> Iterable[Problem]:
    """Problems of order: phases that go back, and anything but exactly one rounding pass."""
    for before, after in pairwise(passes):
        if after.phases[0] < before.phases[-1]:
            yield Problem(
                f"{before.name}+{after.name}",
                f"'{after.name}' ({after.phases[0].name}) cannot follow '{before.name}' ({before.phases[-1].name})",
                f"write {after.name}+{before.name}",
            )
    transforming = [p.name for p in passes if p.phases == (Phase.TRANSFORM,)]
    for name in dict.fromkeys(n for n in transforming if transforming.count(n) > 1):
        yield Problem(name, "changes the basis twice", f"write {name} once")
    rounding = [p.name for p in passes if Phase.ROUND in p.phases]
    if len(rounding) > 1:
        yield Problem("+".join(rounding), "more than one pass rounds the weights", f"keep one of {', '.join(rounding)}")


def stream_of(passes: Sequence[Pass]) -> Stream:
    """The one stream of calibration inputs that serves all passes."""
    wanted = {p.stream for p in passes}
    return "quantized" if "quantized" in wanted else "either" if "either" in wanted else "none"


def forwards_per_block(passes: Sequence[Pass]) -> int:
    """Forward passes over the calibration set per block: one that gathers, where a pass reads statistics (and on a
    float stream propagates at once), one of the float block beside it where they are of two streams, one of the float
    block per reference, those that passes add, and one that propagates through the quantized block. (A training step
    counts as one; its backward pass comes on top.)"""
    return _per_block(passes, sum(p.forwards() for p in passes))


def units_per_block(passes: Sequence[Pass]) -> int:
    """The same in units of progress."""
    return _per_block(passes, sum(p.units() for p in passes))


def _per_block(passes: Sequence[Pass], added: int) -> int:
    stream = stream_of(passes)
    if stream == "none":
        return 0
    gathers = any(p.statistics for p in passes) + watches_float(passes)
    return gathers + len(references_of(passes)) + added + (stream == "quantized")
