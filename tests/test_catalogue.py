"""What is listed of the passes (help, reports, docs/methods.md) is what their classes say; no list is kept by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
from command import done

from ptq import catalogue
from ptq.methods import COMBINATIONS
from ptq.methods import METHODS as QUANTIZERS
from ptq.report import wording
from sparsity.methods import METHODS as SPARSIFIERS

METHODS = {**QUANTIZERS, **SPARSIFIERS}


@pytest.mark.parametrize("name", METHODS)
def test_the_source_says_what_the_class_says(name):
    method, entry = METHODS[name], catalogue.named(name)
    assert entry is not None
    assert (entry.name, entry.title) == (method.name, method.title or method.name)
    assert (entry.summary, entry.default_scheme) == (method.summary, method.default_scheme)
    assert entry.expected_errors == method.expected_errors
    assert entry.phases == tuple(phase.name.lower() for phase in method.phases)
    assert wording.pass_sentence({"name": name}) == method.summary


def test_every_method_is_listed_once_in_the_order_of_phases():
    names = [entry.name for entry in catalogue.methods()]
    assert sorted(names) == sorted(METHODS) and catalogue.combinations() == COMBINATIONS
    first = [METHODS[name].phases[0] for name in names]
    assert first == sorted(first)


def test_what_ptq_fit_takes():
    offered = catalogue.fit_methods()
    assert {"rtn", "gptq", "awq", "awq+gptq", "awq+signround"} <= set(offered) and "awq+rtn" not in offered
    assert {n for method in offered for n in method.split("+")} == {n for n in METHODS if METHODS[n].expected_errors}
    words = {word.strip(".,") for word in done("fit", "--help").replace("│", " ").split()}
    assert set(catalogue.fit_methods()) <= words


def test_the_table_of_the_docs_is_current():
    text = (Path(__file__).parents[1] / "docs/methods.md").read_text(encoding="utf-8")
    table = text.partition("<!-- written by `ptq methods --markdown` -->\n")[2].partition("<!-- end -->")[0]
    assert table == catalogue.markdown(), "put the output of `ptq methods --markdown` between the marks"


def test_the_command_lists_them():
    printed = done("methods")
    for name, method in METHODS.items():
        assert any(line.startswith(f"{name} ") and method.summary in line for line in printed.splitlines()), name
    assert done("methods", "--markdown") == catalogue.markdown()


def test_names_that_nothing_is_known_of():
    assert catalogue.named("awk") is None and wording.pass_sentence({"name": "awk"}) == ""
    assert wording.model_label("gptq") == "GPTQ" and wording.model_label("awk") == "awk"
