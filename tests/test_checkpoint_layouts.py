"""Checkpoints as the hub has them: older names, extra buffers, shards, other dtypes, extra files, odd configs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_runs import (
    assert_close,
    dense,
    edit_config,
    logits,
    plain_model,
    quantize,
    rewrite,
    tiny_checkpoint,
)
from transformers import AutoModelForCausalLM

from calibration.errors import ToolkitError
from calibration.model.contents import check_weights
from calibration.model.float8 import is_float8
from calibration.model.opening import open_model
from ptq.runtime.load import load_model

Tensors = dict[str, torch.Tensor]


def without(prefix: str):
    """Names without the first part of their path."""

    def change(tensors: Tensors) -> Tensors:
        return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}

    return change


def buffers(blocks: str, **named: torch.Tensor):
    """Buffers of older classes in every block; ``__`` stands for a dot."""

    def change(tensors: Tensors) -> Tensors:
        more = {f"{blocks}.{i}.{n.replace('__', '.')}": t.clone() for i in (0, 1) for n, t in named.items()}
        return {**tensors, **more}

    return change


MASK = torch.ones(64, 64).tril().view(1, 1, 64, 64)
OLDER = {
    "gpt2": [buffers("transformer.h", attn__bias=MASK, attn__masked_bias=torch.tensor(-1e4)), without("transformer.")],
    "bloom": [without("transformer.")],
    "opt": [without("model.")],
    "opt-post-norm": [without("model.")],
    "gpt_neox": [
        buffers(
            "gpt_neox.layers",
            attention__bias=MASK.bool(),
            attention__masked_bias=torch.tensor(-1e9).half(),  # -inf
            attention__rotary_emb__inv_freq=torch.ones(2),
        )
    ],
    "llama": [buffers("model.layers", self_attn__rotary_emb__inv_freq=torch.ones(8))],
}


@pytest.mark.parametrize("family", OLDER)
def test_older_names_and_extra_buffers(family, tmp_path):
    """The result is that of today's layout: the same tensors under the same names."""
    today, older = (tiny_checkpoint(family, tmp_path / name) for name in ("today", "older"))
    for change in OLDER[family]:
        rewrite(older, change)
    assert_close(logits(load_model(older).model), logits(load_model(today).model))
    results = []
    for source in (today, older):
        quantize(source, tmp_path / f"{source.name}-out", method="gptq")
        results.append(load_file(tmp_path / f"{source.name}-out/model.safetensors"))
    assert results[0].keys() == results[1].keys()
    assert all(torch.equal(tensor, results[1][name]) for name, tensor in results[0].items())


def test_a_head_stored_although_tied(tmp_path):
    source = tiny_checkpoint("llama-tied-bias", tmp_path / "float")
    rewrite(source, lambda t: {**t, "lm_head.weight": t["model.embed_tokens.weight"].clone()})
    quantize(source, tmp_path / "out")
    expected = logits(plain_model(tmp_path / "out"))
    model = load_model(tmp_path / "out").model
    assert_close(logits(model), expected)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_head_that_differs_is_not_tied(tmp_path):
    """Whatever the config says: so does from_pretrained."""
    source = tiny_checkpoint("llama-tied-bias", tmp_path / "float")
    rewrite(source, lambda t: {**t, "lm_head.weight": t["model.embed_tokens.weight"] + 1})
    quantize(source, tmp_path / "out", method="rtn")
    for folder in (source, tmp_path / "out"):
        assert_close(logits(load_model(folder).model), logits(plain_model(folder)))


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_sharded_checkpoints(family, tmp_path):
    one, many = tiny_checkpoint(family, tmp_path / "one"), tiny_checkpoint(family, tmp_path / "many")
    AutoModelForCausalLM.from_pretrained(many).save_pretrained(many, max_shard_size="60KB")
    (many / "model.safetensors").unlink()
    assert len(list(many.glob("model-*-of-*.safetensors"))) > 3
    save_file({"tok_embeddings.weight": torch.zeros(3)}, many / "consolidated.safetensors")  # as in Mistral's folders
    for source in (one, many):
        quantize(source, tmp_path / f"{source.name}-out", method="gptq")
    first, second = (load_file(tmp_path / f"{name}-out/model.safetensors") for name in ("one", "many"))
    assert first.keys() == second.keys() and all(torch.equal(t, second[n]) for n, t in first.items())
    assert_close(logits(load_model(tmp_path / "many-out").model), logits(plain_model(tmp_path / "many-out")))


