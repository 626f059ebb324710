"""Reports: the numbers of a record appear, nothing is fetched, nothing is injected, the same record gives the same
bytes."""

from __future__ import annotations

import math
import re
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest
from report_records import HOSTILE, RECORDS, linears, record

from calibration.record import read_record
from ptq.report import axis, charts, figures, html, markdown, wording
from ptq.report.card import model_card


class Page(HTMLParser):
    """Tags, attributes and text of a page; fails on tags that are not closed in order."""

    VOID = ("meta", "link", "input", "br", "img")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.mark.parametrize("name", RECORDS)
def test_page_is_well_formed_and_fetches_nothing(name: str) -> None:
    text = html.render(RECORDS[name])
    page = Page(text)
    assert "http://" not in text and "https://" not in text
    assert [tag for tag, _ in page.tags].count("script") == 1  # ours
    for tag, attributes in page.tags:
        assert tag not in ("img", "iframe", "object", "embed", "base", "audio", "video", "a")
        assert not {"src", "srcset", "action", "xlink:href"} & set(attributes)
        assert not [key for key in attributes if key.startswith("on") or key == "formaction"]
        assert attributes.get("href", "data:,") == "data:,"
    assert "url(" not in text and "@import" not in text
    assert "default-src 'none'" in text
    assert not re.search(r"\b(None|nan|inf)\b", page.text.split('"use strict"')[0].split("</style>")[-1].split("}")[-1])


@pytest.mark.parametrize("name", [name for name in RECORDS if name != "empty"])  # that one cannot be read back
def test_same_record_same_bytes(name: str, tmp_path: Path) -> None:
    first = RECORDS[name]
    (tmp_path / "report.json").write_text(first.to_json(), encoding="utf-8")
    again = read_record(tmp_path)  # in another key order than the run had
    for view in (html.render, markdown.render, lambda r: model_card(r, "org/tiny", {"b": 2, "a": 1})):
        assert view(first) == view(again)
        assert view(first).endswith("\n")


def test_numbers_appear_in_every_view() -> None:
    run = RECORDS["small"]
    for text in (html.render(run), markdown.render(run), model_card(run, "org/tiny")):
        for number in (
            "16.06 GB",
            "4.500",
            "6.138",
            "6.736",
            "6.412",
            "+0.273",
            "91.27 %",
            "0.0402",
            "288,627",
            "31337",
        ):
            assert number in text, number
        assert "5.70 GB" in text or "5.70</" in text
        assert "2.82× smaller" in text and "77ab01fe" in text
        assert "ptq quantize org/tiny --method awq+gptq" in (Page(text).text if text.startswith("<!") else text)
        assert "lm_head" in text and "it costs too much quality" in text and "reads GGUF only" in text
        assert "2.8.0" in text and "damping = 0.01" in text


def test_worst_ten_linears_are_listed_by_error() -> None:
    text = markdown.render(RECORDS["80 layers"]).split("largest output error")[1].split("\n## ")[0]
    names = re.findall(r"`(model\.layers\.\S+)`", text)
    expected = sorted(RECORDS["80 layers"].linears, key=lambda e: (-(e.relative_error or 0), e.name))[:10]
    assert names == [e.name for e in expected] and len(names) == 10


def test_without_data_the_weight_error_takes_its_place() -> None:
    text, page = markdown.render(RECORDS["no data"]), html.render(RECORDS["no data"])
    assert "largest weight error" in text and "Weight error by layer" in page and "Output error" not in page
    assert "This recipe needs no data." in text and "This recipe needs no data." in page


def test_without_evaluations_the_reports_say_so() -> None:
    run = RECORDS["no evaluations"]
    assert "Not measured in this run" in html.render(run) and "Not measured in this run" in markdown.render(run)
    assert "model-index" not in model_card(run, "org/tiny")


def test_every_linear_has_a_row_and_a_cell() -> None:
    page = Page(html.render(RECORDS["80 layers"]))
    cells = [a for tag, a in page.tags if tag == "rect" and re.fullmatch(r"s[0-8n]", a.get("class") or "")]
    assert len(cells) == 560
    assert all(e.name.removeprefix("model.layers.") in page.text for e in RECORDS["80 layers"].linears)


