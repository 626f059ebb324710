"""GGUF files: written from runs and from other formats, read by transformers and as source models, and refused."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from command import refused, run_ptq
from safetensors.torch import load_file
from tiny_runs import IDS, TEXT, edit_config, logits, quantize, text_file, tiny_checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer

import ptq
from calibration.errors import PlanError, ToolkitError
from calibration.model.opening import DEMO_FOLDER, load_tokenizer, locate
from calibration.model.pretokenizers import PATTERNS, pre_name, pre_tokenizer
from calibration.model.shards import ShardWriter
from ptq.conversion import export_model
from ptq.formats import gguf_file, write
from ptq.formats.gguf_tokenizer import tokenizer_keys
from ptq.runtime.load import load_model


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def rounded_to(found: torch.Tensor, expected: torch.Tensor, share: float) -> None:
    assert (found - expected).abs().max() <= share * expected.abs().max()


@pytest.mark.parametrize("family", ["llama", "llama-tied-bias", "mistral", "qwen2", "qwen3", "gemma2", "gemma3"])
def test_a_file_read_back_is_the_model_that_was_written(family, tmp_path):
    changes = {
        "llama-tied-bias": {"mlp_bias": False},
        "mistral": {"sliding_window": None},
        "gemma3": {"layer_types": ["sliding_attention"] * 2, "sliding_window": 8},
    }.get(family, {})
    model = tiny_checkpoint(family, tmp_path / "model", **changes)
    record = quantize(model, tmp_path / "native", method="rtn", scheme="q8_0", embeddings="q8_0", format="native")
    export_model(tmp_path / "native", format="gguf", out=tmp_path / "m.gguf")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.gguf", "model", "native", "text.txt"]
    expected = logits(load_model(tmp_path / "native", dtype=torch.float32).model)
    found = logits(load_model(tmp_path / "m.gguf", dtype=torch.float32).model)
    rounded_to(found, expected, 1e-5)  # float32 as asked for: nothing is rounded to the file's default, bfloat16
    assert load_model(tmp_path / "m.gguf").model.dtype == torch.bfloat16
    assert record.result["bits_per_weight"] == 8.5


@pytest.mark.parametrize(("format", "place"), [("gguf", "token_embd"), ("gguf", "output"), ("native", "lm_head")])
def test_embedding_and_head_are_read_back_and_compared(format, place, tmp_path, monkeypatch):
    model = tiny_checkpoint("llama", tmp_path / "model")
    out = tmp_path / ("m.gguf" if format == "gguf" else "m")
    settings = {"method": "rtn", "scheme": "q8_0", "embeddings": "q8_0", "head": "q8_0", "format": format}
    assert quantize(model, out, **settings).result["verified"] == 14  # linears

    def damage(name, array):
        return array ^ 1 if place in name and array.dtype in (np.uint8, torch.uint8) else array

    whole, add = gguf_file._array, ShardWriter.add
    names = {"model.embed_tokens.weight": "token_embd", "lm_head.weight": "output"}

    def damaged(name, value, config):
        array, kind = whole(name, value, config)
        return damage(names.get(name, ""), array), kind

    monkeypatch.setattr(gguf_file, "_array", damaged)
    monkeypatch.setattr(ShardWriter, "add", lambda self, name, tensor: add(self, name, damage(name, tensor)))
    with pytest.raises(ToolkitError, match=r"embed_tokens|lm_head"):
        quantize(model, out, overwrite=True, **settings)


def test_embeddings_behind_which_a_norm_stands(tmp_path):
    model = tiny_checkpoint("bloom", tmp_path / "model")
    settings = {"method": "rtn", "scheme": "w4a16-g32", "format": "native"}
    plain = quantize(model, tmp_path / "plain", **settings)
    small = quantize(model, tmp_path / "small", embeddings="w8a16-g32", **settings)
    stored = load_file(tmp_path / "small" / "model.safetensors")
    assert stored["transformer.word_embeddings.codes"].dtype == torch.uint8
    assert small.result["bytes"] < plain.result["bytes"]
    expected, found = (logits(load_model(tmp_path / n, dtype=torch.float32).model) for n in ("plain", "small"))
    assert 0 < (found - expected).abs().max() < 0.05 * expected.abs().max()


def test_transformers_reads_what_we_write(tmp_path):
    model = tiny_checkpoint("llama", tmp_path / "model")
    quantize(model, tmp_path / "m.gguf", method="gptq", scheme="q4_0", format="gguf", embeddings="float", head="float")
    quantize(model, tmp_path / "native", method="gptq", scheme="q4_0", format="native")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32)
    ours = load_model(tmp_path / "native", dtype=torch.float32)
    rounded_to(logits(theirs), logits(ours.model), 1e-5)


def test_k_quants_run_alike_from_native_and_as_written(tmp_path):
    record = quantize(Path(DEMO_FOLDER), tmp_path / "native", method="rtn", scheme="q3_k", format="native")
    assert record.result["bits_per_weight"] == 3.4375
    stored = load_file(tmp_path / "native" / "model.safetensors")
    size = sum(t.nbytes for n, t in stored.items() if ".layers." in n and not n.endswith("norm.weight"))
    weights = record.result["quantized_weights"]
    assert 8 * size / weights == pytest.approx(3.5625)  # scales have 8 bits there, not 6
    export_model(tmp_path / "native", format="gguf", out=tmp_path / "m.gguf", embeddings="float")
    ours = load_model(tmp_path / "native", dtype=torch.float32).model
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32)
    rounded_to(logits(theirs), logits(ours), 1e-5)
    assert "reference x 21" in load_model(tmp_path / "native").path


def test_learned_rounding_of_k_quants_reaches_the_file(tmp_path):
    """The file holds what the record's last loss is about: it is nearer to the float model than that of the start."""
    divergence = {}
    for method in ("gptq", "gptq+signround", "gptaq"):
        out = tmp_path / f"{method}.gguf"
        settings = {"method": method, "scheme": "q2_k", "format": "gguf", "embeddings": "float"}
        record = quantize(Path(DEMO_FOLDER), out, samples=16, seq_len=64, **settings)
        result = ptq.evaluate(out, reference="demo", dataset=str(tmp_path / "text.txt"), seq_len=64, max_windows=16)
        divergence[method] = result.divergence.kl_mean
        notes = [linear.notes for linear in record.linears]
        first, last = (sum(n.get(f"signround.{which}_loss", 0.0) for n in notes) for which in ("first", "last"))
        assert last < first or "signround" not in method
    assert divergence["gptq+signround"] < 0.9 * divergence["gptq"] and divergence["gptaq"] != divergence["gptq"]


