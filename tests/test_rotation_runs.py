"""Rotation from the command line to the runtime."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from command import done, products, refused, run_ptq, text_file, tiny
from runtime_layers import inputs, quantized
from tiny_runs import IDS, assert_close, logits, plain_model

from calibration.record import read_record
from ptq.numerics.hadamard import hadamard_transform
from ptq.quantized import QuantizedTensor
from ptq.runtime import attention
from ptq.runtime.linear import QuantLinear
from ptq.runtime.load import load_model

SMALL = ("--samples", "4", "--seq-len", "24", "--scheme", "w8a16-gchannel")
OFFLINE = 'scheme = "w8a16-gchannel"\n[[pass]]\nname = "rotate"\nonline = false\n'


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rotation")
    text_file(folder / "text.txt")
    tiny(folder / "llama", tie_word_embeddings=True)
    tiny(folder / "opt", "opt")
    tiny(folder / "falcon", "falcon-40b")
    tiny(folder / "gemma", "gemma2")
    return folder


def near(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Within what 8-bit weights cost; a model in a wrong basis is about as far from the right one as from zero."""
    return bool((found - expected).norm() < 0.05 * expected.norm())


@pytest.mark.parametrize("family", ["llama", "opt", "falcon"])
@pytest.mark.parametrize("method", ["rotate", "rotate+gptq"])
def test_the_native_runtime_keeps_the_function(family, method, place):
    """Online transforms, the untied head and the quantized stream: an 8-bit model in the new basis is the old one."""
    out = place / f"{family}-{method}"
    said = done("quantize", place / family, "--method", method, "--dataset", place / "text.txt", *SMALL, "--out", out)
    assert "rotate.online: transforms inputs" in said and "native" in said
    expected = logits(plain_model(place / family))
    loaded = load_model(out, dtype=torch.float32)
    assert near(logits(loaded.model), expected)
    config = json.loads((out / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    down = {"llama": "down_proj", "opt": "fc2", "falcon": "dense_4h_to_h"}[family]
    turned = [m for n, m in loaded.model.named_modules() if n.endswith(down)]
    assert len(turned) == 2 and all(m._hadamard == m.in_features for m in turned)
    for module in turned:
        module._hadamard = None
    assert not near(logits(loaded.model), expected)
    record = read_record(out)
    parts = [r for r in record.linears if r.name.endswith(down)]
    assert parts[0].bits_per_weight == 8 + 16 / parts[0].shape[1] + 32 / (parts[0].shape[0] * parts[0].shape[1])
    assert record.result["bits_per_weight"] == pytest.approx(
        sum(r.bits_per_weight * r.shape[0] * r.shape[1] for r in record.linears) / record.result["quantized_weights"]
    )


BALANCING = {
    "awq": "",
    "smoothquant": "down = true\nvalues = true\nalpha = 0.9\n",
    "exponent-shift": "",
    "equalize": "",
}


@pytest.mark.parametrize("name", BALANCING)
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_what_balances_behind_a_rotation_keeps_the_function(name, family, place, tmp_path):
    """Between up and a down whose input is transformed at run time no scale can move; everywhere else it still can."""
    recipe = tmp_path / "r.toml"
    passes = f'[[pass]]\nname = "rotate"\n[[pass]]\nname = "{name}"\n{BALANCING[name]}'
    recipe.write_text(f'scheme = "w8a16-gchannel"\n{passes}')
    words = ("--dataset", place / "text.txt", "--samples", "4", "--seq-len", "24", "--format", "native")
    done("quantize", place / family, "--recipe", recipe, *words, "--out", tmp_path / "out")
    assert near(logits(load_model(tmp_path / "out", dtype=torch.float32).model), logits(plain_model(place / family)))


@pytest.mark.parametrize("family", ["llama", "opt", "falcon"])
def test_offline_rotations_fit_every_format(family, place, tmp_path):
    """R1 and R2 are only weights: plain transformers loads the result, no key missing and none left over."""
    (tmp_path / "r.toml").write_text(OFFLINE)
    done("quantize", place / family, "--recipe", tmp_path / "r.toml", "--out", tmp_path / "out")
    assert read_record(tmp_path / "out").result["format"] == "compressed-tensors"
    expected = logits(plain_model(place / family))
    assert near(logits(load_model(tmp_path / "out", dtype=torch.float32).model), expected)
    if family != "falcon":  # its own class of linears needs dequantize=True
        assert near(logits(plain_model(tmp_path / "out")), expected)


@pytest.mark.parametrize("method", ["rotate+awq", "rotate+smoothquant", "rotate+gptq+norm-tweak"])
def test_a_killed_run_resumes_to_the_same_bytes(method, place, tmp_path, monkeypatch):
    """On the float stream, replayed blocks are turned again before the hidden states go through them."""
    words = ["quantize", place / "llama", "--method", method, "--dataset", place / "text.txt", *SMALL]
    done(*words, "--out", tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr("ptq.run.pipeline.write_checkpoint", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert run_ptq(*words, "--out", tmp_path / "again").code == 130
    (tmp_path / "again.partial/blocks/block-00001.safetensors").unlink()
    done(*words, "--out", tmp_path / "again", "--resume")
    assert products(tmp_path / "again") == products(tmp_path / "whole")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_linear_transforms_its_input(dtype):
    q = quantized("w4a16-g32-sym", 48, 96)
    turned = QuantizedTensor(q.codes, q.scale, q.zero, q.scheme, parts={"hadamard": torch.tensor([96])})
    x = inputs(2, 5, 96, dtype=dtype)
    expected = hadamard_transform(x.float(), 96) @ q.dequantize().T
    found = QuantLinear(turned, None, dtype)(x).float()
    assert (found - expected).abs().max() <= (1e-5 if dtype == torch.float32 else 0.02) * expected.abs().max()
    assert (QuantLinear(q, None, dtype)(x).float() - expected).abs().max() > 0.1 * expected.abs().max()


def test_export_to_another_format_is_refused(place, tmp_path):
    done("quantize", place / "llama", "--method", "rotate", *SMALL, "--out", tmp_path / "out")
    message = refused("export", tmp_path / "out", "--format", "compressed-tensors", "--out", tmp_path / "no")
    assert "transforms inputs while the model runs" in message
    words = ["--method", "cats", "--dataset", place / "text.txt", "--out", tmp_path / "no"]
    assert "input while it runs" in refused("sparsify", tmp_path / "out", *words)
    done("export", tmp_path / "out", "--format", "native", "--out", tmp_path / "again")
    first, second = (logits(load_model(tmp_path / f).model) for f in ("out", "again"))
    assert torch.equal(first, second) and IDS.shape[0] == len(first)


def test_refusals_and_their_fixes(place, tmp_path):
    words = ["quantize", place / "llama", "--method", "rotate", *SMALL, "--out", tmp_path / "no", "--dry-run"]
    message = refused(*words, "--format", "compressed-tensors")
    assert "rotate.online" in message and "online = false" in message and "--format native" in message
    recipe = tmp_path / "r.toml"
    recipe.write_text(OFFLINE)
    done("quantize", place / "llama", "--recipe", recipe, "--format", "compressed-tensors", "--dry-run")
    message = refused("quantize", place / "gemma", "--method", "rotate", *SMALL, "--dry-run")
    assert "gemma2 cannot be rotated exactly" in message and "residual = false" in message
    recipe.write_text('scheme = "w8a16-gchannel"\n[[pass]]\nname = "rotate"\nresidual = false\n')
    done("quantize", place / "gemma", "--recipe", recipe, "--out", tmp_path / "gemma")
    attention = {"attn_implementation": "eager"}
    expected = logits(plain_model(place / "gemma", **attention))
    assert near(logits(load_model(tmp_path / "gemma", dtype=torch.float32).model), expected)
    recipe.write_text('[[pass]]\nname = "rotate"\nresidual = false\nvalues = false\nonline = false\n')
    assert "are all off" in refused("quantize", place / "gemma", "--recipe", recipe, "--dry-run")
    assert "write rotate+awq" in refused("quantize", place / "llama", "--method", "awq+rotate", *SMALL, "--dry-run")


def test_the_plan_says_where_there_is_no_hadamard_matrix(tmp_path):
    tiny(tmp_path / "odd", head_dim=18, intermediate_size=108 * 3 // 2)
    said = done("quantize", tmp_path / "odd", "--method", "rotate", *SMALL, "--dry-run")
    assert "no Hadamard matrix of order 18 (attention values): a random orthogonal one is used" in said
    assert "no Hadamard matrix of order 162 (input of mlp.down_proj): 81 blocks of 2 are used" in said
    assert "residual stream" not in said and "keys" not in said
    cached = ("--method", "rotate", *SMALL[:-1], "w8a16kv8-gchannel", "--dry-run")
    said = done("quantize", tmp_path / "odd", *cached)
    assert "no Hadamard matrix of order 18 (queries and keys): 9 blocks of 2 are used" in said
    tiny(tmp_path / "even")
    assert "no Hadamard" not in done("quantize", tmp_path / "even", "--method", "rotate", *SMALL, "--dry-run")


def test_a_tied_head_is_written_on_its_own(place, tmp_path):
    """The plan counts the head that is no longer tied, and plain transformers uses it."""
    (tmp_path / "r.toml").write_text(OFFLINE)
    done("quantize", place / "llama", "--recipe", tmp_path / "r.toml", "--out", tmp_path / "out")
    model = plain_model(tmp_path / "out")
    assert model.lm_head.weight.data_ptr() != model.model.embed_tokens.weight.data_ptr()
    assert (model.model.norm.weight == 1).all()
    source = plain_model(place / "llama")
    gain, table = source.model.norm.weight, source.model.embed_tokens.weight
    gram = (table * gain) @ table.T
    assert_close(model.lm_head.weight @ model.model.embed_tokens.weight.T, gram)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
def test_oracle_8_queries_and_keys_turn_together(family, tmp_path, monkeypatch):
    """8. R3: attention scores are unchanged, and the cache is quantized in the new basis; turned keys alone change
    them."""
    tiny(tmp_path / "float", family)
    words = ["quantize", tmp_path / "float", "--method", "rotate"]
    done(*words, "--scheme", "w8a16-gchannel", "--out", tmp_path / "plain")
    done(*words, "--scheme", "w8a16kv8-gchannel", "--out", tmp_path / "kv")
    plain = logits(load_model(tmp_path / "plain", dtype=torch.float32).model)
    quantized = logits(load_model(tmp_path / "kv", dtype=torch.float32).model)
    assert near(quantized, plain) and not torch.equal(quantized, plain)
    cached: list[torch.Tensor] = []
    monkeypatch.setattr(attention, "fake_quantize_inputs", lambda x, grid, step: (cached.append(x), x)[1])
    assert_close(logits(load_model(tmp_path / "kv", dtype=torch.float32).model), plain)
    turned = cached[0]
    monkeypatch.setattr(attention, "hadamard_transform", lambda x, block: x)
    logits(load_model(tmp_path / "kv", dtype=torch.float32).model)
    assert torch.allclose(hadamard_transform(cached[4], turned.shape[-1]), turned, atol=1e-5)
    calls = itertools.count()
    monkeypatch.setattr(
        attention, "hadamard_transform", lambda x, block: hadamard_transform(x, block) if next(calls) % 2 else x
    )
    assert not near(logits(load_model(tmp_path / "kv", dtype=torch.float32).model), plain)
