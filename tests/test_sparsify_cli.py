"""``ptq sparsify``, ``ptq quantize --method awq+scap`` and what runs on their output, as commands."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from command import done, products, refused, run_ptq, text_file, tiny
from safetensors.torch import load_file
from sparse_runs import TOKENS, make_sparse
from tiny_models import EVERY_FAMILY, FAMILIES
from transformers import AutoConfig

from calibration.architectures import resolve
from calibration.text.crops import TokenBatches
from calibration.walk import walk
from ptq.runtime.load import load_model
from sparsity.files import SETTINGS_FILE, TENSORS_FILE, load_sparsity
from sparsity.methods import METHODS, Cats, Chess, Scap, Teal

FEW = ("--samples", "40", "--seq-len", "32")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return text_file(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tiny(tmp_path_factory.mktemp("llama") / "m")


def evaluated(folder, text, *words):
    return done("eval", folder, "--dataset", text, "--seq-len", "32", *words)


def perplexity(output: str) -> str:
    return output.splitlines()[-1]


@pytest.mark.parametrize(
    "method",
    [
        pytest.param(m, marks=pytest.mark.slow) if m == "wina" else m
        for m in METHODS
        if m not in ("fatrelu", "chess-qo")
    ],
)
def test_thresholds_beside_a_copy_of_the_weights(method, llama, text, tmp_path):
    out = tmp_path / "out"
    printed = done("sparsify", llama, "--method", method, "--out", out, "--dataset", text, *FEW)
    assert f"{method} 0.5:" in printed and not (tmp_path / "out.partial").exists()
    before, after = products(llama), products(out)
    assert {SETTINGS_FILE, TENSORS_FILE, "plan.json"} == set(after) - set(before)
    assert all(after[name] == data for name, data in before.items())
    score = evaluated(out, text, "--reference", llama)
    assert f"{method} 0.5, masks on all positions but the first" in score and "pruned on text.txt" in score
    assert "weights of the blocks skipped" in score
    decode = evaluated(out, text, "--protocol", "decode")
    assert "masks on positions from 16 on (decode only)" in decode


def test_the_same_seed_gives_the_same_bytes(llama, text, tmp_path):
    for name in ("one", "two"):
        words = ("--method", "scap", "--out", tmp_path / name, "--dataset", text)
        done("sparsify", llama, *words, *FEW)
    assert products(tmp_path / "one") == products(tmp_path / "two")


def test_no_target_is_dense_bit_for_bit(llama, text, tmp_path):
    done("sparsify", llama, "--method", "teal", "--target", "0", "--out", tmp_path / "out", "--dataset", text, *FEW)
    assert perplexity(evaluated(tmp_path / "out", text)) == perplexity(evaluated(llama, text))


def test_shares_by_name(llama, text, tmp_path):
    target = "down_proj=0.7,*=0.2"
    done("sparsify", llama, "--method", "scap", "--target", target, "--out", tmp_path / "o", "--dataset", text, *FEW)
    score = evaluated(tmp_path / "o", text)
    shares = dict(part.rsplit(" input ", 1) for part in line_of(score, "pruned on").split(": ")[1].split(", "))
    assert float(shares["down_proj"].rstrip("%")) == pytest.approx(70, abs=3)
    assert float(shares["up_proj"].rstrip("%")) == pytest.approx(20, abs=3)


def line_of(output: str, start: str) -> str:
    return next(line for line in output.splitlines() if line.startswith(start))


@pytest.mark.parametrize("format", ["compressed-tensors", "native"])
def test_thresholds_for_a_quantized_base(format, llama, text, tmp_path):
    base, out = tmp_path / "base", tmp_path / "out"
    words = ("--scheme", "w4a16-g32", "--format", format, "--dataset", text)
    done("quantize", llama, "--method", "rtn", "--out", base, *words)
    done("sparsify", base, "--method", "chess", "--out", out, "--dataset", text, *FEW)
    assert "chess 0.5" in evaluated(out, text) and load_model(out).format == format
    assert load_file(out / "model.safetensors").keys() == load_file(base / "model.safetensors").keys()
    exported = tmp_path / "exported"
    other = "native" if format == "compressed-tensors" else "compressed-tensors"
    done("export", out, "--format", other, "--out", exported)
    assert perplexity(evaluated(exported, text)) == perplexity(evaluated(out, text))


def test_both_at_once(llama, text, tmp_path):
    out = tmp_path / "out"
    words = ("--scheme", "w4a16-g32", "--dataset", text, "--eval", text, *FEW)
    done("quantize", llama, "--method", "awq+scap", "--target", "0.4", "--out", out, *words)
    sparsity = load_sparsity(out)
    assert sparsity is not None and (sparsity.method, sparsity.target) == ("scap", 0.4)
    assert [p["name"] for p in json.loads((out / "report.json").read_text())["recipe"]["passes"]] == [
        "awq",
        "rtn",
        "scap",
    ]
    assert "scap 0.4" in json.loads((out / "report.json").read_text())["evaluations"][1]["path"]
    for site in sparsity.sites:
        assert site.mode == "input" and float(site.threshold) > 0


def test_a_resumed_run_has_the_same_thresholds(llama, text, tmp_path):
    """The first block was committed; replaying it must prune it as the first run did."""
    words = ("--method", "awq+scap", "--target", "0.6", "--scheme", "w4a16-g32", "--dataset", text, *FEW)
    done("quantize", llama, *words, "--out", tmp_path / "whole")
    done("quantize", llama, *words, "--out", tmp_path / "cut")
    kept = {p.name: p.read_bytes() for p in (tmp_path / "whole").iterdir() if p.is_file()}
    shutil.rmtree(tmp_path / "cut")
    original = walk.Walk._block

    def stops(self, index, *rest):
        if index == 1:
            raise KeyboardInterrupt
        original(self, index, *rest)

    walk.Walk._block = stops
    try:
        assert run_ptq("quantize", llama, *words, "--out", tmp_path / "cut").code == 130
    finally:
        walk.Walk._block = original
    done("quantize", llama, *words, "--out", tmp_path / "cut", "--resume")
    for name in (TENSORS_FILE, SETTINGS_FILE, "model.safetensors"):
        assert (tmp_path / "cut" / name).read_bytes() == kept[name]


def test_a_recipe_names_sparsity(llama, text, tmp_path):
    recipe = tmp_path / "r.toml"
    recipe.write_text(
        'scheme = "w4a16-g32"\n[[pass]]\nname = "rtn"\n[[pass]]\nname = "chess"\ntarget = 0.3\nup_stat = "rms"\n'
    )
    done("quantize", llama, "--recipe", recipe, "--out", tmp_path / "out", "--dataset", text, *FEW)
    sparsity = load_sparsity(tmp_path / "out")
    assert sparsity is not None and sparsity.settings["chess"]["up_stat"] == "rms" and sparsity.target == 0.3


@pytest.mark.parametrize("method", ["cats", "chess-qo", "scap", "teal"])
def test_an_overall_target_in_bytes(method, llama, text, tmp_path):
    words = ("--method", method, "--skip-bytes", "0.25", "--out", tmp_path / "out", "--dataset", text)
    done("sparsify", llama, *words, *FEW)
    skipped = line_of(evaluated(tmp_path / "out", text), "weights of the blocks").split(": ")[1]
    assert float(skipped.rstrip("%")) == pytest.approx(25, abs=2)


def test_bytes_that_a_method_cannot_skip_are_refused(llama, text, tmp_path):
    words = ("--method", "cats", "--out", tmp_path / "out", "--dataset", text)
    message = refused("sparsify", llama, *words, "--skip-bytes", "0.8", *FEW)
    assert "prunes what" in message and "--method teal" in message
    assert "outside [0, 1)" in refused("sparsify", llama, *words, "--skip-bytes", "1", *FEW)
    assert "exclude each other" in refused("sparsify", llama, *words, "--skip-bytes", "0.2", "--target", "0.5", *FEW)


def test_a_perplexity_budget(llama, text, tmp_path):
    """On a model that was trained: a random one loses nothing."""
    words = ("demo", "--method", "cats", "--samples", "8", "--seq-len", "128")
    found = {}
    for limit in ("0.5%", "3%"):
        printed = done("sparsify", *words, "--max-ppl-increase", limit, "--out", tmp_path / limit[0])
        sparsity = load_sparsity(tmp_path / limit[0])
        assert sparsity is not None and "targets by block" in printed
        assert 0 < sparsity.settings["search"]["perplexity_increase"] <= float(limit[:-1]) / 100
        found[limit] = sparsity.target
    assert 0 < found["0.5%"] < found["3%"] < 0.9
    assert "not a percentage" in refused("sparsify", *words, "--max-ppl-increase", "2", "--out", tmp_path / "o")


@pytest.mark.parametrize("target", ["1", "-0.1", "1.5", "nan", "half", "down_proj=2"])
def test_targets_outside_the_range_are_refused(target, llama, text, tmp_path):
    words = ("--method", "scap", f"--target={target}", "--out", tmp_path / "out", "--dataset", text)
    message = refused("sparsify", llama, *words, *FEW)
    assert target.split("=")[-1] in message and not list(tmp_path.iterdir())


@pytest.mark.parametrize("method", ["cats", "chess", "chess-qo"])
@pytest.mark.parametrize("family", ["opt", "phi3"])
def test_families_without_a_gate_are_told_what_works(family, method, text, tmp_path):
    model = tiny(tmp_path / "m", family)
    message = refused("sparsify", model, "--method", method, "--out", tmp_path / "out", "--dataset", text, *FEW)
    assert f"family {family}" in message and "--method scap or teal" in message
    done("sparsify", model, "--method", "scap", "--out", tmp_path / "out", "--dataset", text, *FEW)
    quantize = ("--method", f"rtn+{method}", "--scheme", "w4a16-g32", "--out", tmp_path / "q", "--dataset", text)
    assert f"family {family}" in refused("quantize", model, *quantize, *FEW)


def test_other_bad_input(llama, text, tmp_path):
    out = ("--out", tmp_path / "out", "--dataset", text)
    few = refused("sparsify", llama, "--method", "cats", *out, "--samples", "4", "--seq-len", "32")
    assert "128 calibration tokens" in few and "1024" in few
    assert "did you mean 'cats'" in refused("sparsify", llama, "--method", "cat", *out)
    assert "has activation" not in refused("sparsify", llama, "--method", "fatrelu", *out, *FEW)
    assert "one kind of site" in refused("sparsify", llama, "--method", "cats", "--target", "up_proj=0.5", *out, *FEW)
    assert "no part of 'rtn'" in refused("quantize", llama, "--method", "rtn", "--target", "0.5", *out)
    assert not list(tmp_path.iterdir())


def test_thresholds_for_another_base_are_refused(llama, text, tmp_path):
    done("sparsify", llama, "--method", "cats", "--out", tmp_path / "out", "--dataset", text, *FEW)
    other = tiny(tmp_path / "other", seed=3)
    for name in (SETTINGS_FILE, TENSORS_FILE):
        (other / name).write_bytes((tmp_path / "out" / name).read_bytes())
    assert "thresholds for the weights" in refused("eval", other, "--dataset", text, "--seq-len", "32")
    words = ("--method", "rtn", "--scheme", "w4a16-g32", "--out", tmp_path / "q")
    assert "has activation thresholds" in refused("quantize", tmp_path / "out", *words)


def has_own_gate(family: str) -> bool:
    """Whether the feed-forward network has a gate, and one that is no part of a fused linear."""
    kind, settings = FAMILIES[family]
    spec = resolve(AutoConfig.for_model(kind, **settings))
    return any(f.gate not in (None, f.up) for f in spec.block(0).feed_forward)


@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_every_family(family):
    """Every linear's input can be pruned, gates where there are some; little pruning is a small change."""
    for step in (Scap(target=0.3, linears="all"), Teal(target=0.3, allocation="uniform"), Cats(0.3), Chess(0.3)):
        if step.name in ("cats", "chess") and not has_own_gate(family):
            continue
        sparse = make_sparse(step, family)
        dense, pruned = sparse.logits(sites=()), sparse.logits()
        assert torch.equal(pruned[:, 0], dense[:, 0])  # position 0 attends to itself alone
        change = float((pruned - dense).norm() / dense.norm())
        assert 1e-4 < change < 0.7, (step.name, change)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_experts_have_thresholds_of_their_own_or_those_of_their_layer(family):
    def thresholds(tokens: TokenBatches) -> list[tuple[float, ...]]:
        sites = make_sparse(Chess(target=0.5), family, tokens=tokens).sites
        experts = [s for s in sites if ".layers.0." in s.name and ".experts." in s.name]
        assert len(experts) == 4
        return [tuple(s.threshold.tolist()) for s in experts]

    own = thresholds(TokenBatches(torch.randint(0, 96, (400, 32)), {}))
    assert len(set(own)) == 4 and all(len(t) > 1 for t in own)
    shared = thresholds(TokenBatches(TOKENS.input_ids[:40], {}))  # no expert sees 1024 tokens
    assert len(set(shared)) < 4 and any(len(t) == 1 for t in shared)


def test_the_files_say_what_was_reached_and_shared(text, tmp_path):
    model = tiny(tmp_path / "m", "qwen3_moe")
    words = ("--method", "chess", "--target", "0.4", "--out", tmp_path / "out", "--dataset", text)
    assert "experts with too few calibration tokens" in done("sparsify", model, *words, *FEW)
    sparsity = load_sparsity(tmp_path / "out")
    assert sparsity is not None and sparsity.shared and all(".experts." in name for name in sparsity.shared)
    assert set(sparsity.reached) == {site.name for site in sparsity.sites}
    assert all(share == pytest.approx(0.4, abs=1e-3) for share in sparsity.reached.values())


def test_ties_beyond_the_target_are_said(text, tmp_path):
    model = tiny(tmp_path / "m", "opt")
    words = ("--method", "fatrelu", "--target", "0.1", "--out", tmp_path / "out", "--dataset", text)
    assert "values that tie" in done("sparsify", model, *words, *FEW)
