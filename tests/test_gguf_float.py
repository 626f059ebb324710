"""GGUF files of float models, places where no file can be written, and tables of tensors that cannot be right."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from command import done, refused, run_ptq, snapshot
from tiny_runs import edit_config, logits, quantize, rewrite, tiny_checkpoint

import ptq
from calibration.errors import ToolkitError
from calibration.model.gguf import let_go, open_file
from ptq.formats import gguf_file
from ptq.runtime.load import load_model


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def kinds(file: Path) -> dict[str, str]:
    return {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(file).tensors}


@pytest.mark.parametrize(
    ("family", "dtype", "matrices", "file_type"),
    [
        ("llama", torch.bfloat16, "BF16", 32),
        ("llama-tied-bias", torch.float16, "F16", 1),
        ("qwen3", torch.float32, "F32", 0),
        ("gemma2", torch.bfloat16, "BF16", 32),
        ("phi3", torch.float32, "F32", 0),
    ],
)
def test_a_float_model_in_its_own_dtype(family, dtype, matrices, file_type, tmp_path):
    changes = {"llama-tied-bias": {"mlp_bias": False}, "phi3": {"partial_rotary_factor": 0.5}}.get(family, {})
    model = tiny_checkpoint(family, tmp_path / "model", dtype, **changes)
    said = done("export", model, "--format", "gguf", "--out", tmp_path / "m.gguf")
    assert "as floats; every tensor read back and compared" in said
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    for tensor in reader.tensors:
        assert tensor.tensor_type.name == (matrices if len(tensor.shape) == 2 else "F32"), tensor.name
    assert reader.fields["general.file_type"].contents() == file_type
    assert "general.quantized_by" not in reader.fields
    assert ("output.weight" in kinds(tmp_path / "m.gguf")) == (family in ("llama", "qwen3", "phi3"))
    expected, found = (logits(load_model(path, dtype=torch.float32).model) for path in (model, tmp_path / "m.gguf"))
    assert (found - expected).abs().max() <= (2e-3 if dtype == torch.bfloat16 else 1e-5) * expected.abs().max()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.gguf", "model"]


def test_embedding_and_head_of_a_float_model_are_quantized_when_asked(tmp_path):
    model = tiny_checkpoint("llama", tmp_path / "model", torch.bfloat16)
    ptq.export(model, format="gguf", out=tmp_path / "m.gguf", head="q8_0")
    found = kinds(tmp_path / "m.gguf")
    assert (found["token_embd.weight"], found["output.weight"]) == ("BF16", "Q8_0")
    assert found["blk.0.ffn_up.weight"] == "BF16"
    tied = tiny_checkpoint("llama", tmp_path / "tied", torch.bfloat16, tie_word_embeddings=True)
    ptq.export(tied, format="gguf", out=tmp_path / "t.gguf", head="q4_0")
    assert kinds(tmp_path / "t.gguf")["token_embd.weight"] == "Q4_0"


def test_every_float_tensor_is_compared(tmp_path, monkeypatch):
    model = tiny_checkpoint("llama", tmp_path / "model", attention_bias=True)
    whole = gguf_file._array
    for place in ("embed_tokens", "layers.1.self_attn.q_proj.bias", "layers.0.input_layernorm", "layers.1.mlp.up_proj"):

        def damaged(name, value, config, place=place):
            array, kind = whole(name, value, config)
            return (array + np.float32(1) if place in name else array), kind

        monkeypatch.setattr(gguf_file, "_array", damaged)
        with pytest.raises(ToolkitError, match=r"reads back from model\.gguf as other weights") as caught:
            ptq.export(model, format="gguf", out=tmp_path / "m.gguf")
        assert place in str(caught.value)
        assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_only_gguf_is_made_of_floats_and_of_a_file_the_floats_it_stands_for(tmp_path):
    model = tiny_checkpoint("llama", tmp_path / "model", torch.bfloat16)
    message = refused("export", model, "--format", "native", "--out", tmp_path / "out")
    assert "a float checkpoint" in message and "makes GGUF files of float ones" in message
    quantize(model, tmp_path / "q.gguf", method="rtn", scheme="q4_0", format="gguf")
    message = refused("export", tmp_path / "q.gguf", "--format", "native", "--out", tmp_path / "out")
    assert f"{tmp_path / 'q.gguf'}: a float checkpoint" in message
    done("export", tmp_path / "q.gguf", "--format", "gguf", "--out", tmp_path / "f.gguf")
    assert kinds(tmp_path / "f.gguf")["blk.0.attn_q.weight"] == "BF16"
    expected, found = (logits(load_model(tmp_path / f"{name}.gguf").model.float()) for name in "qf")  # as bfloat16
    assert torch.equal(found, expected)

    def broken(tensors):
        tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = torch.nan
        return tensors

    rewrite(model, broken)
    assert "model.layers.1.mlp.up_proj.weight" in refused(
        "export", model, "--format", "gguf", "--out", tmp_path / "n.gguf"
    )
    assert not list(tmp_path.glob("n.*"))


def test_what_llama_cpp_would_rotate_otherwise(tmp_path):
    factors = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "factor": 2.0}
    phi = tiny_checkpoint("phi3", tmp_path / "phi")
    edit_config(phi, rope_parameters={**factors, "rope_theta": 1e4, "original_max_position_embeddings": 32})
    qwen = edit_config(tiny_checkpoint("qwen3", tmp_path / "qwen"), partial_rotary_factor=0.5)
    for model, what in ((phi, "rope_type 'longrope' is not written"), (qwen, "rotates whole heads")):
        assert what in refused("export", model, "--format", "gguf", "--out", tmp_path / "m.gguf")
        assert not list(tmp_path.glob("m.gguf*"))


def test_places_where_one_file_cannot_be(tmp_path):
    model = tiny_checkpoint("llama", tmp_path / "model")
    words = ("export", model, "--format", "gguf", "--out")
    (tmp_path / "d.gguf").mkdir()
    (tmp_path / "null.gguf").symlink_to("/dev/null")
    before = snapshot(tmp_path)
    for name, what in (("d.gguf", "is a folder"), ("null.gguf", "is no regular file")):
        for more in ((), ("--overwrite",)):
            assert what in refused(*words, tmp_path / name, *more)
    assert "format float is a folder" in refused("export", model, "--format", "float", "--out", tmp_path / "f.gguf")
    assert not Path("/dev/null").is_file()
    assert snapshot(tmp_path) == before
    done(*words, tmp_path / "M.GGUF")
    assert run_ptq("inspect", tmp_path / "M.GGUF").code == 0


def test_the_file_that_is_read_is_not_replaced(tmp_path):
    model = tiny_checkpoint("llama", tmp_path / "model")
    done("export", model, "--format", "gguf", "--out", tmp_path / "m.gguf")
    data = (tmp_path / "m.gguf").read_bytes()
    for words in (("export",), ("quantize", "--method", "rtn", "--scheme", "q4_0")):
        settings = ("--format", "gguf", "--out", tmp_path / "m.gguf", "--overwrite")
        assert "the model that is read" in refused(words[0], tmp_path / "m.gguf", *words[1:], *settings)
    assert (tmp_path / "m.gguf").read_bytes() == data


def test_a_report_goes_with_the_file_it_tells_of(tmp_path):
    model = tiny_checkpoint("llama", tmp_path / "model")
    quantize(model, tmp_path / "m.gguf", method="rtn", scheme="q4_0", format="gguf")
    assert (tmp_path / "m.report.json").is_file()
    done("export", model, "--format", "gguf", "--out", tmp_path / "m.gguf", "--overwrite")
    assert not list(tmp_path.glob("m.report.*"))


def changed(file: Path, to: Path, tensor: str | None, part: int, value: int, key: str = "") -> Path:
    """A copy with one number of the table of tensors, or of the settings, replaced; ``part`` as `gguf` counts them."""
    reader = gguf.GGUFReader(file)
    field = reader.fields[key] if key else next(t.field for t in reader.tensors if t.name == tensor)
    number = field.parts[part]
    start = number.ctypes.data - reader.data.ctypes.data
    data = file.read_bytes()
    to.write_bytes(data[:start] + value.to_bytes(number.nbytes, "little") + data[start + number.nbytes :])
    return to


def test_numbers_of_the_header_that_cannot_be(tmp_path):
    model = tiny_checkpoint("llama", tmp_path / "model")
    ptq.export(model, format="gguf", out=tmp_path / "m.gguf")
    whole = tmp_path / "m.gguf"
    heads = changed(whole, tmp_path / "heads.gguf", None, 3, 1, key="llama.attention.head_count_kv")
    message = refused("inspect", heads)
    assert f"{heads}: blk.0.attn_k.weight has 32 rows, the settings of its heads say 16" in message
    offset = changed(whole, tmp_path / "offset.gguf", "blk.1.attn_k.weight", 5, 0)
    assert "blk.1.attn_k.weight lies at byte" in refused("inspect", offset)
    blocks = changed(whole, tmp_path / "blocks.gguf", None, 3, 1, key="llama.block_count")
    assert f"{blocks}: counts 1 layers, the checkpoint stores 2" in refused("inspect", blocks)
    (tmp_path / "name.gguf").write_bytes(whole.read_bytes().replace(b"blk.1.ffn_gate.weight", b"blk.1.ffn_gata.weight"))
    message = refused("inspect", tmp_path / "name.gguf")
    assert f"{tmp_path / 'name.gguf'}: tensor 'blk.1.ffn_gata.weight' is not known" in message
    config = json.loads((model / "config.json").read_text())
    assert (config["num_key_value_heads"], config["num_hidden_layers"]) == (2, 2)


def resident_file_bytes() -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssFile"))
    return 1024 * int(line.split()[1])


def test_pages_that_were_read_are_given_back(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tensor("w", np.ones((16, 1 << 20), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    reader = open_file(tmp_path / "m.gguf")
    before = resident_file_bytes()
    assert reader.tensors[0].data.sum() == 16 << 20
    assert resident_file_bytes() - before > 60e6
    let_go(reader)
    assert resident_file_bytes() - before < 5e6
    assert reader.tensors[0].data.sum() == 16 << 20


def test_a_family_without_gguf_is_not_sent_to_formats_that_floats_have_not(tmp_path):
    message = refused(
        "export", tiny_checkpoint("gpt2", tmp_path / "m"), "--format", "gguf", "--out", tmp_path / "m.gguf"
    )
    assert "model_type gpt2: is not written to 'gguf'" in message and "run `ptq quantize` on it" in message
    assert "native" not in message