def test_reports_lie_beside_the_file_and_the_score_is_of_the_file(tmp_path):
    model = tiny_checkpoint("llama", tmp_path / "model")
    text = text_file(tmp_path)
    record = quantize(model, tmp_path / "m.gguf", method="rtn", scheme="q8_0", format="gguf", evaluate=str(text))
    names = {p.name for p in tmp_path.iterdir()} - {"model", "text.txt"}
    assert names == {"m.gguf", "m.report.html", "m.report.json"}
    assert json.loads((tmp_path / "m.report.json").read_text())["result"]["format"] == "gguf"
    float_model, result = record.evaluations
    assert result.perplexity == pytest.approx(float_model.perplexity, rel=0.01)


def test_the_tokenizer_survives(tmp_path):
    quantize(Path(DEMO_FOLDER), tmp_path / "m.gguf", method="rtn", scheme="q8_0", format="gguf")
    text = TEXT + " it's 12345 ünïcode\n\n\n  <|endoftext|>"
    ours = AutoTokenizer.from_pretrained(DEMO_FOLDER)
    assert load_tokenizer(locate(tmp_path / "m.gguf"))(text)["input_ids"] == ours(text)["input_ids"]
    keys = tokenizer_keys(Path(DEMO_FOLDER), 1024)
    assert keys["tokenizer.ggml.pre"] == "gpt-2"
    assert keys["tokenizer.ggml.bos_token_id"] == ours.bos_token_id
    assert len(keys["tokenizer.ggml.tokens"]) == len(keys["tokenizer.ggml.token_type"]) == 1024


@pytest.mark.parametrize("name", [*PATTERNS, "gpt-2", "smollm"])
def test_pre_tokenizers_have_their_names(name):
    from tokenizers import Tokenizer, models

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer(name)
    assert pre_name(json.loads(tokenizer.to_str())["pre_tokenizer"]) == name


