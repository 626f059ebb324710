"""Logarithmic grids in running models: attention probabilities and MLP values of `ptq eval`."""

from __future__ import annotations

import pytest
import torch
from command import done, refused, text_file
from tiny_runs import IDS, logits, quantize, tiny_checkpoint

import ptq
from calibration.architectures import resolve
from calibration.errors import ToolkitError
from ptq.numerics.logarithmic import LogQuant, log_sqrt2
from ptq.numerics.softmax import SoftmaxRule
from ptq.runtime.explicit_attention import exchange_softmax, explicit_attention
from ptq.runtime.load import load_model
from ptq.runtime.log_values import log_probabilities, parse_log_grid, quantize_mlp_values

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
    _, p = attention(torch.nn.Module(), q, k, v, mask, 8**-0.5)
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


@pytest.mark.parametrize("text", ["log2", "log2-7", "adalog9-4", "adalog138-4", "log-sqrt3-4", ""])
def test_other_grids_are_refused(text):
    with pytest.raises(ToolkitError, match="unknown grid") as caught:
        parse_log_grid("--probabilities", text)
    assert "adalogQ-B" in caught.value.fix
    assert parse_log_grid("--probabilities", "log-sqrt2-4") == log_sqrt2(4)


def test_what_cannot_be_exchanged_is_refused(tmp_path):
    bloom = tiny_checkpoint("bloom", tmp_path / "bloom")
    with pytest.raises(ToolkitError, match="not on transformers' attention interface"):
        ptq.evaluate(bloom, dataset=str(text_file(tmp_path / "t.txt")), seq_len=32, probabilities="log2-4")
    folder = tiny_checkpoint("llama", tmp_path / "llama")
    quantize(folder, tmp_path / "kv", method="rtn", scheme="w8a8kv4", format="native")
    with pytest.raises(ToolkitError, match="KV cache of this model is quantized"):
        ptq.evaluate(tmp_path / "kv", dataset=str(tmp_path / "t.txt"), seq_len=32, probabilities="log2-4")
