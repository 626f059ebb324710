"""``ptq predict`` on numbers, runs and tables."""

from __future__ import annotations

import json
import math
import shutil

import pytest
from command import done, refused, text_file, tiny


def table(tmp_path):
    """Two points of a law whose factor and slope are those of nothing in particular."""
    path = tmp_path / "mine.csv"
    path.write_text("params,tokens,bits,delta\n1e8,1e10,3,0.07724\n1e8,1e10,4,0.01421\n")
    return path


def test_without_runs_there_is_no_law():
    message = refused("predict", "--params", "8e9", "--tokens", "15e12", "--bits", "3,8")
    assert "no run tells them" in message and "two or more numbers of bits" in message


def test_far_from_what_the_law_was_tested_on_it_is_said(tmp_path):
    words = ("predict", table(tmp_path), "--bits", "3,8", "--json", tmp_path / "p.json")
    far = done(*words, "--params", "8e9", "--tokens", "15e12")
    assert "| 3 | +0.7 |" in far and "< noise" in far and "Outside the range" in far and "8e+09 parameters" in far
    assert "Outside" not in done(*words, "--params", "1e8", "--tokens", "1e10")
    data = json.loads((tmp_path / "p.json").read_text())
    assert data["predictions"][0]["increase"] == pytest.approx(0.07724, rel=1e-3)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A real run, and copies of it that claim other bits and what a law with a slope of exp(1 / 0.4) makes of them."""
    folder = tmp_path_factory.mktemp("runs")
    model, text = tiny(folder / "model"), text_file(folder / "text.txt")
    words = ("--method", "rtn", "--scheme", "w4a16-g32", "--format", "native", "--seq-len", "48")
    done("quantize", model, *words, "--eval", text, "--out", folder / "w4")
    report = json.loads((folder / "w4" / "report.json").read_text())
    for bits in (2, 3, 4):
        report["result"]["bits_per_weight"] = bits + 0.5
        report["evaluations"][1]["divergence"] |= {"delta_nll": math.exp(-bits / 0.4), "delta_nll_se": 1e-9}
        (folder / f"w{bits}").mkdir(exist_ok=True)
        (folder / f"w{bits}" / "report.json").write_text(json.dumps(report))
    return folder


def test_fit_to_runs(runs, tmp_path):
    """The slope is over the stored bits of the runs, the size that of their linears."""
    paths = [runs / f"w{bits}" for bits in (2, 3, 4)]
    out = done("predict", *paths, "--tokens", "1e6", "--bits", "5.5", "--json", tmp_path / "p.json")
    assert "Fitted to 3 measurements" in out and "are the published ones" in out
    data = json.loads((tmp_path / "p.json").read_text())
    assert data["parameters"] == 2 * (64 * (64 + 32 + 32 + 64) + 3 * 64 * 96)
    assert data["law"]["bits_scale"] == pytest.approx(0.4) and data["fit"]["used"] == ["w2", "w3", "w4"]
    assert data["predictions"][0]["increase"] == pytest.approx(math.exp(-5 / 0.4))


def test_fit_to_a_table(tmp_path):
    out = done("predict", table(tmp_path), "--params", "1e8", "--tokens", "1e10", "--bits", "5")
    assert "| 5 | +0.0026 |" in out and "Fitted to 2 measurements" in out


def test_runs_that_do_not_serve(runs, tmp_path):
    message = refused("predict", runs / "w2", "--tokens", "1e6")
    assert "no slope to fit" in message
    assert "--tokens, e.g. 15e12" in refused("predict", runs / "w2", runs / "w3")
    other = tmp_path / "other"
    shutil.copytree(runs / "w3", other)
    report = json.loads((other / "report.json").read_text())
    (other / "report.json").write_text(json.dumps({**report, "model": {**report["model"], "fingerprint": "f" * 16}}))
    assert "runs of 2 models" in refused("predict", runs / "w2", other, "--tokens", "1e6")
    left = [{"what": "linears of the blocks", "why": "rule", "count": 2}]
    (other / "report.json").write_text(json.dumps({**report, "left": left}))
    assert "2 linears of the blocks stay in float" in refused("predict", other, "--tokens", "1e6")
    (other / "report.json").write_text(json.dumps({**report, "evaluations": []}))
    assert "not evaluated" in refused("predict", other, "--tokens", "1e6")
    scores = tmp_path / "scores.json"
    scores.write_text(json.dumps({"schema_version": 1, "evaluations": report["evaluations"], "tasks": {}}))
    assert "how many bits" in refused("predict", scores, "--tokens", "1e6")
    assert "no such file" in refused("predict", tmp_path / "nothing", "--tokens", "1e6")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("params,bits,delta\n1e8,3,0.1\n", "no column tokens"),
        ("params,tokens,bits,delta\n1e8,1e10,3,x\n", "line 2: could not convert"),
        ("params,tokens,bits,delta\n1e8,1e10,-3,0.1\n", "line 2: params, tokens and bits must be positive"),
        ("params,tokens,bits,delta\n1e8,1e10,3,inf\n", "line 2: delta and noise must be finite"),
        ("params,tokens,bits,delta\n1e8,1e10,3\n", "line 2: could not convert"),
        ("params,tokens,bits,delta\n", "no slope to fit"),
    ],
)
def test_broken_tables(tmp_path, text, message):
    (tmp_path / "t.csv").write_text(text)
    assert message in refused("predict", tmp_path / "t.csv", "--params", "1e8", "--tokens", "1e10")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--params", "1e9"), "--tokens is missing"),
        (("--params", "-1", "--tokens", "1e9"), "--params -1.0: not within"),
        (("--params", "1e9", "--tokens", "nan"), "--tokens nan: not within"),
        (("--params", "1e9", "--tokens", "1e9", "--bits", "0"), "--bits 0: not a positive number"),
        (("--params", "1e9", "--tokens", "1e9", "--bits", "three"), "--bits three: not numbers"),
        (("--params", "1e-300", "--tokens", "1e18", "--bits", "1"), "no finite number"),
        (("--params", "1e9", "--tokens", "1e9", "--json", "no/such/p.json"), "no such folder"),
    ],
)
def test_bad_numbers(words, message, tmp_path):
    assert message in refused("predict", table(tmp_path), *words)