def test_other_pre_tokenizers_have_none():
    assert pre_name(None) is None
    assert pre_name({"type": "Whitespace"}) is None
    assert pre_name({"type": "ByteLevel", "add_prefix_space": True}) is None
    split = {"type": "Split", "pattern": {"Regex": r"\s+"}, "behavior": "Isolated", "invert": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    assert pre_name({"type": "Sequence", "pretokenizers": [split, level]}) is None


def test_byte_level_without_merges_is_refused(tmp_path):
    """llama.cpp reads no such file."""
    data = json.loads((Path(DEMO_FOLDER) / "tokenizer.json").read_text())
    data["model"]["merges"] = []
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(ToolkitError, match="no merges"):
        tokenizer_keys(tmp_path, 1024)


def test_sentencepiece_is_read_without_its_package(tmp_path):
    def piece(text: str, score: float, kind: int) -> bytes:
        raw = text.encode()
        body = b"\x0a" + bytes([len(raw)]) + raw + b"\x15" + struct.pack("<f", score) + b"\x18" + bytes([kind])
        return b"\x0a" + bytes([len(body)]) + body

    pieces = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("▁the", -1.5, 1), ("<0x0A>", 0.0, 6)]
    (tmp_path / "tokenizer.model").write_bytes(b"".join(piece(*p) for p in pieces) + b"\x12\x02\x08\x01")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "unk_token": "<unk>"}))
    keys = tokenizer_keys(tmp_path, 6)
    assert keys["tokenizer.ggml.tokens"] == ["<unk>", "<s>", "▁the", "<0x0A>", "[PAD4]", "[PAD5]"]
    assert keys["tokenizer.ggml.token_type"] == [2, 3, 1, 6, 5, 5]
    assert keys["tokenizer.ggml.scores"][2] == -1.5
    assert (keys["tokenizer.ggml.bos_token_id"], keys["tokenizer.ggml.add_bos_token"]) == (1, True)
    (tmp_path / "tokenizer.model").write_bytes(b"\x0a\x50abc")
    with pytest.raises(ToolkitError, match="not a SentencePiece model"):
        tokenizer_keys(tmp_path, 6)


def test_the_tokenizer_of_another_file(tmp_path):
    model = tiny_checkpoint("llama", tmp_path / "model")
    quantize(model, tmp_path / "a.gguf", method="rtn", scheme="q8_0", format="gguf")
    (model / "tokenizer.json").unlink()
    with pytest.raises(ToolkitError, match=r"neither tokenizer\.json nor tokenizer\.model"):
        quantize(model, tmp_path / "b.gguf", method="rtn", scheme="q8_0", format="gguf")
    assert not list(tmp_path.glob("b*"))
    quantize(model, tmp_path / "b.gguf", method="rtn", scheme="q8_0", format="gguf", metadata=tmp_path / "a.gguf")
    ids = [load_tokenizer(locate(tmp_path / f"{name}.gguf"))("a line")["input_ids"] for name in "ab"]
    assert ids[0] == ids[1]


@pytest.mark.parametrize(
    ("family", "settings", "message"),
    [
        ("llama", {"scheme": "w3a16-g32"}, "has no type in 'gguf'"),
        ("llama", {"scheme": "w8a16-g32-asym"}, "has no type in 'gguf'"),
        ("opt", {}, "is not written to 'gguf'"),
        ("llama", {"scheme": "w8a8"}, "has quantized inputs"),
        ("llama", {"scheme": "w4a16-g32-asym_float"}, "has no type in 'gguf'"),
        ("llama", {"method": "awq+scap", "target": 0.5}, "makes activation thresholds"),
        ("llama", {"embeddings": "q6_k"}, "not a multiple of the 256"),
        ("llama-tied-bias", {"head": "q4_0", "embeddings": "q8_0", "format": "native"}, "is tied to the embedding"),
        ("gemma3", {}, "another pattern of windows"),
        ("llama-tied-bias", {}, "no biases in the feed-forward part"),
    ],
)
def test_what_gguf_does_not_hold(family, settings, message, tmp_path):
    model = tiny_checkpoint(family, tmp_path / "model")
    with pytest.raises(PlanError) as caught:
        quantize(model, tmp_path / "m.gguf", **{"method": "rtn", "scheme": "q8_0", "format": "gguf", **settings})
    assert message in str(caught.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "text.txt"]


def test_k_quants_have_no_place_elsewhere_and_few_passes_know_them(tmp_path):
    for settings, message in (
        ({"method": "rtn", "format": "compressed-tensors"}, "is a K-quant"),
        ({"method": "adaquant", "format": "native"}, "does not know K-quants"),
        ({"method": "hqq+rtn", "format": "native"}, "does not know K-quants"),
    ):
        with pytest.raises(PlanError, match=message):
            quantize(Path(DEMO_FOLDER), tmp_path / "out", scheme="q4_k", **settings)


def test_rows_that_a_k_quant_does_not_divide_get_a_smaller_block_and_it_is_said(tmp_path):
    model = tiny_checkpoint("llama", tmp_path / "model", hidden_size=64, intermediate_size=256)
    words = ["quantize", model, "--method", "rtn", "--scheme", "q3_k", "--format", "gguf", "--out", tmp_path / "m.gguf"]
    said = " ".join(run_ptq(*words).out.split())
    asked = "q4_0 where the 256 weights of a block of q3_k do not divide 64 inputs: "
    assert f"{asked}q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj" in said
    tensors = gguf.GGUFReader(tmp_path / "m.gguf").tensors
    kinds = {t.name.split(".")[2]: t.tensor_type.name for t in tensors if t.name.startswith("blk")}
    assert (kinds["attn_q"], kinds["ffn_down"]) == ("Q4_0", "Q3_K")
    words[1] = tiny_checkpoint("llama", tmp_path / "odd", hidden_size=72, head_dim=32, intermediate_size=256)
    message = refused(*words, "--overwrite")
    assert "72 input columns are not a multiple of group size 256" in message


