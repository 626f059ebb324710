"""report.html of an analysis: maps, histograms and tables on one page that fetches nothing.

What the script draws is aggregated before it is embedded (runs of channels, octaves), so that 80 layers stay well below
a megabyte.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import jinja2
import markupsafe

from ptq.analysis.record import AnalysisRecord, HeadRecord, SiteRecord
from ptq.analysis.sites import ROLES
from ptq.report import figures
from ptq.report.figures import short

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


@dataclass(frozen=True)
class Tile:
    """A headline number."""

    label: str
    value: str
    detail: str


def render(record: AnalysisRecord) -> str:
    """The whole page. The same record gives the same bytes."""
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    source = resources.files("ptq.report").joinpath(_TEMPLATE).read_text(encoding="utf-8")
    model, text = record.model, record.calibration
    stored = f"quantized ({model['format']})" if model["format"] else "float"
    return environment.from_string(source).render(
        title=f"{model['name']}: outliers",
        name=str(model["name"]),
        about=f"{model['architecture']}, {model['blocks']} blocks, {stored}, {model['dtype']}. Text: "
        f"{text.get('dataset', '?')}, {text.get('samples', '?')} × {text.get('seq_len', '?')} tokens.",
        tiles=_tiles(record),
        advice=record.advice,
        alarms=any(a.alarm for a in record.advice),
        bins=max((len(s.profile) for s in record.sites), default=0),
        no_heads=record.no_heads,
        header=HEADER,
        rows=[_row(s) for s in record.sites],
        command=record.command,
        data=_embedded({"roles": _roles(record.sites), "heads": _heads(record.heads)}),
    )


def _embedded(data: Any) -> markupsafe.Markup:
    """JSON that cannot end the script element that it stands in."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return markupsafe.Markup(text.replace("<", "\\u003c"))


def _tiles(record: AnalysisRecord) -> list[Tile]:
    found = []
    for key, words in (("with_first_token", "all tokens"), ("without_first_token", "first tokens left out")):
        summary = record.summary[key]
        if summary:
            found += [
                Tile("Max infinity norm", short(summary["max_inf_norm"]), f"{words}; {summary['max_inf_norm_at']}"),
                Tile(
                    "Avg kurtosis",
                    short(summary["avg_kurtosis"]),
                    f"{words}; largest {short(summary['max_kurtosis'])}",
                ),
            ]
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


def _heads(heads: Sequence[HeadRecord]) -> dict[str, Any] | None:
    if not heads:
        return None
    blocks: dict[int, list[HeadRecord]] = {}
    for head in heads:
        blocks.setdefault(head.block, []).append(head)
    measures = [
        {"name": name, "values": [[float(f"{getattr(h, field):.3g}") for h in row] for row in blocks.values()]}
        for field, name in MEASURES.items()
    ]
    return {"measures": measures}


def _row(s: SiteRecord) -> list[tuple[str, float | str]]:
    """Text and sorting key of every cell."""
    numbers = (s.max_abs, s.inf_norm, s.inf_norm_later, s.kurtosis_tensor, s.channel_disparity, s.token_disparity)
    return [
        (str(s.block), s.block),
        (s.role, s.role),
        *((short(v), -1.0 if v is None else v) for v in numbers),
        (figures.count(len(s.outlier_channels)), len(s.outlier_channels)),
        *((f"{s.sqnr[key]:.1f}", s.sqnr[key]) for key in ("token-8", "tensor-8")),
    ]
