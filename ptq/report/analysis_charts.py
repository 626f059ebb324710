"""Charts of the analysis page that need no script: perplexity over gamma, bits against divergence, bars per linear.
Positions are percentages, as in `charts`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ptq.analysis.record import AnalysisRecord
from ptq.analysis.softmax_record import SoftmaxSweep
from ptq.report import figures
from ptq.report.axis import LOG_FROM, Axis, Tick
from ptq.report.bars import Bar, Segment
from ptq.study.frontier import together
from ptq.study.sensitivity import LinearSensitivity, SchemeSensitivity

SHOWN_BARS = 24
MAX_ROWS = 700
"""Rows of the table of linears rounded alone; the largest divergences stay."""


@dataclass(frozen=True)
class Mark:
    """A dot with what it says."""

    x: float
    y: float
    note: str


@dataclass(frozen=True)
class Curve:
    """Marks joined by a line, or a line without marks; ``style`` is a class of the styles."""

    name: str
    style: str
    path: str
    dots: tuple[Mark, ...]


@dataclass(frozen=True)
class Chart:
    """Curves over two axes; ``reference`` is a height for a dashed line."""

    curves: tuple[Curve, ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    reference: float | None


@dataclass(frozen=True)
class _Line:
    """A curve in its own units, with a note per point; ``dots`` says whether points are marked."""

    name: str
    style: str
    points: Sequence[tuple[float, float]]
    notes: Sequence[str]
    joined: bool = True


def _chart(lines: Iterable[_Line], log_x: bool, log_y: bool, reference: float | None = None) -> Chart | None:
    """None where there is nothing to show."""
    known = [line for line in lines if line.points]
    x = Axis.around((p[0] for line in known for p in line.points), log_x)
    heights = [p[1] for line in known for p in line.points]
    y = Axis.around([*heights, *([] if reference is None else [reference])], log_y)
    if x is None or y is None:
        return None
    curves = []
    for line in known:
        at = [(x.at(a), round(100 - y.at(b), 2)) for a, b in line.points]
        path = "M" + "L".join(f"{a:.2f} {b:.2f}" for a, b in at) if line.joined else ""
        marks = (Mark(a, b, note) for (a, b), note in zip(at, line.notes, strict=False))
        curves.append(Curve(line.name, line.style, path, tuple(marks)))
    y_ticks = tuple(Tick(round(100 - t.at, 2), t.label) for t in y.ticks())
    return Chart(
        tuple(curves), tuple(x.ticks()), y_ticks, None if reference is None else round(100 - y.at(reference), 2)
    )


def gamma_chart(sweep: SoftmaxSweep | None) -> Chart | None:
    """Perplexity over -gamma, in float and in eight bits; the dashed line is plain softmax."""
    if sweep is None:
        return None
    plain, rows = sweep.rows[0], sorted((r for r in sweep.rows if r.gamma), key=lambda r: -(r.gamma or 0.0))
    values = [r.perplexity for r in rows] + [plain.perplexity]
    lines = [
        _Line(
            "float",
            "this",
            [(-(r.gamma or 0.0), r.perplexity) for r in rows],
            [
                f"{r.softmax}\n{figures.perplexity(r.perplexity)} (plain {figures.perplexity(plain.perplexity)})"
                for r in rows
            ],
        ),
        _Line(
            "8 bits, static ranges",
            "warn",
            [(-(r.gamma or 0.0), r.perplexity_8_bit) for r in rows if r.perplexity_8_bit is not None],
            [f"{r.softmax}, 8 bits\n{figures.perplexity(r.perplexity_8_bit)}" for r in rows],
        ),
    ]
    return _chart(lines, True, max(values) > LOG_FROM * min(values), plain.perplexity)


def pareto_chart(record: AnalysisRecord) -> Chart | None:
    """Bits per weight against divergence: schemes for all linears as measured, the expected edge of mixing them, and
    the recipes that were carried out."""
    if not record.sensitivity:
        return None
    whole = sorted((*together(s), s.scheme) for s in record.sensitivity)
    tried = [
        (t.bits_per_weight, t.divergence, f"{t.method} {t.scheme}")
        for t in record.trials
        if t.bits_per_weight is not None and t.divergence
    ]
    lines = [_Line("expected of mixing them", "edge", record.frontier, [])]
    for name, style, points in (
        ("one scheme for all, measured", "this", whole),
        ("recipes carried out", "warn", tried),
    ):
        notes = [f"{what}\n{figures.bits(bits)} bits\nKL {figures.nats(kl)} nats" for bits, kl, what in points]
        lines.append(_Line(name, style, [(bits, kl) for bits, kl, _ in points], notes, joined=False))
    return _chart(lines, False, True)


def sensitivity_bars(schemes: Sequence[SchemeSensitivity]) -> list[tuple[str, str, tuple[Bar, ...]]]:
    """Of every scheme: its text, how objective and divergence agree, and the linears that cost most."""
    found = []
    for s in schemes:
        largest = sorted(s.linears, key=lambda x: -x.divergence)[:SHOWN_BARS]
        top = max((x.divergence for x in largest), default=0.0) or 1.0
        bars = tuple(_bar(x, top) for x in largest)
        said = (
            ""
            if s.rank_correlation is None
            else f"Rank correlation with the layer objective {s.rank_correlation:.2f}. "
        )
        said += f"All at once: {s.additivity:.2f} times the sum. {len(largest)} of {len(s.linears)} linears."
        found.append((s.scheme, said, bars))
    return found


def _bar(x: LinearSensitivity, top: float) -> Bar:
    value = figures.nats(x.divergence)
    part = Segment(round(100 * x.divergence / top, 2), "after", f"{x.name}\nexpected KL {value} nats")
    return Bar(_tail(x), (part,), value)


def _tail(x: LinearSensitivity) -> str:
    """``7.mlp.up_proj``: without what all names share."""
    return f"{x.block}.{x.name.partition(f'.{x.block}.')[2]}"


SENSITIVITY_HEADER = ("Linear", "Block", "Scheme", "Bits", "Layer objective", "Expected KL, nats")


def sensitivity_rows(schemes: Sequence[SchemeSensitivity]) -> list[list[figures.Cell]]:
    """Text and sorting key of every cell, largest divergence first."""
    found = sorted(((s.scheme, x) for s in schemes for x in s.linears), key=lambda pair: -pair[1].divergence)
    return [
        [
            (x.name, x.name),
            (str(x.block), x.block),
            (scheme, scheme),
            (figures.bits(x.bits_per_weight), x.bits_per_weight),
            (figures.short(x.objective), x.objective),
            (figures.nats(x.divergence), x.divergence),
        ]
        for scheme, x in found[:MAX_ROWS]
    ]
