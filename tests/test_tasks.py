"""The harness, which need not be installed here."""

from __future__ import annotations

import math

import pytest

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