@pytest.mark.parametrize("format", ["compressed-tensors", "native"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtypes(dtype, format, tmp_path):
    """What is not quantized keeps its dtype, and the model loads in it by default."""
    source = tiny_checkpoint("llama", tmp_path / "float", dtype)
    quantize(source, tmp_path / "out", format=format)
    kinds = {t.dtype for n, t in load_file(tmp_path / "out/model.safetensors").items() if n.endswith(".weight")}
    assert kinds == {dtype}
    assert load_model(tmp_path / "out").model.dtype == dtype
    expected = logits(plain_model(dense(tmp_path / "out", tmp_path / "dense")))
    assert_close(logits(load_model(tmp_path / "out", dtype=torch.float32).model), expected)


def test_the_default_dtype_is_that_of_the_linears(tmp_path):
    """Not that of norms kept in float32, nor of a buffer, nor what an old config says."""
    source = tiny_checkpoint("llama", tmp_path / "float", torch.bfloat16)
    rewrite(source, lambda t: {n: x.float() if "norm" in n else x for n, x in t.items()})
    config = json.loads((source / "config.json").read_text())
    config.pop("dtype", None)
    (source / "config.json").write_text(json.dumps({**config, "torch_dtype": "float32"}))
    assert load_model(source).model.dtype == torch.bfloat16
    quantize(source, tmp_path / "out", method="rtn")
    stored = load_file(tmp_path / "out/model.safetensors")
    assert stored["model.norm.weight"].dtype == torch.float32
    assert stored["model.layers.0.mlp.up_proj.weight_scale"].dtype == torch.bfloat16


ROPE = {
    "llama3": ("llama", {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                         "original_max_position_embeddings": 16}, {}),
    "linear": ("llama", {"type": "linear", "factor": 2.0}, {}),
    "dynamic": ("llama", {"type": "dynamic", "factor": 2.0}, {"max_position_embeddings": 16}),
    "yarn": ("qwen3", {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}, {}),
    "longrope": ("phi3", {"type": "longrope", "short_factor": [1.1] * 8, "long_factor": [2.0 + i for i in range(8)]},
                 {"original_max_position_embeddings": 16}),
    "gemma3": ("gemma3", {"rope_type": "linear", "factor": 8.0}, {}),
}  # fmt: skip


@pytest.mark.parametrize("kind", ROPE)
def test_rotary_scaling(kind, tmp_path):
    """Frequencies are computed, not stored; the older ``rope_scaling`` beside ``rope_theta`` is in most files."""
    family, scaling, changes = ROPE[kind]
    source = tiny_checkpoint(family, tmp_path / "float", **changes)
    plain = logits(plain_model(source))
    config = json.loads((source / "config.json").read_text())
    config.pop("rope_parameters")
    (source / "config.json").write_text(json.dumps({**config, "rope_theta": 10000.0, "rope_scaling": scaling}))
    expected = logits(plain_model(source))
    assert (expected - plain).abs().max() > 1e-4 * plain.abs().max()  # 20 tokens: beyond the original 16
    assert_close(logits(load_model(source).model), expected)


def test_small_files_go_along(tmp_path):
    source = tiny_checkpoint("llama", tmp_path / "float")
    kept = {"tokenizer.model": b"\x00sp", "chat_template.jinja": b"{{ x }}", "merges.txt": b"a b", "LICENSE": b"free"}
    for name, content in kept.items():
        (source / name).write_bytes(content)
    for name in ("pytorch_model.bin.index.json", "consolidated.safetensors.index.json", "report.json", "README.md"):
        (source / name).write_text('{"from": "the source"}')
    quantize(source, tmp_path / "out", method="rtn")
    assert all((tmp_path / "out" / name).read_bytes() == content for name, content in kept.items())
    generation = json.loads((tmp_path / "out/generation_config.json").read_text())
    assert generation == json.loads((source / "generation_config.json").read_text())
    assert not list((tmp_path / "out").glob("*.index.json"))
    assert all("the source" not in (tmp_path / "out" / name).read_text() for name in ("report.json", "README.md"))
    before, after = (json.loads((f / "config.json").read_text()) for f in (source, tmp_path / "out"))
    assert {k: v for k, v in after.items() if k != "quantization_config"} == before


def dropped(name: str):
    return lambda tensors: {n: t for n, t in tensors.items() if n != name}


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("llama", "lm_head.weight"),
        ("llama", "model.norm.weight"),
        ("gemma2", "model.layers.1.post_feedforward_layernorm.weight"),
        ("qwen2", "model.layers.0.self_attn.q_proj.bias"),
        ("mixtral", "model.layers.1.block_sparse_moe.gate.weight"),
    ],
)
def test_missing_tensors_are_named_before_any_work(family, name, tmp_path):
    """A norm or a bias that no method touches would else be random in the result."""
    source = rewrite(tiny_checkpoint(family, tmp_path / "float"), dropped(name))
    with pytest.raises(ToolkitError, match=name.replace("block_sparse_moe", "(block_sparse_moe|mlp)")):
        quantize(source, tmp_path / "out", method="rtn")
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()
    with pytest.raises(ToolkitError, match="no tensor for"):
        load_model(source)


