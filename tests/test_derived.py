"""Specs derived from the class: equal to those written by hand, and right for types that nobody wrote down."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from byte_tokenizer import byte_tokenizer
from safetensors.torch import load_file
from tiny_models import FAMILIES
from tiny_runs import IDS, assert_close, edit_config, logits, quantize, tiny_checkpoint
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from benchmarks.tiny_configs import tiny_config
from calibration.architectures import FAMILIES as TABLE
from calibration.architectures import Balance, Residual, described, resolve
from calibration.architectures.derivation.entries import derive
from calibration.architectures.llama_like import llama
from calibration.errors import PlanError, ToolkitError
from calibration.model.classes import auto_class
from calibration.model.opening import open_model
from ptq.runtime.load import load_model

SAME = [f for f in FAMILIES if f.startswith(("llama", "mistral", "qwen", "gemma", "phi3", "gpt2")) or f == "opt"]
UNSEEN = ["smollm3", "cohere", "stablelm", "olmo2", "starcoder2", "qwen2_moe", "deepseek_v3", "glm4", "gemma3"]
SLOW = ["granite", "helium", "seed_oss", "ernie4_5", "nemotron", "minimax_m2", "olmoe", "mistral3", "exaone4", "phi"]


def config_of(family):
    model_type, settings = FAMILIES[family]
    return AutoConfig.for_model(model_type, **{**settings, "bos_token_id": 0, "eos_token_id": 0})


@pytest.mark.parametrize("family", SAME)
def test_derived_specs_are_those_written_by_hand(family):
    config = config_of(family)
    found, written = derive(config), resolve(config)
    for index in range(written.n_blocks):
        ours, theirs = found.block(index), written.block(index)
        if family == "opt" or "moe" in family:
            ours = replace(ours, unbalanced=theirs.unbalanced)
        assert ours == theirs
        assert found.experts(index) == written.experts(index)
    for field in ("blocks", "n_blocks", "norm", "tuple_output", "conv1d", "attention", "residual"):
        assert getattr(found, field) == getattr(written, field)


def test_a_type_under_another_name_gets_the_same_spec(tmp_path):
    """A folder whose type nobody knows but the process that registered a class for it."""

    class Renamed(LlamaConfig):
        model_type = "llama_of_another_name"

    class RenamedForCausalLM(LlamaForCausalLM):
        config_class = Renamed

    AutoConfig.register(Renamed.model_type, Renamed)
    AutoModelForCausalLM.register(Renamed, RenamedForCausalLM)
    folder = tiny_checkpoint("llama", tmp_path / "float")
    written = open_model(folder)[2]
    found = open_model(edit_config(folder, model_type=Renamed.model_type))[2]
    assert found.derived and not written.derived
    assert [found.block(i) for i in range(2)] == [written.block(i) for i in range(2)]
    assert (found.residual, found.norm, found.blocks) == (written.residual, written.norm, written.blocks)


def tiny(model_type, folder):
    """A saved random model of a type that the table does not name; the model."""
    torch.manual_seed(0)
    config = tiny_config(model_type, vocab_size=288)
    model = auto_class(config).from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                parameter.add_(0.3 * noise)
            else:
                parameter.copy_(noise * (0.5 if "embed" in name else 1.0) / parameter.shape[-1] ** 0.5)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return model


@pytest.mark.parametrize("model_type", [*UNSEEN, *(pytest.param(t, marks=pytest.mark.slow) for t in SLOW)])
def test_types_that_nobody_wrote_down(model_type, tmp_path):
    """AWQ and GPTQ end to end; the output runs in the class of the source, with the logits that it has here."""
    model = tiny(model_type, tmp_path / "float")
    quantize(tmp_path / "float", tmp_path / "out", method="awq+gptq", scheme="w8a16-gchannel")
    ours = logits(load_model(tmp_path / "out").model)
    with torch.no_grad():
        plain = model(IDS, use_cache=False).logits
    assert (ours - plain).abs().mean() < 0.1 * plain.abs().mean()
    theirs = auto_class(model.config).from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert type(theirs) is type(model)
    assert_close(logits(theirs), ours)


def test_what_is_not_exact_is_not_balanced():
    spec = derive(tiny_config("olmo2"))  # norms behind the sublayers
    assert {pair.kind for pair in spec.block(0).balance} == {"value", "linear"}
    assert isinstance(spec.residual, str)
    starcoder = derive(tiny_config("starcoder2")).block(0)  # a GELU between up and down
    assert "mlp.c_proj: its input passes" in " ".join(starcoder.unbalanced)
    assert all(pair.consumers != ("mlp.c_proj",) for pair in starcoder.balance)


def test_layer_norms_keep_the_mean():
    assert derive(tiny_config("stablelm")).norm == "layer"
    assert isinstance(derive(tiny_config("stablelm")).residual, Residual)


def test_a_plan_says_what_was_found():
    assert described(derive(config_of("llama"))) == "4 inputs, 4 pairs"


@pytest.mark.parametrize(
    ("model_type", "entry", "method", "said"),
    [
        ("stablelm", "llama", "rotate+rtn", "model.layers.0: its residual stream cannot be rotated"),
        ("olmo2", "llama", "awq+rtn", "in the architecture table, but not in the checkpoint"),
        ("gemma", "llama", "awq+rtn", "model.layers.0: a scale on input_layernorm does not cancel in self_attn.q_proj"),
        (
            "arcee",
            "starcoder-like",
            "awq+rtn",
            "model.layers.0: a scale on mlp.up_proj does not cancel in mlp.down_proj",
        ),
    ],
)
def test_a_wrong_entry_of_the_table_is_an_error(model_type, entry, method, said, tmp_path, monkeypatch):
    """The table is proved on the weights of the checkpoint before anything is changed."""
    tiny(model_type, tmp_path / "float")
    wrong = llama if entry == "llama" else lambda config: replace(derive(config), block=lambda i: _with_up(config))
    monkeypatch.setitem(TABLE, model_type, wrong)
    with pytest.raises((ToolkitError, PlanError), match=re.escape(said)):
        quantize(tmp_path / "float", tmp_path / "out", method=method, scheme="w8a16-gchannel")
    assert not (tmp_path / "out").exists()


def _with_up(config):
    block = derive(config).block(0)
    return replace(block, balance=(*block.balance, Balance("mlp.up_proj", ("mlp.down_proj",), "linear")))


@pytest.mark.parametrize("method", ["awq+gptq", "rotate+rtn"])
def test_a_type_taken_from_the_table_gives_the_same_files(method, tmp_path, monkeypatch):
    """The same model with and without its entry by hand, to the bit."""
    source = tiny_checkpoint("qwen3", tmp_path / "float")
    options = {"method": method, "scheme": "w4a16-g32", "format": "native"}
    quantize(source, tmp_path / "table", **options)
    monkeypatch.delitem(TABLE, "qwen3")
    quantize(source, tmp_path / "derived", **options)
    written, found = (load_file(tmp_path / name / "model.safetensors") for name in ("table", "derived"))
    assert written.keys() == found.keys() and all(torch.equal(written[n], found[n]) for n in written)


def test_blocks_that_take_other_hidden_states_are_refused():
    """XLNet's are [tokens, batch, hidden]: nothing that works on windows could run them."""
    with pytest.raises(ToolkitError, match=r"take hidden states .*, not \[batch, tokens, hidden\]"):
        derive(tiny_config("xlnet"))
    assert derive(tiny_config("gptj")).blocks == "transformer.h"  # whose blocks return tuples
