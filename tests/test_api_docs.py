"""docs/api.md and the notebook: every public name is there, every keyword exists, and the notebook's cells run."""

from __future__ import annotations

import ast
import inspect
import json
import re
from pathlib import Path

import pytest

import ptq

ROOT = Path(__file__).parents[1]
DOCS = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
NOTEBOOK = json.loads((ROOT / "examples" / "quickstart.ipynb").read_text(encoding="utf-8"))
BLOCKS = re.findall(r"```python\n(.*?)```", DOCS, re.DOTALL)
CELLS = ["".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]


def calls(code: str) -> list[ast.Call]:
    """Calls of ``ptq.NAME(...)``."""
    found = (node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call))
    return [n for n in found if isinstance(n.func, ast.Attribute) and ast.unparse(n.func.value) == "ptq"]


def test_every_public_name_is_documented():
    for name in ptq.__all__:
        assert re.search(rf"\b{name}\b", DOCS), name
    called = {call.func.attr for block in BLOCKS for call in calls(block)}
    functions = {name for name in ptq.__all__ if not inspect.isclass(getattr(ptq, name))}
    assert called >= functions - {"evaluate_tasks", "upload"}, functions - called


@pytest.mark.parametrize("code", BLOCKS + CELLS)
def test_the_keywords_of_the_examples_exist(code):
    for call in calls(code):
        signature = inspect.signature(getattr(ptq, call.func.attr))
        signature.bind(*call.args, **{keyword.arg: None for keyword in call.keywords})


def test_signatures_name_keywords_that_exist():
    """The inline signatures: ``name(model, *, a, b, ...) -> Result``."""
    for name, listed in re.findall(r"`(\w+)\(([^)`]*)\) ->", DOCS.replace("\n", " ")):
        known = inspect.signature(getattr(ptq, name)).parameters
        words = [word.strip().partition("=")[0] for word in listed.split(",")]
        unknown = [word for word in words if word.isidentifier() and word not in known]
        assert not unknown, f"{name}: {unknown}"


@pytest.mark.slow
def test_the_notebook_runs(tmp_path, monkeypatch):
    """Its code cells in order, as a kernel would; the last expression of a cell must print well."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for cell in CELLS:
        tree = ast.parse(cell)
        last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, "cell", "exec"), names)
        if last is not None:
            shown = eval(compile(ast.Expression(last.value), "cell", "eval"), names)
            assert len(repr(shown)) < 2000
    assert not any(cell.get("outputs") for cell in NOTEBOOK["cells"]), "commit it without outputs"


@pytest.mark.slow
def test_the_examples_of_the_docs_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for block in BLOCKS:
        exec(compile(block, "docs/api.md", "exec"), names)