def test_bad_input_is_refused_in_a_sentence(tmp_path):
    model = tiny_checkpoint("llama", tmp_path / "model")
    words = ["quantize", model, "--method", "rtn", "--scheme", "q8_0"]
    assert "gguf is one file" in refused(*words, "--format", "gguf", "--out", tmp_path / "folder")
    assert "format native is a folder" in refused(*words, "--format", "native", "--out", tmp_path / "m.gguf")
    assert run_ptq(*words, "--format", "gguf", "--out", tmp_path / "m.gguf").code == 0
    assert "is there already" in refused(*words, "--format", "gguf", "--out", tmp_path / "m.gguf")
    data = (tmp_path / "m.gguf").read_bytes()
    nameless = data.replace(b"general.architecture", b"general.architecturf")
    damaged = {"short": data[: len(data) // 2], "magic": b"GGML" + data[4:], "empty": b"", "nameless": nameless}
    for name, content in damaged.items():
        (tmp_path / f"{name}.gguf").write_bytes(content)
        assert "not readable as GGUF" in refused("eval", tmp_path / f"{name}.gguf")
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    tokenizer["pre_tokenizer"] = {"type": "Whitespace"}
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert "--metadata FROM.gguf" in refused(*words, "--format", "gguf", "--out", tmp_path / "n.gguf")
    assert not list(tmp_path.glob("n.*"))


def test_other_versions_and_missing_tensors_are_named(tmp_path, monkeypatch):
    model = tiny_checkpoint("llama", tmp_path / "model")
    settings = {"method": "rtn", "scheme": "q8_0", "format": "gguf"}
    quantize(model, tmp_path / "m.gguf", **settings)
    data = (tmp_path / "m.gguf").read_bytes()
    for name, version in (("new", (4).to_bytes(4, "little")), ("big", (3).to_bytes(4, "big"))):
        (tmp_path / f"{name}.gguf").write_bytes(data[:4] + version + data[8:])
        message = refused("eval", tmp_path / f"{name}.gguf")
        assert ("version 4 of GGUF" if name == "new" else "big-endian") in message and "versions 2 and 3" in message
    entries = gguf_file._entries
    for i, lost in enumerate(("layers.1.mlp.down_proj.weight", "layers.0.input_layernorm.weight", "model.norm.weight")):
        kept = lambda *words, lost=lost: ((n, value) for n, value in entries(*words) if not n.endswith(lost))  # noqa: E731
        monkeypatch.setattr(gguf_file, "_entries", kept)
        monkeypatch.setattr(write, "verify_file", lambda *_: 0)
        quantize(model, tmp_path / f"{i}.gguf", **settings)
        text = ("--dataset", tmp_path / "text.txt")
        for words in (("eval", *text), ("quantize", *text, "--method", "rtn", "--out", tmp_path / "out")):
            message = refused(words[0], tmp_path / f"{i}.gguf", *words[1:])
            assert lost.removesuffix(".weight") in message, message
            assert not (tmp_path / "out").exists()


def test_a_gguf_file_is_quantized_like_any_model(tmp_path):
    model = tiny_checkpoint("llama", tmp_path / "model")
    quantize(model, tmp_path / "m.gguf", method="rtn", scheme="q8_0", format="gguf")
    quantize(tmp_path / "m.gguf", tmp_path / "again", method="gptq", scheme="w4a16-g32", format="native")
    found = logits(load_model(tmp_path / "again", dtype=torch.float32).model)
    assert found.shape[:2] == IDS.shape and bool(torch.isfinite(found).all())


def test_llama_3_frequencies(tmp_path):
    rope = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    model = tiny_checkpoint("llama", tmp_path / "model")
    edit_config(model, rope_parameters={**rope, "original_max_position_embeddings": 32})
    from ptq.formats.gguf_model import rotary_factors

    config = json.loads((model / "config.json").read_text())
    network = AutoModelForCausalLM.from_pretrained(model).model.rotary_emb
    plain = 1 / 500.0 ** (torch.arange(0, 16, 2) / 16)
    assert torch.allclose(plain / network.inv_freq, rotary_factors(config), rtol=1e-5)
