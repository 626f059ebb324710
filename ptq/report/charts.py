"""Where the marks of the HTML report go. Every position is a percentage of the plot's width or height, so that a page
of any width needs no second drawing: text stays HTML and keeps its size."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from calibration.record import LinearRecord
from ptq.report import figures, wording
from ptq.report.axis import Axis, Tick
from ptq.report.page import HEAT_STEPS

_MAX_LABELS = 9


def middle(values: Iterable[float | None]) -> float | None:
    """The median of those that are known."""
    known = [v for v in values if v is not None]
    return statistics.median(known) if known else None


@dataclass(frozen=True)
class Cell:
    """All linears of one kind in one block: one of them, or the experts of a layer."""

    block: int
    kind: str
    linears: tuple[LinearRecord, ...]
    errors: tuple[float, ...]

    @property
    def median(self) -> float | None:
        return middle(self.errors)

    @property
    def worst(self) -> float | None:
        return max(self.errors, default=None)


@dataclass(frozen=True)
class Grid:
    """The cells of a record, and the rows and columns they stand in."""

    blocks: tuple[int, ...]
    kinds: tuple[str, ...]
    cells: dict[tuple[int, str], Cell]


def kind(entry: LinearRecord) -> str:
    """What a linear is called in every block; experts share one kind: ``mlp.experts.*.up_proj``."""
    parts = entry.name.split(".")
    at = parts.index(str(entry.block)) + 1 if str(entry.block) in parts else 0
    return ".".join("*" if part.isdigit() else part for part in parts[at:]) or entry.name


def grid(linears: Iterable[LinearRecord], by: wording.Metric) -> Grid:
    found: dict[tuple[int, str], list[LinearRecord]] = {}
    kinds: dict[str, None] = {}  # a set that keeps the order of the record, which is that of execution
    for entry in linears:
        kinds.setdefault(kind(entry))
        found.setdefault((entry.block, kind(entry)), []).append(entry)
    blocks = tuple(sorted({block for block, _ in found}))
    cells = {}
    for (block, name), entries in found.items():
        errors = [e for e in map(by.of, entries) if e is not None and math.isfinite(e)]
        cells[block, name] = Cell(block, name, tuple(entries), tuple(errors))
    return Grid(blocks, tuple(kinds), cells)


def short_names(kinds: Sequence[str]) -> dict[str, str]:
    """The last part of each name, or as much of it as tells it from the others."""
    names = {}
    for name in kinds:
        parts = name.split(".")
        for n in range(1, len(parts) + 1):
            tail = parts[-n:]
            if sum(other.split(".")[-n:] == tail for other in kinds) == 1:
                break
        names[name] = ".".join(tail)
    return names


@dataclass(frozen=True)
class Line:
    """One curve, as the path of an SVG whose view box is 100 by 100."""

    name: str
    path: str


@dataclass(frozen=True)
class Column:
    """One block of the curves: where it stands, its marks, and what is said about it."""

    left: float
    width: float
    middle: float
    median_y: float
    worst_y: float
    note: str


@dataclass(frozen=True)
class LayerChart:
    """Error per block: the range and the median over its linears, and one curve per kind of linear."""

    ticks: tuple[Tick, ...]
    blocks: tuple[Tick, ...]
    band: str
    median: str
    kinds: tuple[Line, ...]
    columns: tuple[Column, ...]


def layer_chart(of: Grid) -> LayerChart | None:
    """None where no error is known."""
    errors = {b: [e for k in of.kinds if (b, k) in of.cells for e in of.cells[b, k].errors] for b in of.blocks}
    axis = Axis.around((e for found in errors.values() for e in found), log=True)
    if axis is None:
        return None
    names, width = short_names(of.kinds), 100 / len(of.blocks)
    columns, low = [], []
    for i, block in enumerate(of.blocks):
        if not errors[block]:
            continue
        median, worst = statistics.median(errors[block]), max(errors[block])
        cells = [of.cells[block, k] for k in of.kinds if (block, k) in of.cells]
        where = next(names[c.kind] for c in cells if worst in c.errors)
        note = f"Block {block}\nmedian {figures.error(median)}\nworst {figures.error(worst)} ({where})"
        y = [round(100 - axis.at(v), 2) for v in (median, worst, min(errors[block]))]
        columns.append(Column(round(i * width, 3), round(width, 3), round((i + 0.5) * width, 3), y[0], y[1], note))
        low.append((columns[-1].middle, y[2]))
    high = [(c.middle, c.worst_y) for c in columns]
    lines = []
    for k in of.kinds:
        values = [(i, of.cells[b, k].median) for i, b in enumerate(of.blocks) if (b, k) in of.cells]
        points = [((i + 0.5) * width, 100 - axis.at(v)) for i, v in values if v is not None]
        lines.append(Line(names[k], _path(points)))
    ticks = tuple(Tick(round(100 - t.at, 2), t.label) for t in axis.ticks())
    band = _path(high + low[::-1]) + "Z"
    median_path = _path([(c.middle, c.median_y) for c in columns])
    return LayerChart(ticks, block_ticks(of.blocks), band, median_path, tuple(lines), tuple(columns))


def block_ticks(blocks: Sequence[int]) -> tuple[Tick, ...]:
    """At most nine labels, a round number of blocks apart."""
    step = next((s for s in (1, 2, 4, 5, 8, 10, 16, 20, 50) if len(blocks) / s <= _MAX_LABELS), len(blocks))
    return tuple(Tick(round((i + 0.5) * 100 / len(blocks), 2), str(blocks[i])) for i in range(0, len(blocks), step))


@dataclass(frozen=True)
class KindDots:
    """The errors of the only block there is, one row per kind: a curve or a map over blocks would show nothing."""

    rows: tuple[tuple[str, float, str], ...]
    ticks: tuple[Tick, ...]


def kind_dots(of: Grid) -> KindDots | None:
    """None where there are several blocks, or no error is known."""
    cells = [cell for cell in of.cells.values() if cell.median is not None]
    axis = Axis.around((cell.median or 0.0 for cell in cells), log=True)
    if axis is None or len(of.blocks) != 1:
        return None
    names = short_names(of.kinds)
    rows = [(names[c.kind], axis.at(c.median or 0.0), _note(c, names[c.kind])) for c in cells]
    return KindDots(tuple(rows), tuple(axis.ticks()))


@dataclass(frozen=True)
class HeatCell:
    left: float
    width: float
    step: int | None
    note: str


@dataclass(frozen=True)
class HeatMap:
    """Block by kind of linear; ``step`` is one of `HEAT_STEPS` equal steps of the logarithm."""

    rows: tuple[tuple[str, str, tuple[HeatCell, ...]], ...]
    blocks: tuple[Tick, ...]
    edges: tuple[str, str, str]


def heat_map(of: Grid) -> HeatMap | None:
    """None where no error is known."""
    medians = [c.median for c in of.cells.values() if c.median is not None]
    axis = Axis.around(medians, log=True, margin=0.0)
    if axis is None:
        return None
    names, width = short_names(of.kinds), 100 / len(of.blocks)
    rows = []
    for name in of.kinds:
        cells = []
        for i, block in enumerate(of.blocks):
            cell = of.cells.get((block, name))
            if cell is None:
                continue
            step = None if cell.median is None else min(int(axis.at(cell.median) / 100 * HEAT_STEPS), HEAT_STEPS - 1)
            cells.append(HeatCell(round(i * width, 3), round(width, 3), step, _note(cell, names[name])))
        rows.append((name, names[name], tuple(cells)))
    middle = (axis.low + axis.high) / 2
    edges = tuple(figures.error(10.0**e) for e in (axis.low, middle, axis.high))
    return HeatMap(tuple(rows), block_ticks(of.blocks), (edges[0], edges[1], edges[2]))


def _note(cell: Cell, name: str) -> str:
    head = f"Block {cell.block}, {name}"
    if not cell.errors:
        return f"{head}\nnot measured"
    if len(cell.linears) == 1:
        return f"{head}\n{figures.error(cell.median)}"
    spread = f"median {figures.error(cell.median)}\nworst {figures.error(cell.worst)}"
    return f"{head}\n{figures.count(len(cell.linears))} linears\n{spread}"


def _path(points: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:.2f} {y:.2f}" for x, y in points) if points else ""
