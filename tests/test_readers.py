"""What plans quote of readers.json."""

from collections.abc import Iterator
from typing import Any

import pytest
from command import done

from ptq.formats import readers
from ptq.formats.registry import FORMATS
from ptq.linears import ModelLayout, PlannedLinear
from ptq.scheme import parse_scheme

RUN = {"reader": "R", "format": "gptq", "left": "", "answer": "run", "difference": 0.001, "moved": 0.2}
RUNS = [
    {**RUN, "scheme": "w4a16-g128-sym"},
    {**RUN, "scheme": "w8a16-g64-sym", "difference": 0.5},
    {**RUN, "scheme": "w3a16-g128-sym", "answer": "refused", "why": "ValueError: no such width"},
    {**RUN, "scheme": "w2a16-g128-sym", "answer": "no kernel", "why": "AttributeError: x"},
    {**RUN, "scheme": "w4a16-g128-sym", "left": "*.o_proj", "answer": "wrong", "difference": 2.0},
]


@pytest.fixture
def document(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    known = {"R": {"version": "1.2", "date": "2026-11-29", "machine": "CPU with AVX2"}}
    monkeypatch.setattr(readers, "seen", lambda: {"readers": known, "runs": RUNS})
    yield


def layout(*schemes: str | None) -> ModelLayout:
    linears = [
        PlannedLinear(f"model.layers.0.l{i}", 0, (128, 128), None if text is None else parse_scheme(text))
        for i, text in enumerate(schemes)
    ]
    return ModelLayout({}, tuple(linears), (), "model.layers", False, "bfloat16")


def quote(*schemes: str | None) -> str | None:
    return readers.quote("R", "gptq", layout(*schemes))


def test_quotes_what_was_run(document: None) -> None:
    where = "R 1.2 on a CPU with AVX2, 2026-11-29"
    assert quote("w4a16-g128") == f"yes (run in {where}: 0.001 nats per token from ours, quantization moves 0.2)"
    assert str(quote("w4a16-g64")).startswith(f"yes (run in {where}, as w4a16-g128-sym: ")
    assert "0.5 nats" in str(quote("w4a16-g128", "w8a16-g64"))  # the worst of its schemes
    assert str(quote("w3a16-g128")) == f"no: refused by {where}: no such width"
    assert str(quote("w2a16-g128")).startswith(f"not known: no kernel in {where}")
    assert str(quote("w4a16-g128", None)).startswith(f"no: read wrongly (by {where}, with *.o_proj in float: 2 nats")
    assert quote("w5a16-g128") is None and quote("w4a16-g128", "w5a16-g128") is None
    assert quote("w4a16-gchannel") is None  # no group, which is not a group of another size
    assert readers.quote("R", "awq", layout("w4a16-g128")) is None


def test_the_file_has_a_difference_for_every_yes() -> None:
    document: dict[str, Any] = readers.seen()
    assert set(document["readers"]) == {"transformers", "vLLM", "GPTQModel", "llama.cpp"}
    assert all(entry["version"] and entry["date"] for entry in document["readers"].values())
    for run in document["runs"]:
        assert run["reader"] in document["readers"] and run["format"] in {*FORMATS, "float"}
        assert run["answer"] in ("run", "wrong", "refused", "no kernel")
        assert ("difference" in run) == (run["answer"] in ("run", "wrong")) and ("why" in run) != ("difference" in run)


def test_plans_quote_it() -> None:
    answers = FORMATS["awq"].loads_in(layout("w4a16-g128-asym", None))
    assert answers["GPTQModel"].startswith("yes (run in GPTQModel 7.7.0")
    assert "run in llama.cpp" in FORMATS["gguf"].loads_in(layout("q4_k"))["llama.cpp"]


@pytest.mark.parametrize(
    ("reader", "format", "scheme"),
    [
        ("vLLM", "compressed-tensors", "w8a8-asym"),
        ("GPTQModel", "gptq", "w4a16-g128"),
        ("GPTQModel", "awq", "w4a16-g64-asym"),
        ("transformers", "compressed-tensors", "w8a8"),
        ("llama.cpp", "gguf", "q5_1"),
    ],
)
def test_a_dry_run_prints_the_verdict_of_the_file(reader: str, format: str, scheme: str) -> None:
    out = "m.gguf" if format == "gguf" else "m"
    words = ("--method", "rtn", "--scheme", scheme, "--format", format, "--dry-run")
    printed = " ".join(done("quantize", "demo", *words, "--out", out).split())
    full = str(parse_scheme(scheme))
    run = next(r for r in readers.seen()["runs"] if (r["reader"], r["format"], r["scheme"]) == (reader, format, full))
    known = readers.seen()["readers"][reader]
    assert f"{reader} {known['version']} on a {known['machine']}, {known['date']}" in printed
    assert (f"{run['difference']:.2g} nats per token" if run["answer"] == "run" else "no scheme for") in printed
