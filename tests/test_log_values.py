"""Logarithmic grids in running models: attention probabilities and MLP values of `ptq eval`."""

from __future__ import annotations

import re

import pytest
import torch
from command import done, refused, text_file
from tiny_runs import IDS, logits, quantize, rewrite, tiny_checkpoint

import ptq
from calibration.architectures import resolve
from calibration.errors import ToolkitError
from calibration.text.crops import TokenBatches
from ptq.numerics.logarithmic import CANDIDATES, LogQuant, fake_quantize_log, log_sqrt2, signed_log
from ptq.numerics.softmax import SoftmaxRule
from ptq.runtime.explicit_attention import exchange_softmax, exchanged_softmax, explicit_attention
from ptq.runtime.load import load_model
from ptq.runtime.log_search import search_mlp_values, search_probabilities
from ptq.runtime.log_values import LogGrid, log_probabilities, mlp_inputs, parse_log_grid, quantize_mlp_values

FINE = LogQuant(12, 1)  # 2^(1/37) from one value to the next, 2^-110 at the end
FAMILIES = ["llama", "qwen2", "gemma2", "gpt2", "opt", "gpt_neox", "phi3", "mixtral"]


def quantize_probabilities(model, grid):
    exchange_softmax(model, log_probabilities(grid, SoftmaxRule()))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_fine_grid_changes_little_and_a_coarse_one_more(family, tmp_path):
    folder = tiny_checkpoint(family, tmp_path)
    exact = logits(load_model(folder, dtype=torch.float32).model)
    for install in (quantize_probabilities, lambda m, g: quantize_mlp_values(m, resolve(m.config), g)):
        errors = []
        for grid in (FINE, LogQuant(4, 37)):
            model = load_model(folder, dtype=torch.float32).model
            install(model, grid)
            errors.append(float((logits(model) - exact).square().mean().sqrt() / exact.square().mean().sqrt()))
        assert 0 < errors[0] < 0.1 and 4 * errors[0] < errors[1], (family, errors)


def test_causal_attention_stays_causal(tmp_path):
    """Oracle 10: zeros above the diagonal are exact, and later tokens change nothing before them."""
    model = load_model(tiny_checkpoint("llama", tmp_path), dtype=torch.float32).model
    quantize_probabilities(model, LogQuant(4, 20))
    changed = IDS.clone()
    changed[:, 12:] = (changed[:, 12:] + 7) % 256
    before, after = (model(ids, use_cache=False).logits for ids in (IDS, changed))
    assert torch.equal(before[:, :12], after[:, :12]) and not torch.equal(before, after)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, 6, 8, generator=generator) for heads in (4, 2, 2))
    mask = torch.full((6, 6), torch.finfo(torch.float32).min).triu(1)[None, None]
    attention = explicit_attention(log_probabilities(log_sqrt2(4), SoftmaxRule()))
    module = torch.nn.Module()
    module.layer_idx = 0
    _, p = attention(module, q, k, v, mask, 8**-0.5)
    assert (p.triu(1) == 0).all() and (p.diagonal(dim1=-1, dim2=-2)[..., 0] == 1).all()


def test_the_command_says_what_it_simulated(tmp_path):
    folder, text = tiny_checkpoint("llama", tmp_path / "model"), text_file(tmp_path / "text.txt")
    words = ("eval", folder, "--dataset", text, "--seq-len", "32")
    plain = done(*words)
    found = done(*words, "--probabilities", "adalog20-6", "--mlp-values", "log2-8", "--reference", folder)
    assert "probabilities of 6 bits simulated; mlp-values of 8 bits simulated" in found and "KL mean" in found
    assert plain.splitlines()[-1] != found.splitlines()[-1]
    assert done(*words, "--softmax", "gamma=0,zeta=1").splitlines()[-1] == plain.splitlines()[-1]
    clipped = done(*words, "--softmax", "gamma=-0.03")
    assert "softmax: gamma -0.03" in clipped and clipped.splitlines()[-1] != plain.splitlines()[-1]
    assert "gamma is outside" in refused(*words, "--softmax", "gamma=0.1")
    assert "unknown grid 'log3-4'" in refused(*words, "--probabilities", "log3-4")


@torch.no_grad()
def test_bases_are_searched_per_layer_on_the_attention_output(tmp_path, monkeypatch):
    """A slow search over what a look sees finds the same bases; a layer whose attention is flat gets a larger base than
    one whose attention is peaked."""
    folder = tiny_checkpoint("llama", tmp_path)
    rewrite(folder, lambda tensors: {n: t * (8 if "layers.0.self_attn.q_" in n else 1) for n, t in tensors.items()})
    model = load_model(folder, dtype=torch.float32).model
    spec, tokens = resolve(model.config), TokenBatches(IDS, {})
    monkeypatch.setattr("ptq.runtime.log_search.QUERIES", IDS.shape[1])
    found = search_probabilities(model, spec, SoftmaxRule(), LogQuant(4), tokens)
    seen = []
    with exchanged_softmax(model, SoftmaxRule(), seen.append):
        model(IDS, use_cache=False)
    assert [s.layer for s in seen] == [0, 1]
    for scores, grid in zip(seen, found, strict=True):

        def error(q, s=scores):
            wrong = fake_quantize_log(s.probabilities, LogQuant(4, q)) @ s.values - s.output
            return float(wrong.square().mean())

        assert error(grid.q) <= 1.0001 * min(error(q) for q in CANDIDATES)
    assert found[0].q != found[1].q and not any(g.half for g in found)
    rules = [log_probabilities(grid, SoftmaxRule()) for grid in found]
    results = []
    for chosen in (rules, rules[0], rules[1]):
        with exchanged_softmax(model, chosen):
            results.append(model(IDS, use_cache=False).logits)
    assert not torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2]), "a base per layer"


