"""The analysis page in a real browser: quick, silent, no wider than a phone, and its controls do something."""

from __future__ import annotations

import dataclasses

import pytest
from browser import CHROMIUM, DRIVER, browser
from test_analysis_html import full_record, record

from ptq.report import analysis_html

pytestmark = pytest.mark.skipif(
    CHROMIUM is None or DRIVER is None, reason="needs chromium and chromedriver, to look at pages in a real browser"
)


@pytest.fixture(scope="module")
def window(tmp_path_factory):
    with browser(tmp_path_factory.mktemp("profile")) as found:
        yield found


def test_a_large_record_opens_quickly_and_asks_for_nothing(window, tmp_path):
    page = tmp_path / "large.html"
    page.write_text(analysis_html.render(record(32, 4096, 32)), encoding="utf-8")
    window.open(page)
    window.requests(), window.complaints()  # of the page that the browser began with
    assert min(window.open(page) for _ in range(2)) < 2
    assert set(window.requests()) == {page.as_uri()}
    assert window.complaints() == []
    assert window.run("return document.getElementById('map').height") == 32


def test_phone_dark_and_controls(window, tmp_path):
    page = tmp_path / "page.html"
    page.write_text(
        analysis_html.render(dataclasses.replace(full_record(), command="ptq analyze " + "x" * 200)), "utf-8"
    )
    for width in (1280, 390):
        window.size(width, 900)
        window.open(page)
        assert window.run("return document.documentElement.scrollWidth") <= width
    background = "return getComputedStyle(document.body).backgroundColor"
    window.dark(False)
    light = window.run(background)
    window.dark(True)
    assert window.run(background) != light
    first = "return document.querySelector('#tensors tbody td:nth-child(3)').textContent"
    click = "document.querySelectorAll('#tensors th button')[2].click(); "
    largest = float(window.run(click + first))
    assert float(window.run(click + first)) < largest, "a click on a heading sorts, a second one turns the order"
    choose = "const s = document.getElementById('{}'); s.value = {}; s.dispatchEvent(new Event('change')); return {}"
    shown = "document.querySelectorAll('.of-scheme')[1].hidden"
    assert window.run(choose.format("scheme", 1, shown)) is False
    before = window.run("return document.getElementById('heads').toDataURL()")
    assert window.run(choose.format("head-measure", 8, "document.getElementById('heads').toDataURL()")) != before
    bars = "document.querySelectorAll('#hist rect').length"
    assert window.run("return " + bars) > 3 and window.run(choose.format("hist-block", 1, bars)) > 3
