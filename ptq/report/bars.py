"""The bars and dots of the HTML report: sizes, bits and perplexities. Positions are percentages, as in `charts`."""

from __future__ import annotations

import math
from dataclasses import dataclass

from calibration.record import Evaluation, RunRecord
from ptq.report import figures, wording
from ptq.report.axis import LOG_FROM, Axis, Tick

_DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_MAX_SCHEMES = 6


@dataclass(frozen=True)
class Segment:
    width: float
    style: str
    note: str


@dataclass(frozen=True)
class Bar:
    label: str
    segments: tuple[Segment, ...]
    value: str
    detail: str = ""


def size_bars(record: RunRecord) -> tuple[Bar, ...]:
    """Before and after, each split into the linears that were quantized and everything else."""
    before, after = record.model.get("bytes"), record.result.get("bytes")
    if not before or not after:
        return ()
    width = _DTYPE_BYTES.get(str(record.model.get("dtype")).removeprefix("torch."))
    weights = record.result.get("quantized_weights")
    float_linears = width * weights if width and weights else None
    packed = record.result.get("quantized_bytes")
    rows = (("Before", before, float_linears, "before"), ("After", after, packed, "after"))
    return tuple(
        Bar(label, _split(total, part, max(before, after), style), figures.size(total))
        for label, total, part, style in rows
    )


def _split(total: float, linears: float | None, full: float, style: str) -> tuple[Segment, ...]:
    if linears is None or not 0 < linears <= total:  # shared or padded tensors: no honest split
        return (Segment(_share(total, full), style, figures.size(total)),)
    rest = total - linears
    parts = [Segment(_share(linears, full), style, f"Quantized linears\n{figures.size(linears)}")]
    if rest > 0:
        parts.append(Segment(_share(rest, full), "rest", f"Everything else\n{figures.size(rest)}"))
    return tuple(parts)


def bits_bars(record: RunRecord) -> tuple[Bar, ...]:
    """Whole checkpoints as bits per parameter, then each scheme as codes and what belongs to them."""
    parameters, rows = record.model.get("parameters"), []
    for label, owner in (("Float checkpoint", record.model), ("This checkpoint", record.result)):
        n_bytes = owner.get("bytes")
        if parameters and n_bytes:
            whole = (8 * n_bytes / parameters, "before", "all tensors over all parameters")
            rows.append((label, [whole], "all tensors"))
    for scheme, n, weights in wording.schemes(record)[:_MAX_SCHEMES]:
        total = sum(e.bits_per_weight * e.shape[0] * e.shape[1] for e in record.linears if e.scheme == scheme) / weights
        known = wording.read_scheme(scheme)
        codes = min(known.weights.bits, total) if known else total
        parts = [(codes, "after", "codes")]
        if total - codes > 1e-9:
            parts.append((total - codes, "extra", "scales, zero points, indices"))
        rows.append((scheme, parts, f"{figures.count(n)} linears"))
    full = max((sum(p[0] for p in parts) for _, parts, _ in rows), default=1.0)
    return tuple(
        Bar(
            label,
            tuple(Segment(_share(b, full), style, f"{what}\n{figures.bits(b)} bits") for b, style, what in parts),
            figures.bits(sum(part[0] for part in parts)),
            detail,
        )
        for label, parts, detail in rows
    )


@dataclass(frozen=True)
class Dot:
    """One model under one protocol: a dot, where its perplexity is finite, and the numbers."""

    label: str
    style: str
    at: float | None
    perplexity: str
    change: str
    kl_mean: str
    kl_p99: str
    top1: str
    delta_nll: str
    path: str


@dataclass(frozen=True)
class Quality:
    title: str
    sentence: str
    dots: tuple[Dot, ...]
    ticks: tuple[Tick, ...]
    float_at: float | None
    log: bool
    diverged: bool


def quality(record: RunRecord) -> tuple[Quality, ...]:
    return tuple(map(_quality, wording.results(record.evaluations)))


def _quality(result: wording.Results) -> Quality:
    values = [e.perplexity for e in result.evaluations] + ([result.reference] if result.reference is not None else [])
    finite = [v for v in values if math.isfinite(v)]
    log = bool(finite) and min(finite) > 0 and max(finite) / min(finite) > LOG_FROM
    axis = Axis.around(finite, log)
    return Quality(
        title=wording.protocol_title(result.protocol),
        sentence=wording.protocol_sentence(result.protocol),
        dots=tuple(_dot(e, result.reference, axis) for e in result.evaluations),
        ticks=tuple(axis.ticks()) if axis else (),
        float_at=axis.at(result.reference) if axis and result.reference is not None else None,
        log=log,
        diverged=any(e.divergence is not None for e in result.evaluations),
    )


def _dot(e: Evaluation, reference: float | None, axis: Axis | None) -> Dot:
    d = e.divergence
    change = None if e.model == wording.FLOAT else figures.difference(e.perplexity, reference)
    return Dot(
        label=wording.model_label(e.model),
        style={wording.FLOAT: "float", wording.QUANTIZED: "this"}.get(e.model, "base"),
        at=axis.at(e.perplexity) if axis and math.isfinite(e.perplexity) else None,
        perplexity=figures.perplexity(e.perplexity),
        change=figures.signed(change),
        kl_mean=figures.nats(d.kl_mean if d else None),
        kl_p99=figures.nats(d.kl_p99 if d else None),
        top1=figures.percent(d.top1_agreement if d else None),
        delta_nll=f"{figures.signed(d.delta_nll, 4)} ± {d.delta_nll_se:.4f}" if d else figures.DASH,
        path=e.path,
    )


def _share(value: float, full: float) -> float:
    return round(100 * value / full, 3)
