"""`ptq study calibration`: its statistics against values by hand, and whole studies of tiny models."""

from __future__ import annotations

import json
import math

import pytest
import torch
from command import done, refused, run_ptq, snapshot, text_file, tiny

import ptq.study.calibration as study_module
from calibration.model.opening import load_tokenizer, open_model
from calibration.text.random_tokens import random_tokens
from ptq.runtime.load import load_model
from ptq.study.ranks import spearman, top_share_jaccard
from ptq.study.spread import CalibrationRun, Overlap, levels, overlaps, range_of, seed_deviation, verdict


def test_spearman_by_hand():
    assert spearman([1, 2, 3, 4], [10, 100, 1000, 1e9]) == pytest.approx(1)
    assert spearman([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1)
    assert spearman([1, 2, 3, 4, 5], [2, 1, 4, 3, 5]) == pytest.approx(1 - 6 * 4 / (5 * 24))
    # ties share a rank: 1, 2.5, 2.5, 4 against 1, 2, 3, 4
    assert spearman([1, 7, 7, 9], [1, 2, 3, 4]) == pytest.approx(4.5 / math.sqrt(4.5 * 5))
    assert spearman([1, 1, 1], [1, 2, 3]) is None and spearman([1], [1]) is None


def test_jaccard_of_the_top_channels():
    a = torch.arange(200.0)
    b = a.clone()
    b[199] = 0
    assert top_share_jaccard(a, a) == 1
    assert top_share_jaccard(a, b) == pytest.approx(1 / 3)  # {198, 199} and {197, 198}
    assert top_share_jaccard(a, -a) == 0
    assert top_share_jaccard(a[:50], 5 * a[:50]) == 1  # one channel; scale does not matter


def run(dataset, seed, perplexity, samples=8, fingerprint=None):
    return CalibrationRun(dataset, samples, 64, seed, 512, fingerprint or f"{dataset}{seed}", perplexity, 0.1, 0.1)


RUNS = [run("a", 0, 10.0), run("a", 1, 10.2), run("b", 0, 11.0), run("b", 1, 11.4)]
NEAR, FAR = (Overlap("a", "b", 0.99, 0.9),), (Overlap("a", "b", 0.5, 0.3),)


def test_levels_by_hand():
    found = levels(RUNS, ("dataset",))
    assert [(x.values, x.runs) for x in found] == [(("a",), 2), (("b",), 2)]
    assert [x.mean for x in found] == pytest.approx([10.1, 11.2])
    assert [x.deviation for x in found] == pytest.approx([0.1 * math.sqrt(2), 0.2 * math.sqrt(2)])
    assert range_of(found) == pytest.approx(1.1 / 10.1)
    assert seed_deviation(RUNS) == pytest.approx(math.sqrt((0.02 + 0.08) / 2))


def test_seeds_with_the_same_windows_count_once():
    found = levels([run("fixed", 0, 10.0, fingerprint="f"), run("fixed", 1, 10.0, fingerprint="f")], ("dataset",))
    assert found[0].runs == 1 and found[0].deviation is None


def test_verdicts():
    close = [run("a", 0, 10.0), run("b", 0, 10.05)]
    assert "does not matter" in verdict(close, NEAR)
    assert "text matters here" in verdict(close, FAR)
    assert "text matters here" in verdict(RUNS, NEAR)
    noisy = [run("a", 0, 10.0), run("a", 1, 11.0), run("b", 0, 10.2), run("b", 1, 11.2)]
    assert "no more than seeds do" in verdict(noisy, NEAR)
    assert "One data set only" in verdict(RUNS[:2], ())
    # data sets are compared at the largest size alone
    assert "does not matter" in verdict([run("a", 0, 99.0, samples=2), *close], NEAR)


def test_overlap_of_data_sets_is_the_mean_over_inputs():
    x = torch.arange(100.0)
    (found,) = overlaps({"a": {"q": x, "up": x}, "b": {"q": x, "up": -x}})
    assert (found.spearman, found.jaccard) == (pytest.approx(0), 0.5)


def test_random_tokens(tmp_path):
    tokenizer = load_tokenizer(tiny(tmp_path / "model"))
    found = random_tokens(tokenizer, 40, 100, 3)
    assert torch.equal(found.input_ids, random_tokens(tokenizer, 40, 100, 3).input_ids)
    assert not torch.equal(found.input_ids, random_tokens(tokenizer, 40, 100, 4).input_ids)
    ids = sorted(set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids))
    counts = torch.bincount(found.input_ids.flatten(), minlength=max(ids) + 1)[ids]
    assert counts.sum() == 4000 and counts.max() < 2.5 * 4000 / len(ids)  # no special token, none preferred
    assert found.source["tokens"] == 4000 and found.source["dataset"] == "random"


def test_channel_peaks_are_those_of_the_model(tmp_path):
    folder = tiny(tmp_path / "model", "mixtral")
    reader, _, spec = open_model(folder)
    tokens = random_tokens(load_tokenizer(folder), 3, 32, 0)
    widths = {name.removesuffix(".weight"): info.shape[-1] for name, info in reader.infos.items() if info.shape}
    model = load_model(folder, dtype=torch.float32).model
    found = study_module.channel_peaks(model, spec, widths, tokens)
    entering = []
    hook = model.model.layers[1].self_attn.o_proj.register_forward_pre_hook(lambda m, a: entering.append(a[0]))
    model(tokens.input_ids)
    hook.remove()
    expected = torch.cat(entering).flatten(0, -2).abs().amax(0)
    torch.testing.assert_close(found["model.layers.1.self_attn.o_proj"], expected, rtol=1e-5, atol=1e-6)
    assert all(peaks.shape == (widths[name],) for name, peaks in found.items())
    assert {name.rpartition(".")[2] for name in found} == {"q_proj", "o_proj", "w1", "w2"}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    tiny(folder / "model")
    text_file(folder / "text.txt")
    return folder