@torch.no_grad()
@pytest.mark.parametrize(("family", "shift"), [("gpt2", 0.17), ("gpt_neox", 0.17), ("opt", 0.0), ("llama", None)])
def test_values_of_an_mlp_are_shifted_or_signed(family, shift, tmp_path):
    """Behind GELU and ReLU the grid has a shift and a scale; products with a gate have signs. They are
    searched on what the linear makes of them, and lose less than a sign bit and log2."""
    folder = tiny_checkpoint(family, tmp_path)
    model = load_model(folder, dtype=torch.float32).model
    spec, exact = resolve(model.config), logits(model)
    found = search_mlp_values(model, spec, LogQuant(4), TokenBatches(IDS, {}))
    assert set(found) == {path for path, _ in mlp_inputs(spec)} and len(found) == 2
    for path, grid in found.items():
        linear, seen = model.get_submodule(path), []
        handle = linear.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0].flatten(0, -2)))
        logits(model)
        handle.remove()
        assert grid.shift == pytest.approx(shift or 0.0, abs=1e-3)
        x, fake = seen[0], signed_log if shift is None else fake_quantize_log
        pairs = ((fake, grid), (signed_log, LogQuant(4)))
        errors = [(linear(f(x, g)) - linear(x)).square().mean() for f, g in pairs]
        assert errors[0] < errors[1]
        if shift is not None:
            assert x.amin() + grid.shift >= -1e-5 and 0 < grid.scale <= 1.1 * float(x.amax()) + grid.shift
    quantize_mlp_values(model, spec, found)
    searched = (logits(model) - exact).square().mean()
    other = load_model(folder, dtype=torch.float32).model
    quantize_mlp_values(other, spec, LogQuant(4))
    assert 0 < searched < (logits(other) - exact).square().mean()


def test_experts_without_tokens_keep_log2(tmp_path):
    model = load_model(tiny_checkpoint("mixtral", tmp_path), dtype=torch.float32).model
    found = search_mlp_values(model, resolve(model.config), LogQuant(4), TokenBatches(IDS[:1, :1], {}))
    untouched = [path for path, grid in found.items() if grid == LogQuant(4)]
    assert untouched and len(untouched) < len(found)


def test_the_command_searches(tmp_path):
    folder, text = tiny_checkpoint("gpt2", tmp_path / "model"), text_file(tmp_path / "text.txt")
    other = text_file(tmp_path / "other.txt", words=500)
    words = ("eval", folder, "--dataset", text, "--seq-len", "32")
    known = ("--calibration", other)
    found = done(*words, "--probabilities", "adalog-4", "--mlp-values", "adalog-4-published", *known)
    assert re.search(r"probabilities of 4 bits simulated \(searched q: \d+ \d+\); mlp-values of 4 bits", found)
    assert "(zero beside the codes) (searched q" in found
    assert "no grid searches its base on it" in refused(*words, "--probabilities", "log2-4", *known)
    message = refused(*words, "--probabilities", "adalog-4", "--calibration", tmp_path / "missing.txt")
    assert "missing.txt" in message


@pytest.mark.parametrize(
    "text", ["log2", "log2-7", "adalog-7", "adalog-4-n", "adalog9-4", "adalog138-4", "log-sqrt3-4", ""]
)
def test_other_grids_are_refused(text):
    with pytest.raises(ToolkitError, match="unknown grid") as caught:
        parse_log_grid("--probabilities", text)
    assert "adalogQ-B" in caught.value.fix
    assert parse_log_grid("--probabilities", "log-sqrt2-4") == LogGrid(log_sqrt2(4))
    assert parse_log_grid("--probabilities", "adalog-3-published") == LogGrid(LogQuant(3, zero_code=False), search=True)


def test_what_cannot_be_exchanged_is_refused(tmp_path):
    bloom = tiny_checkpoint("bloom", tmp_path / "bloom")
    with pytest.raises(ToolkitError, match="not on transformers' attention interface"):
        ptq.evaluate(bloom, dataset=str(text_file(tmp_path / "t.txt")), seq_len=32, probabilities="log2-4")
    folder = tiny_checkpoint("llama", tmp_path / "llama")
    quantize(folder, tmp_path / "kv", method="rtn", scheme="w8a8kv4", format="native")
    with pytest.raises(ToolkitError, match="exchanged already, for a quantized KV cache"):
        ptq.evaluate(tmp_path / "kv", dataset=str(tmp_path / "t.txt"), seq_len=32, probabilities="log2-4")
