"""report.md of an analysis: the numbers that decide, and where they are."""

from __future__ import annotations

from collections.abc import Sequence

from ptq.analysis.moments import PAPER_EPSILON
from ptq.analysis.record import AnalysisRecord, SiteRecord, Trial
from ptq.analysis.sites import ROLES
from ptq.report import figures, sensitivity_markdown, softmax_markdown
from ptq.report.figures import Cell, code, plain, short, table

_SHOWN = 12


def render(record: AnalysisRecord) -> str:
    """GitHub-flavoured Markdown. The same record gives the same bytes."""
    sections = [
        _title(record),
        _headline(record),
        _advice(record),
        _trials(record),
        _roles(record),
        _channels(record),
        _massive(record),
        _six(record),
        _heads(record),
        softmax_markdown.render(record.softmax) if record.softmax else "",
        sensitivity_markdown.sections(record.sensitivity),
        _weights(record),
        _reproduce(record),
    ]
    return "\n\n".join(filter(None, sections)) + "\n"


def _title(record: AnalysisRecord) -> str:
    model, text = record.model, record.calibration
    stored = (
        f"quantized ({model['format']}), looked at as the float weights it stands for" if model["format"] else "float"
    )
    return (
        f"# {plain(model['name'])}: outliers\n\n{plain(model['architecture'])}, {model['blocks']} blocks, {stored}, "
        f"forward passes in {model['dtype']}. Text: {plain(text.get('dataset', '?'))}, {text.get('samples', '?')} × "
        f"{text.get('seq_len', '?')} tokens, seed {text.get('seed', '?')}."
    )


EPSILON_NOTE = (
    f"As published, kurtosis per text has {PAPER_EPSILON:g} added to s⁴, which lowers it where values are below 0.1; "
    "kurtosis of all values and of weights has nothing added."
)


def _headline(record: AnalysisRecord) -> str:
    rows = []
    for key, words in (
        ("with_first_token", "all tokens"),
        ("without_first_token", "first tokens left out"),
    ):
        found = record.summary[key]
        if found:
            rows.append(
                (
                    words,
                    short(found["max_inf_norm"]),
                    found["max_inf_norm_at"],
                    short(found["avg_kurtosis"]),
                    short(found["max_kurtosis"]),
                )
            )
    header = ["", "Max infinity norm", "at", "Avg kurtosis", "Max kurtosis"]
    note = (
        "Infinity norm: largest |x| of a text, averaged over texts, largest over tensors. Kurtosis per text (a "
        f"Gaussian has 3), averaged and largest over tensors (Bondarenko et al. 2023). {EPSILON_NOTE}"
    )
    return f"## In short\n\n{table(header, rows, right=(1, 3, 4))}\n\n{note}"


def _advice(record: AnalysisRecord) -> str:
    lines = ["## What to do"]
    if not any(a.alarm for a in record.advice):
        lines.append("Nothing stands out.")
    for a in record.advice:
        channels = f" Channels {', '.join(map(str, a.channels[:_SHOWN]))}{' ...' if len(a.channels) > _SHOWN else ''}."
        items = [f"- {'helps' if a.alarm else 'try'}: {plain(h)}" for h in a.helps]
        items += [f"- cannot help: {plain(c)}" for c in a.cannot]
        said = f"**{plain(a.rule)}**: {plain(a.finding)}.{channels if a.channels else ''}"
        lines.append(said + "\n\n" + "\n".join(items))
    return "\n\n".join(lines)


TRIAL_HEADER = ("Method", "Scheme", "Why", "Bits per weight", "Perplexity", "KL, nats")


def trial_cells(t: Trial) -> list[Cell]:
    """One row under `TRIAL_HEADER`."""
    said = "cannot be done: " + t.refused if t.refused else "advised" if t.advised else "to compare"
    return [
        (t.method, t.method),
        (t.scheme, t.scheme),
        (said, said),
        (figures.bits(t.bits_per_weight), figures.key(t.bits_per_weight)),
        (figures.perplexity(t.perplexity), figures.key(t.perplexity)),
        (figures.nats(t.divergence), figures.key(t.divergence)),
    ]


def _trials(record: AnalysisRecord) -> str:
    if not record.trials:
        return ""
    rows = [[plain(text) for text, _ in trial_cells(t)] for t in record.trials]
    said = plain(". ".join(record.verdicts))
    return f"## Whether the advice helped\n\n{said}.\n\n{table(TRIAL_HEADER, rows, right=(3, 4, 5))}"


def _heads(record: AnalysisRecord) -> str:
    if record.no_heads is not None:
        return f"## Attention\n\nNot looked at. {plain(record.no_heads)}."
    busiest = sorted(record.heads, key=lambda h: (-h.no_op_score, -h.no_op_share))[:_SHOWN]
    rows = [
        (
            str(h.block),
            str(h.head),
            figures.percent(h.first_mass),
            figures.percent(h.delimiter_mass),
            f"{h.value_ratio:.2f}",
            f"{h.entropy:.2f}",
            short(h.logit_range),
            short(h.contribution),
            f"{h.no_op_score:.2f}",
            figures.percent(h.no_op_share),
        )
        for h in busiest
    ]
    header = ["Block", "Head", "On first token", "On delimiters", "Value norm", "Entropy", "Logit range"]
    header += ["Contribution", "No-op score", "No-op queries"]
    note = (
        "Value norm: of the key looked at most, over the median key's. Entropy 1 is uniform. Contribution: output of "
        "the head over the residual stream. A head does nothing where its mass is on keys without a value."
    )
    body = table(header, rows, right=range(10)) + _more(len(record.heads))
    return f"## Attention heads that do least\n\n{body}\n\n{note}"