def words(place, *more):
    sets = f"{place / 'text.txt'},random,generated"
    settings = ("--samples", "2,4", "--seq-len", "32", "--seeds", "2", "--windows", "3", "--scheme", "w2a16-g32")
    return ("study", "calibration", place / "model", "--datasets", sets, "--eval", place / "text.txt", *settings, *more)


@pytest.fixture(scope="module")
def whole(place):
    return done(*words(place, "--out", place / "out"))


def test_whole_study(place, whole):
    data = json.loads((place / "out" / "calibration.json").read_text())
    assert sorted(p.name for p in (place / "out").iterdir()) == ["calibration.json", "calibration.md", "plan.json"]
    assert len(data["runs"]) == 3 * 2 * 2 and len(data["overlaps"]) == 3
    assert data["protocol"]["tokens_scored"] == 3 * 31 and data["scheme"] == "w2a16-g32-sym"
    assert len({run["fingerprint"] for run in data["runs"]}) == 12
    assert len({run["perplexity"] for run in data["runs"]}) == 12
    for run in data["runs"]:
        assert run["perplexity"] == pytest.approx(data["float_perplexity"] * math.exp(run["delta_nll"]), rel=1e-5)
    report = (place / "out" / "calibration.md").read_text()
    assert report in whole and "Every setting, over seeds" in report and "±" in report


def test_a_run_of_the_study_is_that_of_ptq_quantize(place, whole, tmp_path):
    """The same setting by itself: same windows, same perplexity."""
    model, text = place / "model", place / "text.txt"
    done("quantize", model, "--method", "gptq", "--scheme", "w2a16-g32", "--format", "native", "--dataset", "random",
         "--samples", 4, "--seq-len", 32, "--seed", 1, "--out", tmp_path / "one")  # fmt: skip
    report = json.loads((tmp_path / "one" / "report.json").read_text())
    data = json.loads((place / "out" / "calibration.json").read_text())
    (mine,) = [r for r in data["runs"] if (r["dataset"], r["samples"], r["seed"]) == ("random", 4, 1)]
    assert report["calibration"]["fingerprint"] == mine["fingerprint"]
    scored = tmp_path / "text.txt"
    scored.write_bytes(text.read_bytes()[:96])  # three windows of bytes, as the study's --windows 3
    done("eval", tmp_path / "one", "--dataset", scored, "--seq-len", "32", "--json", tmp_path / "one.json")
    (evaluation,) = json.loads((tmp_path / "one.json").read_text())["evaluations"]
    assert evaluation["protocol"]["tokens_scored"] == 93
    assert evaluation["perplexity"] == pytest.approx(mine["perplexity"], rel=1e-6)


@pytest.mark.slow
def test_interrupted_and_resumed(place, whole, monkeypatch):
    """A study killed after five runs goes on from the sixth, and ends in the same bytes."""
    calls = []

    def limited(*args, **kwargs):
        calls.append(args)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    real = study_module.run_job
    monkeypatch.setattr(study_module, "run_job", limited)
    assert run_ptq(*words(place, "--out", place / "again")).code == 130
    assert "interrupted run is here" in refused(*words(place, "--out", place / "again"))
    differs = refused(*words(place, "--out", place / "again", "--resume", "--method", "awq"))
    assert "differs from the interrupted run" in differs
    done(*words(place, "--out", place / "again", "--resume"))
    assert len(calls) == 6 + 12 - 5
    assert snapshot(place / "again") == snapshot(place / "out")


def test_fixed_windows_run_once(place, tmp_path, monkeypatch):
    """Seeds do not change token files: one run serves all of them."""
    from safetensors.torch import save_file

    save_file({"input_ids": torch.randint(0, 256, (4, 32))}, tmp_path / "ids.safetensors")
    calls, real = [], study_module.run_job
    monkeypatch.setattr(study_module, "run_job", lambda *a, **k: (calls.append(1), real(*a, **k))[1])
    settings = ("--samples", "4", "--seq-len", "32", "--seeds", "3", "--windows", "2", "--scheme", "w3a16-g32")
    where = ("--eval", place / "text.txt", "--out", tmp_path / "out")
    done("study", "calibration", place / "model", "--datasets", tmp_path / "ids.safetensors", *where, *settings)
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--method", "rtn"), "uses no calibration text"),
        (("--method", "gptw"), "unknown value 'gptw'"),
        (("--scheme", "w9a16"), "9-bit weights"),
        (("--datasets", "wikitext3"), "unknown data set 'wikitext3'"),
        (("--datasets", "random,random"), "there twice"),
        (("--samples", "8,"), "an entry is empty"),
        (("--samples", "0"), "not positive whole numbers"),
        (("--seq-len", "x"), "not positive whole numbers"),
        (("--seeds", "0"), "--seeds 0: less than 1"),
        (("--windows", "-1"), "--windows -1: not within"),
        (("--eval", "nothing.txt"), "no such file"),
        (("--window", "64000", "--eval", "short.txt"), "one window needs"),
        (("--out", "occupied"), "not empty"),
    ],
)
def test_bad_input(place, tmp_path, monkeypatch, more, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "short.txt").write_text("a few words")
    (tmp_path / "occupied").mkdir()
    (tmp_path / "occupied" / "file").touch()
    assert message in refused(*words(place, "--out", tmp_path / "out", *more))
    assert not (tmp_path / "out.partial").exists() and not (tmp_path / "out").exists()
