"""Recipes that an analysis carries out: they go on where they were stopped, and tell how far they are."""

from __future__ import annotations

import json

import pytest
from command import done, refused, run_ptq, text_file, tiny
from test_progress import Counted

import ptq
from ptq.analysis import trial


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trials")
    tiny(folder / "model"), text_file(folder / "text.txt")
    return folder


def words(place, out, *more):
    few = ("--dataset", place / "text.txt", "--samples", "4", "--seq-len", "32", "--try", "--windows", "2")
    return ("analyze", place / "model", *few, "--out", place / out, *more)


def test_interrupted_and_resumed(place, monkeypatch):
    done(*words(place, "whole"))
    whole = json.loads((place / "whole" / "report.json").read_text())
    carried_out, real = [], trial.run_job

    def stopped_at(number):
        def run(job, *args, **kwargs):
            if len(carried_out) == number:
                raise KeyboardInterrupt
            carried_out.append(job.plan.recipe.method)
            return real(job, *args, **kwargs)

        return run

    monkeypatch.setattr(trial, "run_job", stopped_at(1))
    assert run_ptq(*words(place, "part")).code == 130
    assert "an interrupted run is here" in refused(*words(place, "part"))
    assert "differs from the interrupted run" in refused(*words(place, "part", "--resume", "--seed", "3"))
    monkeypatch.setattr(trial, "run_job", stopped_at(None))
    done(*words(place, "part", "--resume"))
    tried = [t["method"] for t in whole["trials"] if t["divergence"] is not None]
    assert len(tried) > 2 and len(carried_out) == len(tried), "each recipe once"
    part = json.loads((place / "part" / "report.json").read_text())
    assert {**part, "command": ""} == {**whole, "command": ""}
    assert not (place / "part" / "try").exists()


def test_nothing_else_is_resumed(place):
    run = [word for word in words(place, "plain", "--resume") if word != "--try"]
    assert "only recipes that --try carries out are kept" in refused(*run)


def test_every_recipe_shows_its_stages(place):
    """A recipe is minutes of work on a real model: what a stage announces is what it then advances by."""
    progress = Counted()
    settings = {"dataset": str(place / "text.txt"), "samples": 4, "seq_len": 32, "try_advice": True, "windows": 2}
    record = ptq.analyze(place / "model", out=place / "told", progress=progress, **settings)
    assert all(total == advanced for total, advanced in progress.stages.values())
    recipes = [t for t in record.trials if t.divergence is not None]
    for number, t in enumerate(recipes, 1):
        name = f"recipe {number} of {len(record.trials)}, {t.method} {t.scheme}"
        assert {f"{name}: blocks", f"{name}: export", f"{name}: score"} <= set(progress.stages)
