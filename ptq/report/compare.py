"""Several runs in one table, which only means something under one protocol."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

from calibration.errors import ToolkitError, foreign
from calibration.model.reading import read_json
from calibration.model.typed import built
from calibration.record import Evaluation, Protocol, RunRecord, Timings, read_record, read_timings
from ptq.report import figures, wording
from ptq.report.figures import plain, table

EVALUATIONS_VERSION = 1
_FIX = "measure all of them under one protocol: `ptq eval DIR --protocol NAME --json FILE`, then compare the files"
_NO_FILE = "name a run folder or a file of `ptq eval --json`"

Run = tuple[str, RunRecord, Timings | None]


@dataclass(frozen=True)
class ComparedRun:
    """One row. None is what a run does not know: an evaluation file knows only what was measured."""

    run: str
    model: str | None
    method: str | None
    scheme: str | None
    format: str | None
    bits_per_weight: float | None
    bytes: int | None
    perplexity: float
    float_perplexity: float | None
    kl_mean: float | None
    top1_agreement: float | None
    seconds: float | None
    peak_rss_bytes: int | None

    @property
    def change(self) -> float | None:
        """Perplexity minus that of the float model, measured beside it."""
        return figures.difference(self.perplexity, self.float_perplexity)


@dataclass(frozen=True, repr=False)
class Comparison:
    """Rows under one protocol, the fewest bits first, then the lowest perplexity. ``also`` are further protocols
    that all runs share and that are not shown here."""

    protocol: Protocol
    rows: tuple[ComparedRun, ...]
    also: tuple[Protocol, ...] = ()

    def __str__(self) -> str:
        return self.to_markdown()

    __repr__ = __str__

    def _repr_markdown_(self) -> str:
        return self.to_markdown()

    def to_markdown(self) -> str:
        """A table and the protocol it was measured under."""
        models = {row.model for row in self.rows if row.model}
        header = ["Run", "Method", "Scheme", "Format", "Bits per weight", "Size", "Perplexity", "Δ to float"]
        header += ["KL mean (nats)", "Top-1 agreement", "Seconds", "Peak memory"]
        several = len(models) > 1
        if several:
            header.insert(1, "Model")
        rows = [_cells(row, several) for row in self.rows]
        parts = [table(header, rows, right=range(4 + several, 12 + several))]
        parts.append(plain(wording.protocol_sentence(self.protocol)))
        if several:
            parts.append("The runs are of different models: compare Δ, KL and top-1 rather than perplexities.")
        if self.also:
            others = "; ".join(f"{p.name}, {wording.protocol_title(p)}" for p in self.also)
            parts.append(f"The runs also share: {plain(others)}.")
        return "\n\n".join(parts) + "\n"


def compare(
    runs: Sequence[Run], evaluations: Sequence[tuple[str, Sequence[Evaluation]]] = (), protocol: Protocol | None = None
) -> Comparison:
    """Put runs, and models measured by ``ptq eval --json``, side by side.

    Args:
        runs: (label, record, timings); each gives the row of its quantized model.
        evaluations: (label, evaluations of one file); each evaluation gives a row.
        protocol: the one to show; by default the first that all of them share.

    Raises:
        ToolkitError: nothing to compare, a run that was not evaluated, or no protocol that all of them share; the
            message names the fields that differ.
    """
    sources = {label: _measured(label, record) for label, record, _ in runs}
    for label, found in evaluations:
        sources[label] = list(dict.fromkeys(e.protocol for e in found))
        if not found:
            raise ToolkitError(f"'{label}' holds no evaluation", "write it again with `ptq eval MODEL --json FILE`")
    if len(sources) < len(runs) + len(evaluations):
        raise ToolkitError("two of the runs to compare have the same name", "give each run its own label")
    shared = _shared(sources)
    shown = protocol or shared[0]
    if shown not in shared:
        raise ToolkitError(f"not all runs were measured under protocol '{shown.name}' on {shown.dataset}", _FIX)
    rows = [_run_row(label, record, timings, shown) for label, record, timings in runs]
    rows += [row for label, found in evaluations for row in _evaluation_rows(label, found, shown)]
    order = sorted(rows, key=_order)
    return Comparison(shown, tuple(order), tuple(p for p in shared if p != shown))


def compare_paths(paths: Sequence[Path]) -> Comparison:
    """`compare` for run folders, ``report.json`` files and evaluation files, labelled by their names."""
    runs: list[Run] = []
    evaluations: list[tuple[str, Sequence[Evaluation]]] = []
    for label, path in zip(_labels(paths), paths, strict=True):
        if path.suffix == ".json" and is_evaluations(path):
            evaluations.append((label, read_evaluations(path)))
        else:
            runs.append((label, read_record(path), read_timings(path)))
    return compare(runs, evaluations)


def is_evaluations(path: Path) -> bool:
    """Whether a JSON file holds evaluations alone, as ``ptq eval --json`` writes them, and not a whole run."""
    data = read_json(path, _NO_FILE)
    return "evaluations" in data and "linears" not in data


def read_evaluations(path: Path) -> tuple[Evaluation, ...]:
    """The evaluations of a file written by ``ptq eval --json``.

    Raises:
        ToolkitError: no such file, not such a file, or written by another schema version.
    """
    data, fix = read_json(path, _NO_FILE), "write it again with `ptq eval MODEL --json FILE`"
    if data.get("schema_version") != EVALUATIONS_VERSION:
        version = data.get("schema_version")
        raise ToolkitError(f"{path}: schema version {version}, this version reads {EVALUATIONS_VERSION}", fix)
    with foreign(f"{path}: not a list of evaluations", fix):
        return built(tuple[Evaluation, ...], data["evaluations"])


def _measured(label: str, record: RunRecord) -> list[Protocol]:
    """The protocols under which the quantized model of a run was scored."""
    found = list(dict.fromkeys(e.protocol for e in record.evaluations if e.model == wording.QUANTIZED))
    if not found:
        raise ToolkitError(f"run '{label}' has no evaluation of its quantized model", _FIX)
    return found


def _shared(sources: dict[str, list[Protocol]]) -> list[Protocol]:
    if not sources:
        raise ToolkitError("nothing to compare", "name at least one run folder or file of `ptq eval --json`")
    first = next(iter(sources.values()))
    shared = [p for p in first if all(p in found for found in sources.values())]
    if shared:
        return shared
    apart = [(a, b) for a, b in combinations(sources, 2) if not set(sources[a]) & set(sources[b])]
    if not apart:  # every two share one, but not all the same one
        raise ToolkitError(f"no protocol is shared by all of: {', '.join(sources)}", _FIX)
    a, b = apart[0]
    nearest = min((p.differences(q) for p in sources[a] for q in sources[b]), key=len)
    listed = ", ".join(f"{field} {mine!r} and {theirs!r}" for field, (mine, theirs) in nearest.items())
    raise ToolkitError(f"'{a}' and '{b}' were measured under different protocols: {listed}", _FIX)


def _run_row(label: str, record: RunRecord, timings: Timings | None, protocol: Protocol) -> ComparedRun:
    found = [e for e in record.evaluations if e.protocol == protocol]
    own = next(e for e in found if e.model == wording.QUANTIZED)
    return ComparedRun(
        run=label,
        model=str(record.model.get("name", "")) or None,
        method=wording.method_label(record) or None,
        scheme=wording.scheme_label(record),
        format=record.result.get("format"),
        bits_per_weight=record.result.get("bits_per_weight"),
        bytes=record.result.get("bytes"),
        perplexity=own.perplexity,
        float_perplexity=wording.float_perplexity([own] + [e for e in found if e.model == wording.FLOAT]),
        kl_mean=own.divergence.kl_mean if own.divergence else None,
        top1_agreement=own.divergence.top1_agreement if own.divergence else None,
        seconds=timings.seconds if timings else None,
        peak_rss_bytes=timings.peak_rss_bytes if timings else None,
    )


def _evaluation_rows(label: str, found: Sequence[Evaluation], protocol: Protocol) -> list[ComparedRun]:
    matching = [e for e in found if e.protocol == protocol]
    return [
        ComparedRun(
            run=label if len(matching) == 1 else f"{label}: {e.model}",
            model=None,
            method="none" if e.model == wording.FLOAT else None,
            scheme=None,
            format=None,
            bits_per_weight=None,
            bytes=None,
            perplexity=e.perplexity,
            float_perplexity=None if e.model == wording.FLOAT else wording.float_perplexity([e, *_floats(matching)]),
            kl_mean=e.divergence.kl_mean if e.divergence else None,
            top1_agreement=e.divergence.top1_agreement if e.divergence else None,
            seconds=None,
            peak_rss_bytes=None,
        )
        for e in matching
    ]


def _floats(found: Sequence[Evaluation]) -> list[Evaluation]:
    return [e for e in found if e.model == wording.FLOAT]


def _order(row: ComparedRun) -> tuple[float, float, str]:
    """Unknown bits come last, and a perplexity that is no number after all others."""
    bits = float("inf") if row.bits_per_weight is None else row.bits_per_weight
    return bits, float("inf") if row.perplexity != row.perplexity else row.perplexity, row.run


def _cells(row: ComparedRun, with_model: bool) -> list[str]:
    names = [row.run, row.model, row.method, row.scheme, row.format]
    texts = [plain(name) if name else figures.DASH for name in (names if with_model else [names[0], *names[2:]])]
    texts += [figures.bits(row.bits_per_weight), figures.size(row.bytes), figures.perplexity(row.perplexity)]
    texts += [figures.signed(row.change), figures.nats(row.kl_mean), figures.percent(row.top1_agreement)]
    return [*texts, figures.DASH if row.seconds is None else f"{row.seconds:,.1f}", figures.size(row.peak_rss_bytes)]


def _labels(paths: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell them from each other."""
    parts = [(p.parent if p.name == "report.json" else p).resolve().parts for p in paths]
    for depth in range(1, max(map(len, parts), default=1) + 1):
        labels = ["/".join(part[-depth:]) for part in parts]
        if len(set(labels)) == len(labels):
            break
    return labels if parts else []
