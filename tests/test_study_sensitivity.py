"""`ptq study sensitivity` against a model whose linears are rounded by hand, one at a time."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from command import done, refused, text_file, tiny

from calibration.progress import CallbackProgress, Silent
from calibration.walk.token_weights import weights_by_norm
from ptq.numerics.grids import fake_quantize
from ptq.planning.job import Options, prepare
from ptq.runtime.load import load_model
from ptq.scheme import parse_scheme
from ptq.study.ranks import spearman
from ptq.study.sensitivity import measure_sensitivity, prepare_sensitivity

FAST = ("--samples", "6", "--seq-len", "32", "--dtype", "float32")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sensitivity")
    tiny(folder / "model")
    text_file(folder / "text.txt")
    return folder


def study(place, out, *more):
    return done("study", "sensitivity", place / "model", "--dataset", place / "text.txt", *FAST, "--out", out, *more)


@pytest.fixture(scope="module")
def found(place):
    text = study(place, place / "out", "--schemes", "w2a16-g32,w4a16-g32", "--windows", "3")
    assert (place / "out" / "sensitivity.md").read_text() in text
    return json.loads((place / "out" / "sensitivity.json").read_text())


def test_progress_is_one_stage_that_ends_with_the_work(place):
    """Both schemes in one walk there and back; the bar reaches its end with the last linear, not before."""
    seen = []
    options = Options(dataset=str(place / "text.txt"), samples=6, seq_len=32)
    fit = prepare_sensitivity(place / "model", ["w4a16-g32", "w3a16-g32"], options)
    progress = CallbackProgress(lambda stage, done, total, detail: seen.append((stage, done, total, detail)))
    measure_sensitivity(fit, ["w4a16-g32", "w3a16-g32"], fit.job.windows(Silent()), 3, progress)
    told = [entry for entry in seen if entry[0] == "sensitivities"]
    assert told[0][1] == 0 and all(a[1] < b[1] for a, b in itertools.pairwise(told))
    assert told[-1][1] == told[-1][2] and "block 1/2" in told[-1][3]
    assert sum("head" in detail for *_, detail in told) == 3 * (2 + 6) + 6  # probes; gradients of all windows


def test_every_linear_against_rounding_it_by_hand(place, found):
    """The objective on all six windows, for all linears of both blocks; KL on the first three, where it was measured,
    and about what was expected."""
    options = Options(dataset=str(place / "text.txt"), samples=6, seq_len=32)
    tokens = prepare(place / "model", method="gptq", scheme="w4a16-g32", options=options).windows(Silent())
    ids = tokens.input_ids
    model = load_model(place / "model", dtype=torch.float32).model

    def log_probabilities():
        return model(ids[:3], use_cache=False).logits[:, :-1].float().log_softmax(-1)

    checked = 0
    with torch.no_grad():
        log_p = log_probabilities()
        for entry in found["schemes"]:
            scheme = parse_scheme(entry["scheme"])
            assert len(entry["linears"]) == 14
            for linear in entry["linears"]:
                module, inputs = model.get_submodule(linear["name"]), []
                block, streams = model.get_submodule(linear["name"].rpartition(".")[0].rpartition(".")[0]), []
                hooks = (
                    module.register_forward_pre_hook(lambda m, args, inputs=inputs: inputs.append(args[0])),
                    block.register_forward_hook(lambda m, args, output, to=streams: to.append(output)),
                )
                model(ids, use_cache=False)
                for hook in hooks:
                    hook.remove()
                w, x = module.weight.data, inputs[0].flatten(0, -2)
                weighed = streams[0].flatten(0, -2) if linear["name"].endswith("down_proj") else x
                rounded = fake_quantize(w, scheme.weights)
                errors = ((rounded - w) @ x.T).square().sum(dim=0)
                weights = torch.cat([weights_by_norm(window) for window in weighed.split(32)])
                objective = float(errors @ weights) / len(x)
                module.weight.data = rounded
                kl = float((log_p.exp() * (log_p - log_probabilities())).sum(-1).mean())
                module.weight.data = w
                assert linear["objective"] == pytest.approx(objective, rel=1e-4), linear["name"]
                assert kl / 2.5 < linear["divergence"] < 2.5 * kl, linear["name"]
                if linear["measured"] is not None:
                    assert linear["measured"] == pytest.approx(kl, rel=1e-3, abs=1e-7), linear["name"]
                    checked += 1
            model_kl = entry["additivity"] * sum(linear["divergence"] for linear in entry["linears"])
            for linear in entry["linears"]:
                w = model.get_submodule(linear["name"]).weight.data
                w.copy_(fake_quantize(w.clone(), scheme.weights))
            kl = float((log_p.exp() * (log_p - log_probabilities())).sum(-1).mean())
            assert model_kl == pytest.approx(kl, rel=1e-3)
            model = load_model(place / "model", dtype=torch.float32).model
    assert checked == 6


def test_summary(found):
    two, four = found["schemes"]
    for entry in (two, four):
        columns = [[x[key] for x in entry["linears"]] for key in ("objective", "divergence")]
        assert entry["rank_correlation"] == pytest.approx(spearman(*columns))
    for a, b in zip(two["linears"], four["linears"], strict=True):
        assert a["name"] == b["name"] and a["objective"] > b["objective"] and a["divergence"] > b["divergence"]
        assert (a["bits_per_weight"], b["bits_per_weight"]) == (2.5, 4.5)
    assert (found["gradient_tokens"], found["probe_tokens"]) == (6 * 31, 3 * 31)
    assert found["calibration"]["samples"] == 6


def test_linears_that_cannot_take_a_scheme_are_left_out(place, tmp_path):
    """down has 96 inputs: groups of 64 do not divide them."""
    study(place, tmp_path / "out", "--schemes", "w3a16-g64,w3a16-g32")
    data = json.loads((tmp_path / "out" / "sensitivity.json").read_text())
    assert [len(entry["linears"]) for entry in data["schemes"]] == [12, 14]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--schemes", "w9a16"), "9-bit weights"),
        (("--schemes", "w4a16,w4a16"), "there twice"),
        (("--schemes", "w4a16-g128"), "128"),
        (("--schemes", "w4a8-g32"), "quantizes more than weights"),
        (("--windows", "0"), "--windows 0: less than 1"),
        (("--samples", "0"), "too small"),
        (("--dataset", "wikitext3"), "unknown data set"),
        (("--out", "occupied"), "not empty"),
    ],
)
def test_bad_input(place, tmp_path, monkeypatch, more, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "occupied").mkdir()
    (tmp_path / "occupied" / "file").touch()
    words = ("--dataset", place / "text.txt", *FAST, "--schemes", "w4a16-g32", "--out", tmp_path / "out", *more)
    assert message in refused("study", "sensitivity", place / "model", *words)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()
