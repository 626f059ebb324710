"""What work consists of, in amounts that take time at rates of a machine: how long a plan takes is one over the other.

Amounts are counted from shapes. The factors in front of weights and values were measured on SmolLM2-135M, one thread.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass


@dataclass(frozen=True)
class Work:
    """Amounts of what takes time.

    Attributes:
        products: operations (two per multiply-add) of matrix products in the dtype of the forward pass.
        exact: the same in float32.
        values: values that elementwise operations go over while they lie in a cache; each operation counts.
        fresh: float32 values that are written to memory which the process did not have before.
        calls: tensor operations, however small.
        read, written: bytes of files.
        hashed: bytes.
        text: bytes of text that are tokenized.
    """

    products: float = 0.0
    exact: float = 0.0
    values: float = 0.0
    fresh: float = 0.0
    calls: float = 0.0
    read: float = 0.0
    written: float = 0.0
    hashed: float = 0.0
    text: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def __mul__(self, factor: float) -> Work:
        return Work(*(factor * amount for amount in astuple(self)))


def total(works: Iterable[Work]) -> Work:
    """All of it."""
    return sum(works, start=Work())


@dataclass(frozen=True)
class InputShape:
    """Linears of a block that read one input ``X [tokens, width]``.

    Attributes:
        rows: outputs of each linear that is at work: those with a scheme.
        tokens: that arrive there, of the whole calibration set; an expert sees a share of them.
    """

    width: int
    rows: tuple[int, ...]
    tokens: float


@dataclass(frozen=True)
class BlockShape:
    """The sizes that a pass needs to say what it costs on one block.

    Attributes:
        inputs: the linears at work by shared input.
        group: weights that share a step, as most linears have it; the width of a row where that is one group.
        windows, batches: of the calibration set.
        forward: one pass of the block over the whole calibration set.
        has_gram: some pass of the run gathers Gram matrices, so that errors of outputs are measured.
        integers: that a group has under the steps of a super-block (K-quants): 2 where it has a minimum beside its
            scale, 0 on grids without super-blocks.
    """

    inputs: tuple[InputShape, ...]
    group: int
    windows: int
    batches: int
    forward: Work
    has_gram: bool
    integers: int = 0

    @property
    def linears(self) -> Sequence[tuple[int, int]]:
        """(rows, width) of every linear at work."""
        return [(rows, shared.width) for shared in self.inputs for rows in shared.rows]

    def measuring(self, rows: int, width: int) -> Work:
        """What a rounded linear leaves of its weight and, with a Gram matrix, of its output."""
        product = Work(exact=4.0 * rows * width**2, fresh=4.0 * rows * width) if self.has_gram else Work()
        return product + Work(values=8.0 * rows * width, fresh=rows * width)


NEAREST = 16  # elementwise operations that round a weight to its nearest level


SEARCHED = 2700
"""The same where the grid has super-blocks, and is searched for."""


def nearest(rows: int, width: int) -> Work:
    """A matrix rounded to nearest, with its grid, as a candidate of a search."""
    return Work(values=float(NEAREST * rows * width), calls=25.0)


def searching(block: BlockShape, rows: int, width: int) -> Work:
    """The search for the grid of a matrix, where it has super-blocks."""
    return Work(values=float(SEARCHED * rows * width)) if block.integers else Work()


def rounding(block: BlockShape) -> list[Work]:
    """Every linear rounded to nearest, turned back into weights and measured."""
    return [
        nearest(rows, width)
        + searching(block, rows, width)
        + Work(fresh=1.0 * rows * width)
        + block.measuring(rows, width)
        for rows, width in block.linears
    ]
