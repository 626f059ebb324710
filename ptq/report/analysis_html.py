"""report.html of an analysis: maps, histograms and tables on one page that fetches nothing.

What the script draws is aggregated before it is embedded (runs of channels, octaves), so that 80 layers stay well below
a megabyte.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import markupsafe

from ptq.analysis.record import AnalysisRecord, HeadRecord, SiteRecord
from ptq.analysis.sites import ROLES
from ptq.analysis.softmax_record import SoftmaxSweep
from ptq.report import analysis_charts as charts
from ptq.report import figures, softmax_markdown
from ptq.report.analysis_markdown import EPSILON_NOTE, TRIAL_HEADER, trial_cells
from ptq.report.figures import short
from ptq.report.html import Figure
from ptq.report.page import render_page

_TEMPLATE = "analysis.html.j2"
MEASURES = {
    "first_mass": "probability on the first token",
    "delimiter_mass": "probability on delimiters",
    "no_op_score": "no-op score",
    "no_op_share": "queries at which it does nothing",
    "value_ratio": "value norm of the key looked at most",
    "entropy": "entropy",
    "contribution": "contribution to the residual stream",
    "logit_range": "range of logits",
}
CLIPPED = {
    "gamma": "largest -gamma that costs nearly nothing",
    "shut_cost": "relative loss with its output 0",
}
HEADER = (
    "Block",
    "Tensor",
    "Max |x|",
    "Inf norm",
    "Inf norm, later",
    "Kurtosis",
    "Channel disparity",
    "Token disparity",
    "Outlier channels",
    "SQNR token",
    "SQNR tensor",
)


def render(record: AnalysisRecord) -> str:
    """The whole page. The same record gives the same bytes."""
    model, text = record.model, record.calibration
    stored = f"quantized ({model['format']})" if model["format"] else "float"
    return render_page(
        _TEMPLATE,
        title=f"{model['name']}: outliers",
        name=str(model["name"]),
        about=f"{model['architecture']}, {model['blocks']} blocks, {stored}, {model['dtype']}. Text: "
        f"{text.get('dataset', '?')}, {text.get('samples', '?')} × {text.get('seq_len', '?')} tokens.",
        tiles=_tiles(record),
        advice=record.advice,
        alarms=any(a.alarm for a in record.advice),
        verdicts=record.verdicts,
        trial_header=TRIAL_HEADER,
        trials=[trial_cells(t) for t in record.trials],
        bins=max((len(s.profile) for s in record.sites), default=0),
        no_heads=record.no_heads,
        softmax=_softmax(record.softmax),
        sensitivity=charts.sensitivity_bars(record.sensitivity),
        pareto=charts.pareto_chart(record),
        sensitivity_header=charts.SENSITIVITY_HEADER,
        sensitivity_rows=charts.sensitivity_rows(record.sensitivity),
        epsilon_note=EPSILON_NOTE,
        header=HEADER,
        rows=[_row(s) for s in record.sites],
        command=record.command,
        data=_embedded({"roles": _roles(record.sites), "heads": _heads(record)}),
    )


def _softmax(sweep: SoftmaxSweep | None) -> dict[str, Any] | None:
    if sweep is None:
        return None
    return {
        "finding": sweep.finding,
        "heads": softmax_markdown.clipped_heads(sweep),
        "about": softmax_markdown.about(sweep),
        "chart": charts.gamma_chart(sweep),
        "header": softmax_markdown.HEADER,
        "rows": [softmax_markdown.cells(row) for row in sweep.rows],
    }


def _embedded(data: Any) -> markupsafe.Markup:
    """JSON that cannot end the script element that it stands in."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return markupsafe.Markup(text.replace("<", "\\u003c"))


def _tiles(record: AnalysisRecord) -> list[Figure]:
    found = []
    for key, words in (("with_first_token", "all tokens"), ("without_first_token", "first tokens left out")):
        summary = record.summary[key]
        if summary:
            norm, at = short(summary["max_inf_norm"]), summary["max_inf_norm_at"]
            found.append(Figure("Max infinity norm", norm, "", f"{words}; {at}"))
            largest = f"{words}; largest {short(summary['max_kurtosis'])}"
            found.append(Figure("Avg kurtosis", short(summary["avg_kurtosis"]), "", largest))
    return found


def _roles(sites: Sequence[SiteRecord]) -> list[dict[str, Any]]:
    found = []
    for role in ROLES:
        of = [s for s in sites if s.role == role]
        if of:
            found.append(
                {
                    "name": role,
                    "width": of[0].width,
                    "blocks": [s.block for s in of],
                    "profiles": [[float(f"{v:.3g}") for v in s.profile] for s in of],
                    "octaves": [s.octaves for s in of],
                    "six": [s.six_sigma_at for s in of],
                    "largest": [s.max_abs for s in of],
                }
            )
    return found


def _heads(record: AnalysisRecord) -> dict[str, Any] | None:
    if not record.heads:
        return None
    blocks: dict[int, list[HeadRecord]] = {}
    for head in record.heads:
        blocks.setdefault(head.block, []).append(head)
    measures = [
        {"name": name, "values": [[float(f"{getattr(h, field):.3g}") for h in row] for row in blocks.values()]}
        for field, name in MEASURES.items()
    ]
    clipped = {(h.block, h.head): h for h in record.softmax.heads} if record.softmax else {}
    for field, name in CLIPPED.items():
        found = {key: getattr(h, field) for key, h in clipped.items() if getattr(h, field) is not None}
        if found:
            sign = -1 if field == "gamma" else 1
            values = [[sign * found[h.block, h.head] for h in row] for row in blocks.values()]
            measures.append({"name": name, "values": values})
    return {"blocks": list(blocks), "measures": measures}


def _row(s: SiteRecord) -> list[figures.Cell]:
    """Text and sorting key of every cell."""
    numbers = (s.max_abs, s.inf_norm, s.inf_norm_later, s.kurtosis_tensor, s.channel_disparity, s.token_disparity)
    return [
        (str(s.block), s.block),
        (s.role, s.role),
        *((short(v), figures.key(v)) for v in numbers),
        (figures.count(len(s.outlier_channels)), len(s.outlier_channels)),
        *((f"{s.sqnr[key]:.1f}", s.sqnr[key]) for key in ("token-8", "tensor-8")),
    ]