def _roles(record: AnalysisRecord) -> str:
    rows = []
    for role in ROLES:
        sites = [s for s in record.sites if s.role == role]
        if sites:
            worst = max(sites, key=lambda s: s.max_abs)
            rows.append(
                (
                    role,
                    short(worst.max_abs),
                    str(worst.block),
                    short(max(s.channel_disparity for s in sites)),
                    short(max(s.token_disparity for s in sites)),
                    short(max(s.kurtosis_tensor for s in sites)),
                    str(sum(len(s.outlier_channels) for s in sites)),
                    _least(sites, "token-8"),
                    _least(sites, "tensor-8"),
                )
            )
    header = ["Tensor", "Max abs", "in block", "Channel disparity", "Token disparity", "Kurtosis", "Outlier channels"]
    header += ["SQNR 8 bits per token", "per tensor"]
    note = (
        "Worst block of each column. Disparity: largest over median of the channels' (tokens') max |x|. An outlier "
        "channel has a mean |x| above 6 times that of all channels. SQNR in dB; per tensor the range covers all text."
    )
    return f"## By tensor\n\n{table(header, rows, right=range(1, 9))}\n\n{note}"


def _least(sites: Sequence[SiteRecord], key: str) -> str:
    return f"{min(s.sqnr[key] for s in sites):.1f}"


def _channels(record: AnalysisRecord) -> str:
    found = [(s, c) for s in record.sites for c in s.outlier_channels]
    if not found:
        return "## Outlier channels\n\nNone."
    found.sort(key=lambda pair: -pair[1].ratio)
    rows = [
        (str(s.block), s.role, str(c.channel), f"{c.ratio:.1f}", short(c.max_abs), figures.percent(c.persistence))
        for s, c in found[:_SHOWN]
    ]
    header = ["Block", "Tensor", "Channel", "Ratio of means", "Max abs", "Texts in which it is one"]
    return f"## Outlier channels\n\n{table(header, rows, right=(0, 2, 3, 4, 5))}{_more(len(found))}"


def _massive(record: AnalysisRecord) -> str:
    found = [(s, p) for s in record.sites if s.massive for p in s.massive.largest]
    if not found:
        return "## Massive activations\n\nNone: no |x| above 100 and 1000 times the median of the residual stream."
    found.sort(key=lambda pair: -abs(pair[1].value))
    rows = [
        (str(s.block), str(p.channel), short(p.value), str(p.position), code(repr(p.token))) for s, p in found[:_SHOWN]
    ]
    header = ["After block", "Channel", "Largest", "Position", "Token"]
    return f"## Massive activations\n\n{table(header, rows, right=(0, 1, 2, 3))}{_more(len(found))}"


def _six(record: AnalysisRecord) -> str:
    rows = []
    for s in record.sites:
        if s.role == "block output" and s.six_sigma is not None and s.six_sigma.count:
            six = s.six_sigma
            rows.append(
                (
                    str(s.block),
                    figures.count(six.count),
                    str(six.channels_hit),
                    ", ".join(f"{c} ({n})" for c, n in six.channels[:4]),
                    ", ".join(f"{p} ({n})" for p, n in six.positions[:4]),
                    ", ".join(f"{code(repr(t))} ({n})" for t, n in six.tokens[:4]),
                )
            )
    if not rows:
        return ""
    header = ["After block", "Values", "Channels hit", "Channels", "Positions", "Tokens"]
    return f"## Values beyond six deviations in the residual stream\n\n{table(header, rows, right=(0, 1, 2))}"


def _weights(record: AnalysisRecord) -> str:
    worst = sorted(record.weights, key=lambda w: -w.kurtosis)[:_SHOWN]
    rows = [
        (
            code(w.name),
            short(w.max_abs),
            short(w.kurtosis),
            figures.count(w.six_sigma),
            short(w.row_disparity),
            short(w.column_disparity),
            ", ".join(str(c.channel) for c in w.columns[:4]),
        )
        for w in worst
    ]
    header = ["Weight", "Max abs", "Kurtosis", "Beyond 6σ", "Row disparity", "Column disparity", "Outlier columns"]
    return f"## Weights of largest kurtosis\n\n{table(header, rows, right=range(1, 6))}{_more(len(record.weights))}"


def _more(n: int) -> str:
    return f"\n\n{n - _SHOWN} more in report.json." if n > _SHOWN else ""


def _reproduce(record: AnalysisRecord) -> str:
    return f"## Reproduce\n\n{figures.block(record.command)}" if record.command else ""
