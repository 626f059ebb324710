"""The harness, which need not be installed here."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from command import done, refused

from calibration.errors import PlanError, ToolkitError
from calibration.scoring.tasks import check_task_names, lm_eval_tasks, read_scores


def test_tasks_without_the_harness_say_what_to_install() -> None:
    from importlib.util import find_spec

    if find_spec("lm_eval") is not None:
        pytest.skip("lm-eval is installed")
    with pytest.raises(ToolkitError) as caught:
        lm_eval_tasks(None, None, ["piqa"])  # type: ignore[arg-type]
    assert caught.value.fix == 'pip install "ptq[eval]"'


def test_unknown_tasks_are_named_all_at_once() -> None:
    check_task_names(["piqa"], ["piqa", "arc_easy"])
    with pytest.raises(PlanError, match="did you mean 'arc_easy'") as caught:
        check_task_names(["piqaa", "arc-easy", "piqa"], ["piqa", "arc_easy"])
    assert len(caught.value.problems) == 2
    with pytest.raises(ToolkitError, match="no task named"):
        check_task_names([], ["piqa"])


def test_scores_are_read_from_the_harness_layout() -> None:
    results = {
        "results": {
            "toy": {
                "name": "toy", "alias": "toy", "sample_len": 4,
                "acc,none": 0.25, "acc_stderr,none": "N/A", "word_perplexity,none": 9.5,
            },
            "group": {"alias": "group", "acc,none": 0.5, "acc_stderr,none": "N/A"},
        },
        "n-samples": {"toy": {"original": 9, "effective": 4}},
        "n-shot": {"toy": 0},
        "versions": {"toy": 1.0},
    }  # fmt: skip
    group, accuracy, perplexity = read_scores(results)
    assert (group.task, group.samples, group.standard_error) == ("group", None, None)
    assert accuracy.standard_error == pytest.approx(math.sqrt(0.25 * 0.75 / 4))
    assert (accuracy.shots, accuracy.version, accuracy.filter) == (0, "1.0", "none")
    assert (perplexity.metric, perplexity.value, perplexity.standard_error) == ("word_perplexity", 9.5, None)


STUB = """
import os, subprocess, sys
__version__ = "9"
def simple_evaluate(model, tasks, num_fewshot, limit, task_manager, **rest):
    os.write(2, b"a bar")
    subprocess.run([sys.executable, "-c", "import os; os.write(2, b'fatal: not a git repository')"])
    items = limit or 10
    return {
        "results": {t: {"acc,none": 0.5, "batch,none": model.batch_size} for t in tasks},
        "n-samples": {t: {"effective": items} for t in tasks},
        "n-shot": {t: num_fewshot or 0 for t in tasks},
        "versions": {t: 1 for t in tasks},
    }
"""
TASKS = """
import os
class TaskManager:
    def __init__(self, include_path=None):
        own = [f[:-5] for f in os.listdir(include_path)] if include_path else []
        self.all_tasks = ["piqa", "arc_easy", *own]
"""
MODEL = """
class HFLM:
    def __init__(self, pretrained, tokenizer, batch_size, max_length):
        assert pretrained is not None and max_length == 512
        self.batch_size = batch_size
"""


@pytest.fixture
def harness(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A stand-in for lm-eval is found: what it is asked, and what it writes to stderr."""
    package = tmp_path / "stub" / "lm_eval"
    (package / "models").mkdir(parents=True)
    (package / "__init__.py").write_text(STUB)
    (package / "tasks.py").write_text(TASKS)
    (package / "models" / "huggingface.py").write_text(MODEL)
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "mine.yaml").write_text("task: mine\n")
    monkeypatch.syspath_prepend(tmp_path / "stub")
    real = {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] == "lm_eval"}
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "lm_eval"]:
        del sys.modules[name]
    sys.modules.update(real)


def test_tasks_alone_need_no_perplexity_and_are_quiet(
    harness: None, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    own = ["--include-path", str(tmp_path / "own"), "--limit", "3", "--num-fewshot", "2", "--batch-size", "5"]
    printed = done("eval", "demo", "--tasks", "piqa,mine", *own, "--json", str(tmp_path / "t.json"))
    assert "mine: acc 0.5000 +- 0.2887 (3 items, 2 shots)" in printed and "perplexity" not in printed
    assert "batch 5.0000" in printed
    loud = capfd.readouterr().err
    assert "bar" not in loud and "fatal" not in loud
    data = json.loads((tmp_path / "t.json").read_text())
    assert data["evaluations"] == [] and data["tasks"]["limit"] == 3 and data["tasks"]["harness"] == "lm-eval 9"


def test_tasks_are_refused_before_any_work(harness: None, tmp_path: Path) -> None:
    # a model that is not there: the names are looked at first
    message = refused("eval", tmp_path / "nowhere", "--tasks", "arc-easy", "--dataset", "builtin")
    assert "did you mean 'arc_easy'" in message
    for options, words in (
        (("--tasks", "piqa", "--limit", "0"), "--limit 0: less than 1"),
        (("--tasks", "piqa", "--include-path", str(tmp_path / "none")), "no such folder"),
        (("--limit", "3"), "--limit: has a meaning only with --tasks"),
    ):
        assert words in refused("eval", "demo", *options)
