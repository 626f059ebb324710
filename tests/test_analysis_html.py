"""report.html of an analysis: self-contained, safe, small and quick for deep models."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
import time

import pytest
import torch

from ptq.analysis.activations import SiteStatistics
from ptq.analysis.record import Advice, AnalysisRecord, HeadRecord, Trial
from ptq.analysis.sites import ROLES, Site, site_record
from ptq.analysis.softmax_record import HeadClipping, SoftmaxRow, SoftmaxSweep
from ptq.analysis.summary import summarize
from ptq.analysis.trial import recipes_to_try, verdicts
from ptq.report import analysis_html, analysis_markdown
from ptq.study.frontier import frontier, together
from ptq.study.sensitivity import LinearSensitivity, SchemeSensitivity


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


def full_record() -> AnalysisRecord:
    """Everything that is made on request as well: softmaxes, linears alone, recipes carried out."""
    made = record(2, 64, 4)
    sites = tuple(dataclasses.replace(s, max_abs=s.max_abs + i) for i, s in enumerate(made.sites))
    norms = {"max_inf_norm": 5.0, "avg_kurtosis": 3.0, "max_kurtosis": 9.0}
    rows = tuple(
        SoftmaxRow("plain" if not g else f"gamma={g:g}", g, 6 - 100 * g, -g, 0.1, 0.9, 0.0, norms, norms, 7 - 100 * g)
        for g in (0.0, -1e-4, -1e-3, -1e-2)
    )
    heads = tuple(HeadClipping(b, h, -1e-3 * h, 1e-4, 0.01 * h) for b in range(2) for h in range(4))
    sweep = SoftmaxSweep(40, 4, 4, 2, "w8a8", 1e-3, rows, heads, "Outliers stay.")
    schemes = tuple(
        SchemeSensitivity(
            f"w{bits}a16",
            tuple(
                LinearSensitivity(f"m.layers.{b}.{n}", b, (8, 8), bits, 2.0**-bits, 2.0**-bits * (b + 1))
                for b in range(2)
                for n in ("q", "up")
            ),
            0.5,
            1.1,
        )
        for bits in (2, 3)
    )
    trials = (
        Trial("rtn", "w8a8", False, 8.1, 9.0, 0.2, None),
        Trial("smoothquant+gptq", "w8a8", True, 8.1, 6.1, 0.01, None),
        Trial("rotate+gptq", "w4a8", True, None, None, None, "not for this family"),
    )
    return dataclasses.replace(
        made,
        sites=sites,
        softmax=sweep,
        sensitivity=schemes,
        frontier=frontier(schemes),
        trials=trials,
        verdicts=tuple(verdicts(trials)),
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
    started = time.process_time()
    page = analysis_html.render(made)
    assert time.process_time() - started < 10
    assert len(page) < 2_000_000
    assert len(analysis_markdown.render(made)) < 100_000


def test_a_family_without_heads_says_so():
    made = dataclasses.replace(record(1, 16, 1), heads=(), no_heads="Falcon: its attention is its own")
    page = analysis_html.render(made)
    assert "Not looked at. Falcon" in page and embedded(page)["heads"] is None
    assert "Not looked at. Falcon" in analysis_markdown.render(made)


def test_what_was_asked_for_is_on_the_page_and_in_the_markdown():
    made = full_record()
    page, text = analysis_html.render(made), analysis_markdown.render(made)
    for words in ("Outliers stay", "smoothquant+gptq helped", "0.0100", "cannot be done: not for this family"):
        assert words in page and words in text, words
    measures = {m["name"]: m["values"] for m in embedded(page)["heads"]["measures"]}
    assert measures["largest -gamma that costs nearly nothing"] == [[0, 0.001, 0.002, 0.003]] * 2
    assert measures["relative loss with its output 0"][1] == [0, 0.01, 0.02, 0.03]
    assert "gamma=-0.01" in page and "expected of mixing them" in page and page.count('class="of-scheme"') == 2
    assert page.count("<circle") == 2 * 3 + 2 + 2  # gammas in float and 8 bits, schemes, recipes
    plain = analysis_html.render(record(2, 64, 4))
    assert "Other softmaxes" not in plain and "Which linears suffer" not in plain and "Whether it helped" not in plain
    assert analysis_markdown.render(made).count("## Massive activations") == 1


def test_the_frontier_is_the_cheapest_mix():
    """Two linears and two schemes: every mix by hand; the edge holds those that no other is below."""
    schemes = full_record().sensitivity
    points = frontier(schemes)
    assert points[0] == pytest.approx(together(schemes[0])) and points[-1] == pytest.approx(together(schemes[1]))
    mixes = []
    for choice in itertools.product(range(2), repeat=4):
        picked = [schemes[c].linears[i] for i, c in enumerate(choice)]
        mixes.append((sum(x.bits_per_weight for x in picked) / 4, 1.1 * sum(x.divergence for x in picked)))
    for bits, kl in points:
        assert kl == pytest.approx(min(loss for b, loss in mixes if b <= bits + 1e-9))


def test_recipes_are_tried_beside_plain_rounding():
    advice = Advice("recipe", False, "", (), (), (), (("smoothquant+gptq", "w8a8"), ("rotate+gptq", "w4a8")))
    assert recipes_to_try([advice]) == [
        ("rtn", "w8a8", False),
        ("smoothquant+gptq", "w8a8", True),
        ("rtn", "w4a8", False),
        ("rotate+gptq", "w4a8", True),
    ]
    easy = dataclasses.replace(advice, recipes=(("rtn", "w8a8"), ("awq", "w4a16-g128")))
    assert recipes_to_try([easy])[0] == ("rtn", "w8a8", True) and len(recipes_to_try([easy])) == 3
    trials = [Trial("rtn", "w", False, 8, 1, 0.1, None), Trial("a", "w", True, 8, 1, 0.11, None)]
    assert "did harm" in verdicts(trials)[0]
    same = [trials[0], dataclasses.replace(trials[1], divergence=0.102)]
    assert "made no difference" in verdicts(same)[0]
