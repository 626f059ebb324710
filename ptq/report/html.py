"""report.html: one page that needs no network, with the charts and every number behind them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from calibration.record import LinearRecord, RunRecord
from ptq.report import bars, charts, figures, wording
from ptq.report.page import render_page

_TEMPLATE = "report.html.j2"
MAX_ROWS = 700
"""Above this many linears the table has one row per block and kind: 80 layers of 7 are listed, experts are not."""


@dataclass(frozen=True)
class Figure:
    """A headline number."""

    label: str
    value: str
    unit: str
    detail: str


@dataclass(frozen=True)
class Row:
    """A row of the table of linears; ``*_key`` are what a column is sorted by."""

    prefix: str
    name: str
    n: int
    block: int
    shape: str
    scheme: str
    bits: str
    error: str
    worst: str
    weight_error: str
    notes: str
    weights_key: int
    bits_key: float
    error_key: float
    worst_key: float
    weight_error_key: float


def render(record: RunRecord) -> str:
    """The whole page. The same record gives the same bytes; nothing in it is fetched from anywhere."""
    by = wording.metric(record)
    grid = charts.grid(record.linears, by)
    dots = charts.kind_dots(grid)
    return render_page(
        _TEMPLATE,
        title=f"{record.model.get('name', 'model')}: {wording.method_label(record)}",
        name=str(record.model.get("name", "model")),
        subtitle=_subtitle(record),
        about=_about(record),
        headline=headline(record),
        quality=bars.quality(record),
        sizes=bars.size_bars(record),
        bits=bars.bits_bars(record),
        metric=by,
        block_dots=dots,
        layers=None if dots else charts.layer_chart(grid),
        heat=None if dots else charts.heat_map(grid),
        experts=len(grid.cells) < len(record.linears),
        rows=rows(record, grid),
        grouped=len(record.linears) > MAX_ROWS,
        linears=figures.count(len(record.linears)),
        coverage=wording.coverage(record),
        schemes=[(s, wording.scheme_sentence(s), figures.count(n)) for s, n, _ in wording.schemes(record)],
        left=[(e.get("what", ""), e.get("why", ""), figures.count(e.get("count"))) for e in record.left],
        loads=wording.loads(record),
        format=record.result.get("format"),
        format_reason=record.result.get("format_reason"),
        verified=record.result.get("verified"),
        passes=[(e.get("name", "?"), wording.pass_sentence(e), wording.settings(e)) for e in _passes(record)],
        rules=wording.rules(record),
        forward_passes=record.result.get("forward_passes"),
        calibration=wording.calibration(record),
        versions=sorted(record.versions.items()),
        command=str(record.recipe.get("command") or ""),
        schema_version=record.schema_version,
    )


def _passes(record: RunRecord) -> list[dict[str, object]]:
    return list(record.recipe.get("passes", []))


def _subtitle(record: RunRecord) -> list[str]:
    parts = [wording.method_label(record), wording.scheme_label(record), str(record.result.get("format") or "")]
    return [part for part in parts if part and part != figures.DASH]


def _about(record: RunRecord) -> list[str]:
    model = record.model
    parameters = f"{figures.large_count(model['parameters'])} parameters" if model.get("parameters") else ""
    fingerprint = f"checkpoint {model['fingerprint']}" if model.get("fingerprint") else ""
    return [str(p) for p in (model.get("architecture"), parameters, model.get("dtype"), fingerprint) if p]


def headline(record: RunRecord) -> list[Figure]:
    """Three or four numbers: size, bits, and what it cost in quality."""
    before, after = record.model.get("bytes"), record.result.get("bytes")
    smaller = figures.shrinkage(before, after)
    found = [
        Figure("Size", *_unit(figures.size(after)), f"{smaller} than {figures.size(before)}" if smaller else ""),
        Figure("Bits per weight", figures.bits(record.result.get("bits_per_weight")), "", "in the quantized linears"),
    ]
    measured = [result for result in wording.results(record.evaluations) if result.quantized is not None]
    if not measured:
        return [*found, Figure("Perplexity", figures.DASH, "", "not measured in this run")]
    result, own = measured[0], measured[0].quantized
    assert own is not None
    change = figures.signed(figures.difference(own.perplexity, result.reference))
    against = f"{change} against float, " if change != figures.DASH else ""
    found.append(Figure("Perplexity", figures.perplexity(own.perplexity), "", against + result.protocol.dataset))
    if own.divergence is not None:
        detail = f"same first choice at {figures.percent(own.divergence.top1_agreement)} of tokens"
        found.append(Figure("KL from float", figures.nats(own.divergence.kl_mean), "nats", detail))
    return found


def _unit(text: str) -> tuple[str, str]:
    number, _, unit = text.partition(" ")
    return number, unit


def rows(record: RunRecord, grid: charts.Grid) -> list[Row]:
    """The table of linears, largest error first: one each, or one per cell of the grid where there are too many."""
    if len(record.linears) <= MAX_ROWS:
        groups: Iterable[tuple[LinearRecord, ...]] = ((entry,) for entry in record.linears)
    else:
        groups = (cell.linears for cell in grid.cells.values())
    found = [_row(group, wording.metric(record)) for group in groups]
    return sorted(found, key=lambda row: (-row.worst_key, row.block, row.name))


def _row(group: tuple[LinearRecord, ...], by: wording.Metric) -> Row:
    first = group[0]
    errors, of_weights = [by.of(e) for e in group], [e.weight_error for e in group]
    median, worst = charts.middle(errors), max((e for e in errors if e is not None), default=None)
    shapes, names = {e.shape for e in group}, {e.scheme for e in group}
    bits = sum(e.bits_per_weight for e in group) / len(group)
    prefix, rest = _split(first)
    weight_error = charts.middle(of_weights)
    return Row(
        prefix=prefix,
        name=rest if len(group) == 1 else f"{first.block}.{charts.kind(first)}",
        n=len(group),
        block=first.block,
        shape=f"{first.shape[0]} × {first.shape[1]}" if len(shapes) == 1 else "various",
        scheme=first.scheme if len(names) == 1 else "various",
        bits=figures.bits(bits),
        error=figures.error(median),
        worst=figures.error(worst),
        weight_error=figures.error(weight_error),
        notes=wording.value(first.notes) if first.notes and len(group) == 1 else "",
        weights_key=sum(e.shape[0] * e.shape[1] for e in group),
        bits_key=bits,
        error_key=figures.key(median),
        worst_key=figures.key(worst),
        weight_error_key=figures.key(weight_error),
    )


def _split(entry: LinearRecord) -> tuple[str, str]:
    """``model.layers.`` and ``7.mlp.up_proj``: a phone has no room for what all names share."""
    head, found, _ = entry.name.partition(f".{entry.block}.")
    return (head + ".", entry.name[len(head) + 1 :]) if found else ("", entry.name)