def test_experts_are_aggregated() -> None:
    page = Page(html.render(RECORDS["experts"]))
    assert sum(tag == "tr" for tag, _ in page.tags) < 80
    assert "1,228 quantized linears in 32 groups" in page.text and "mlp.experts.*.up_proj" in page.text


def test_a_large_record_renders_fast_and_small() -> None:
    run = record(linears(60, experts=256))
    start = time.process_time()
    text = html.render(run)
    assert time.process_time() - start < 10  # a second or so; loose, because machines differ
    assert len(text) < 500_000 and len(html.render(RECORDS["80 layers"])) < 500_000


def test_hostile_names_stay_text() -> None:
    page = Page(html.render(RECORDS["hostile"]))
    assert HOSTILE in page.text
    text = markdown.render(RECORDS["hostile"])
    outside = re.sub(r"^(`{3,}).*?^\1$", "", text, flags=re.S | re.M)
    outside = re.sub(r"(?<!`)(`+)(?!`).*?(?<!`)\1(?!`)", "", outside)
    assert "<script" not in outside and "<img" not in outside
    for line in outside.splitlines():  # a pipe in a name must not make a column
        assert not line.startswith("|") or line.count("|") - line.count("\\|") <= 8
    assert "\n# not a heading" not in outside


def test_one_block_shows_its_linears_not_a_curve() -> None:
    text = html.render(RECORDS["one block"])
    assert "Output error by linear" in text and "by layer" not in text


@pytest.mark.parametrize(
    ("value", "text"),
    [(16_060_522_496, "16.06 GB"), (100_000_000, "0.10 GB"), (99_000_000, "99.00 MB"), (123_456, "0.12 MB"),
     (1_800, "1.80 kB"), (12, "12 bytes"), (405e9, "405.0 GB"), (None, "–")],
)  # fmt: skip
def test_sizes(value: float | None, text: str) -> None:
    assert figures.size(value) == text


def test_numbers_as_text() -> None:
    assert figures.error(0.001234) == "1.23e-3" and figures.error(0.0) == "0" and figures.error(None) == "–"
    assert figures.perplexity(6.13824) == "6.138" and figures.perplexity(123456.7) == "123,457"
    assert figures.perplexity(math.inf) == "∞" and figures.perplexity(math.nan) == "not a number"
    assert figures.signed(-0.25) == "−0.250" and figures.signed(None) == "–"
    assert figures.shrinkage(10, 20) == "2.00× larger"
    assert figures.code("a`b") == "``a`b``" and figures.code("a|b") == "`a\\|b`"
    assert figures.block("```").startswith("````")


@pytest.mark.parametrize(
    "values", [[6.1, 6.4, 6.7], [5.0], [0.1, 1e5], [1e-7, 3e-2], [0.0, 0.002, 0.003], [9.0e-3, 9.1e-3]]
)
@pytest.mark.parametrize("log", [False, True])
def test_axis_holds_its_values_and_has_ticks(values: list[float], log: bool) -> None:
    scale = axis.Axis.around(values, log)
    assert scale is not None
    assert all(0 <= scale.at(v) <= 100 for v in values) and sorted(values) == sorted(values, key=scale.at)
    ticks = scale.ticks()
    assert 1 <= len(ticks) <= 9 and all(abs(scale.at(float(t.label)) - t.at) < 0.02 for t in ticks)


def test_grid_groups_experts_and_keeps_names_apart() -> None:
    grid = charts.grid(linears(2, experts=3), wording.OUTPUT_ERROR)
    assert grid.kinds[-1] == "mlp.experts.*.up_proj" and len(grid.cells[1, "mlp.experts.*.up_proj"].linears) == 3
    names = charts.short_names(grid.kinds)
    assert names["mlp.down_proj"] == "down_proj" and len(set(names.values())) == len(names)
