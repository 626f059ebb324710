"""``ptq analyze``: every family, what it finds against a plain forward pass, its files, and what it refuses."""

from __future__ import annotations

import json

import pytest
import torch
from command import done, refused, text_file, tiny
from safetensors.torch import load_file, save_file
from tiny_models import EVERY_FAMILY, save_tiny
from transformers import AutoModelForCausalLM

from calibration.errors import ToolkitError
from calibration.model.opening import open_model
from calibration.progress import Silent
from calibration.text.crops import TokenBatches
from ptq.analysis.observe import Subject, observe
from ptq.analysis.sites import ROLES

IDS = torch.randint(0, 96, (5, 24), generator=torch.Generator().manual_seed(0))


def findings(folder, tmp_path, ids=IDS):
    reader, config, spec = open_model(folder)
    subject = Subject(reader, config, spec, torch.float32, torch.device("cpu"))
    return observe(subject, TokenBatches(ids, {}), str, Silent())


@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_every_family_and_the_residual_stream_is_that_of_the_model(family, tmp_path):
    folder = save_tiny(family, tmp_path / "model")
    found = findings(folder, tmp_path)
    roles = {s.role for s in found.sites if s.block == 0}
    assert {"attention input", "o input", "down input", "attention output", "block output"} <= roles <= set(ROLES)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        hidden = model(IDS, use_cache=False, output_hidden_states=True).hidden_states
    site = next(s for s in found.sites if s.block == 0 and s.role == "block output")
    assert site.max_abs == pytest.approx(float(hidden[1].abs().max()), rel=1e-5)
    assert site.inf_norm == pytest.approx(float(hidden[1].abs().amax((1, 2)).mean()), rel=1e-5)
    assert site.tokens == IDS.numel()
    assert {w.name for w in found.weights if w.block == 1}
    assert not list((tmp_path / "scratch").glob("*"))


def test_experts_are_pooled(tmp_path):
    found = findings(save_tiny("mixtral", tmp_path / "model"), tmp_path)
    site = next(s for s in found.sites if s.role == "down input")
    assert site.linears == ("block_sparse_moe.experts.*.w2",) and site.inf_norm is None and site.six_sigma is None
    assert site.tokens == 2 * IDS.numel()  # two experts per token


def test_batches_do_not_change_the_numbers(tmp_path, monkeypatch):
    folder = save_tiny("llama", tmp_path / "model")
    together = findings(folder, tmp_path)
    monkeypatch.setattr("ptq.analysis.observe.BATCH_TOKENS", 1)
    for one, other in zip(together.sites, findings(folder, tmp_path).sites, strict=True):
        assert one.inf_norm == pytest.approx(other.inf_norm, rel=1e-5)
        assert one.kurtosis_tensor == pytest.approx(other.kurtosis_tensor, rel=1e-4)
        assert one.six_sigma == other.six_sigma


