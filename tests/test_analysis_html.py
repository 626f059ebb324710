"""report.html of an analysis: self-contained, safe, small and quick for deep models."""

from __future__ import annotations

import dataclasses
import json
import re
import time

import torch

from ptq.analysis.activations import SiteStatistics
from ptq.analysis.record import Advice, AnalysisRecord, HeadRecord
from ptq.analysis.sites import ROLES, Site, site_record
from ptq.analysis.summary import summarize
from ptq.report import analysis_html, analysis_markdown


def record(blocks: int, width: int, heads: int, name: str = "model") -> AnalysisRecord:
    s = SiteStatistics(width, 1, True, False, torch.device("cpu"))
    x = torch.randn(1, 40, width, generator=torch.Generator().manual_seed(0))
    x[0, :, 3] *= 50
    s.update(x, torch.arange(40), torch.arange(40)[None])
    one = site_record(0, Site(ROLES[0], ("",), (), True, "norm"), s, None, lambda token: f"</script>{token}")
    sites = tuple(dataclasses.replace(one, block=b, role=role) for b in range(blocks) for role in ROLES)
    all_heads = tuple(
        HeadRecord(b, h, 0.5, 0.1, 0.2, 0.3, 9.0, 0.01, 0.6, 0.2) for b in range(blocks) for h in range(heads)
    )
    return AnalysisRecord(
        model={
            "name": name,
            "architecture": "llama",
            "dtype": "float32",
            "fingerprint": "f",
            "blocks": blocks,
            "format": None,
        },
        calibration={"dataset": "text", "samples": 1, "seq_len": 40, "seed": 0},
        summary=summarize(sites, blocks),
        sites=sites,
        weights=(),
        heads=all_heads,
        no_heads=None,
        advice=(Advice("channels", True, "3 is large", (3,), ("smoothquant",), ("atoken",)),),
        command="ptq analyze model --out DIR",
        versions={},
    )


def embedded(page: str) -> dict:
    found = re.search(r'<script id="data" type="application/json">(.*?)</script>', page, re.S)
    assert found is not None
    return json.loads(found.group(1))


def test_the_page_holds_the_numbers_of_the_record():
    made = record(3, 64, 4)
    page = analysis_html.render(made)
    data = embedded(page)
    assert [role["name"] for role in data["roles"]] == list(ROLES)
    role = data["roles"][0]
    assert role["blocks"] == [0, 1, 2] and len(role["profiles"][0]) == 64 and role["width"] == 64
    assert max(range(64), key=role["profiles"][1].__getitem__) == 3
    assert sum(n for _, n in role["octaves"][0]) == 39 * 64
    assert data["heads"]["measures"][0]["values"] == [[0.5] * 4] * 3
    assert "smoothquant" in page and "Cannot help: atoken" in page and page.count("<tr>") == 1 + len(made.sites)
    assert analysis_html.render(made) == page


def test_nothing_is_fetched_and_names_cannot_break_out():
    page = analysis_html.render(record(2, 32, 2, name='<img src=x onerror="alert(1)">'))
    assert "<img" not in page and page.count("</script>") == 2
    assert not re.search(r"""(src|href)=["'](?!data:)""", page) and "http" not in page.replace("http-equiv", "")
    assert "default-src 'none'" in page and "@import" not in page and "url(" not in page


def test_eighty_layers_are_small_and_quick():
    made = record(80, 4096, 64)
    started = time.perf_counter()
    page = analysis_html.render(made)
    assert time.perf_counter() - started < 10
    assert len(page) < 2_000_000
    assert len(analysis_markdown.render(made)) < 100_000


def test_a_family_without_heads_says_so():
    made = dataclasses.replace(record(1, 16, 1), heads=(), no_heads="Falcon: its attention is its own")
    page = analysis_html.render(made)
    assert "Not looked at. Falcon" in page and embedded(page)["heads"] is None
    assert "Not looked at. Falcon" in analysis_markdown.render(made)