def test_configs_that_are_wrong(tmp_path):
    source = tiny_checkpoint("llama", tmp_path / "float")
    (tmp_path / "keep.json").write_bytes((source / "config.json").read_bytes())

    def with_changes(**changes: object) -> Path:
        (source / "config.json").write_bytes((tmp_path / "keep.json").read_bytes())
        return edit_config(source, **changes)

    for changes, word in (
        ({"hidden_size": "64"}, "hidden_size"),
        ({"num_attention_heads": None}, "num_attention_heads"),
        ({"num_attention_heads": 5}, "attention heads"),
    ):
        with pytest.raises(ToolkitError, match=word):
            open_model(with_changes(**changes))
    with pytest.raises(ToolkitError, match=r"shape .*, the model of config\.json has"):
        load_model(with_changes(intermediate_size=128))
    with pytest.raises(ToolkitError, match=r"config\.json"):
        quantize(with_changes(intermediate_size=128), tmp_path / "out", method="rtn")
    with pytest.raises(ToolkitError, match=r"llamo.*not in the architecture table"):
        open_model(with_changes(model_type="llamo"))
    record = quantize(with_changes(quantization_config=None), tmp_path / "out", method="rtn")
    assert record.result["quantized_linears"] == 14


@pytest.mark.parametrize("settings", [[1], "fp8", 3, True])
def test_a_quantization_config_that_is_no_object(tmp_path, settings):
    edit_config(tiny_checkpoint("llama", tmp_path / "m"), quantization_config=settings)
    with pytest.raises(ToolkitError, match=r"quantization_config is .*, not an object"):
        open_model(tmp_path / "m")


def test_which_quantization_configs_are_float8():
    block = {"weights": {"strategy": "block", "type": "float"}}
    ours = {"quant_method": "compressed-tensors", "config_groups": {"a": block}}
    assert is_float8(ours) and is_float8({"quant_method": "fp8"}) and not is_float8({})
    assert not is_float8(ours | {"kv_cache_scheme": {"num_bits": 8}})
    for group in (3, {}, {"weights": [1]}, {"weights": {"strategy": "channel", "type": "float"}}):
        assert not is_float8(ours | {"config_groups": {"a": block, "b": group}})


def test_scalars_need_not_be_finite(tmp_path):
    source = rewrite(
        tiny_checkpoint("gpt_neox", tmp_path / "a"),
        lambda t: {**t, "gpt_neox.layers.0.attention.masked_bias": torch.tensor(-torch.inf)},
    )
    check_weights(open_model(source)[0])
    rewrite(source, lambda t: {**t, "gpt_neox.final_layer_norm.bias": torch.full((64,), torch.nan)})
    with pytest.raises(ToolkitError, match=r"final_layer_norm\.bias .* 64 of 64 values"):
        check_weights(open_model(source)[0])