def test_ranges_are_written_for_every_channel(tmp_path):
    folder = save_tiny("llama", tmp_path / "model")
    found = findings(folder, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    seen = []
    model.model.layers[1].mlp.down_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        model(IDS, use_cache=False)
    x = seen[0]
    name = "model.layers.1.down_input"
    torch.testing.assert_close(found.ranges[f"{name}.low"], x[:, 1:].amin((0, 1)))
    torch.testing.assert_close(found.ranges[f"{name}.high"], x[:, 1:].amax((0, 1)))
    torch.testing.assert_close(found.ranges[f"{name}.abs_mean"], x[:, 1:].abs().mean((0, 1)))
    torch.testing.assert_close(found.ranges[f"{name}.first_token_max"], x[:, 0].abs().amax(0))


def test_command_on_float_and_quantized(tmp_path):
    model, text = tiny(tmp_path / "model"), text_file(tmp_path / "text.txt")
    few = ("--dataset", text, "--samples", "4", "--seq-len", "32")
    printed = done("analyze", model, *few, "--out", tmp_path / "a")
    assert "max infinity norm" in printed
    assert {p.name for p in (tmp_path / "a").iterdir()} == {
        "report.html", "report.json", "report.md", "channels.safetensors", "plan.json",
    }  # fmt: skip
    data = json.loads((tmp_path / "a" / "report.json").read_text())
    assert data["model"]["format"] is None and len(data["sites"]) == 2 * len(ROLES)
    assert load_file(tmp_path / "a" / "channels.safetensors")["model.layers.0.block_output.low"].shape == (64,)
    assert "## By tensor" in (tmp_path / "a" / "report.md").read_text()
    for page in ("report.md", "report.html"):
        assert "1e-06 added to s⁴" in (tmp_path / "a" / page).read_text(), page

    again = done("analyze", model, *few, "--out", tmp_path / "b")
    assert again.replace("/b", "/a") == printed
    assert (tmp_path / "a" / "report.json").read_bytes() == (tmp_path / "b" / "report.json").read_bytes()

    done("quantize", model, *few, "--method", "rtn", "--scheme", "w8a16-g32", "--out", tmp_path / "q")
    done("analyze", tmp_path / "q", *few, "--out", tmp_path / "c")
    other = json.loads((tmp_path / "c" / "report.json").read_text())
    assert other["model"]["format"] == "compressed-tensors"
    largest = [[s["max_abs"] for s in d["sites"]] for d in (data, other)]
    assert largest[0] != largest[1] and largest[0] == pytest.approx(largest[1], rel=0.1)


def test_linears_alone_and_recipes_on_request(tmp_path):
    model, text = tiny(tmp_path / "model"), text_file(tmp_path / "text.txt")
    few = ("--dataset", text, "--samples", "4", "--seq-len", "32")
    schemes = "w2a16-g32,w3a16-g32"
    more = ("--sensitivity", schemes, "--probe-windows", "2", "--try", "--windows", "2")
    printed = done("analyze", model, *few, *more, "--out", tmp_path / "a")
    data = json.loads((tmp_path / "a" / "report.json").read_text())
    assert [s["scheme"] for s in data["sensitivity"]] == ["w2a16-g32-sym", "w3a16-g32-sym"] and len(
        data["frontier"]
    ) > 3
    done(
        "study",
        "sensitivity",
        model,
        *few,
        "--schemes",
        "w2a16-g32,w3a16-g32",
        "--windows",
        "2",
        "--out",
        tmp_path / "s",
    )
    study = json.loads((tmp_path / "s" / "sensitivity.json").read_text())
    assert study["schemes"] == data["sensitivity"], "the same measurement as the study's"
    tried = [t for t in data["trials"] if t["divergence"] is not None]
    assert (
        tried
        and data["verdicts"][0] in printed
        and "## Whether the advice helped" in (tmp_path / "a/report.md").read_text()
    )
    assert not (tmp_path / "a" / "try").exists()
    done("quantize", model, *few, "--method", "rtn", "--scheme", "w8a8", "--out", tmp_path / "q")
    assert "quantized already" in refused(
        "analyze", tmp_path / "q", *few, "--try", "--windows", "2", "--out", tmp_path / "b"
    )
    assert "quantizes more" in refused("analyze", model, *few, "--sensitivity", "w8a8", "--out", tmp_path / "b")


def test_refusals(tmp_path):
    model, text = tiny(tmp_path / "model"), text_file(tmp_path / "text.txt")
    out = tmp_path / "out"
    assert "too small" in refused("analyze", model, "--dataset", text, "--samples", "0", "--out", out)
    assert "no such" in refused("analyze", tmp_path / "none", "--out", out)
    assert "nosuchset" in refused("analyze", model, "--dataset", "nosuchset", "--out", out)
    assert not out.exists() and not out.with_name("out.partial").exists()
    out.mkdir()
    (out / "mine").write_text("x")
    assert "not empty" in refused("analyze", model, "--dataset", text, "--out", out)


def test_overflow_is_refused(tmp_path):
    folder = save_tiny("llama", tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.down_proj.weight"] *= 1e38
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ToolkitError, match=r"model.layers.0: NaN, Inf .* in its mlp output"):
        findings(folder, tmp_path)
