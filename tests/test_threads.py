"""Thread counts: the same files with one and with two on a small model, and a run is resumed with as many as it had."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from command import done, products, refused, run_ptq, text_file, tiny

import ptq.run.pipeline
from ptq.session import PLAN_FILE

RECIPES = {
    "signround": '[[pass]]\nname = "signround"\nepochs = 2\n',
    "adaquant": '[[pass]]\nname = "adaquant"\niterations = 5\n',
    "lorc": '[[pass]]\nname = "rtn"\n[[pass]]\nname = "lorc"\nrank = 4\n',
    "rotate": '[[pass]]\nname = "rotate"\n[[pass]]\nname = "gptq"\n',
}


class Killed(BaseException):
    """Stands for kill -9."""


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def command(place: Path, method: str, out: Path) -> list[str | Path]:
    (place / f"{method}.toml").write_text(RECIPES[method])
    words = ["quantize", place / "model", "--recipe", place / f"{method}.toml", "--scheme", "w4a16-g32", "--out", out]
    return [*words, "--format", "native", "--dataset", place / "text.txt", "--samples", "4", "--seq-len", "24"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("threads")
    text_file(folder / "text.txt")
    tiny(folder / "model")
    return folder


def files(out: Path) -> dict[str, bytes]:
    """All but the times and, in the plan, the number of threads."""
    found = products(out)
    plan = json.loads(found.pop(PLAN_FILE))
    plan.pop("threads")
    return {**found, PLAN_FILE: json.dumps(plan, sort_keys=True).encode()}


@pytest.mark.parametrize(
    "method", ["adaquant", "rotate", *(pytest.param(name, marks=pytest.mark.slow) for name in ("signround", "lorc"))]
)
def test_one_and_two_threads(place, tmp_path, method):
    for count in (1, 2):
        with threads(count):
            done(*command(place, method, tmp_path / f"with {count}"))
    assert files(tmp_path / "with 1") == files(tmp_path / "with 2")


@pytest.mark.parametrize("method", RECIPES)
def test_resumed_with_the_threads_that_it_had(place, tmp_path, monkeypatch, method):
    """With others it is refused by name: sums of larger matrices may be cut at other places."""
    words = command(place, method, tmp_path / "out")
    with monkeypatch.context() as patched:

        def killed(*args: object) -> None:
            raise Killed

        patched.setattr(ptq.run.pipeline, "_export", killed)
        with threads(1), pytest.raises(Killed):
            run_ptq(*words)
    with threads(2):
        assert "'threads'" in refused(*words, "--resume")
    with threads(1):
        done(*words, "--resume")
        done(*command(place, method, tmp_path / "whole"))
    assert products(tmp_path / "out") == products(tmp_path / "whole")
