"""Whole runs on grids of floats, their native files, and what refuses them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from command import done, refused, text_file, tiny
from safetensors.torch import load_file
from test_cli import codes

from calibration.record import read_record
from ptq.formats.native import Native
from ptq.formats.readback import compare
from ptq.formats.registry import FORMATS
from ptq.methods.rtn import round_to_nearest
from ptq.runtime.load import load_model
from ptq.scheme import parse_scheme

FAST = ("--samples", "3", "--seq-len", "24")
SCHEMES = ("fp4-e2m1-g32", "fp6-e3m2-gchannel", "fp8-e4m3-ic32", "mxfp4", "nvfp4")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("floats")
    text_file(folder / "text.txt")
    tiny(folder / "llama", intermediate_size=128, num_key_value_heads=4)
    return folder


def words(place: Path, method: str, scheme: str, *more: str | Path, out: str = "run") -> list[str | Path]:
    run = ["quantize", place / "llama", "--method", method, "--scheme", scheme, *FAST]
    return [*run, "--dataset", place / "text.txt", "--format", "native", "--out", place / out, "--overwrite", *more]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("method", ["rtn", "gptq", "awq+gptq", "rtn-ada"])
def test_runs(place, method, scheme):
    out = done(*words(place, method, scheme))
    assert "read back and compared" in out
    found = codes(place / "run")
    assert scheme in {str(q.scheme) for q in found.values()}
    loaded = load_model(place / "run", dtype=torch.float32)
    assert loaded.kernels == {"reference": 14}
    for name, q in found.items():
        x = torch.randn(5, q.shape[1], generator=torch.Generator().manual_seed(0))
        expected = torch.nn.functional.linear(x, q.dequantize())
        assert torch.allclose(loaded.model.get_submodule(name)(x), expected, atol=1e-5)
    reasons = {reason for _, reason in load_model(place / "run", dtype=torch.bfloat16).reasons}
    assert any("integers, not e" in reason for reason in reasons)
    record = read_record(place / "run")
    stored = sum(
        t.numel() * t.element_size()
        for n, t in load_file(place / "run" / "model.safetensors").items()
        if n.rpartition(".")[2] in Native.suffixes
    )
    weights = sum(q.codes.numel() for q in found.values())
    assert record.result["bits_per_weight"] == pytest.approx(8 * stored / weights, rel=1e-6)
    assert "float weights" in (place / "run" / "report.html").read_text()


def test_linears_of_one_input_share_the_global_scale(place):
    done(*words(place, "gptq", "nvfp4"))
    found = {name: float(q.global_scale) for name, q in codes(place / "run").items()}
    for block in range(2):
        prefix = f"model.layers.{block}"
        assert len({found[f"{prefix}.self_attn.{n}_proj"] for n in "qkv"}) == 1
        assert found[f"{prefix}.mlp.gate_proj"] == found[f"{prefix}.mlp.up_proj"] != found[f"{prefix}.mlp.down_proj"]


@pytest.mark.parametrize("scheme", [*SCHEMES, "fp5-e1m3-g64", "fp7-e2m4-g32", "fp8-e5m2-g128"])
def test_native_round_trip(scheme):
    """decode(encode(q)) is q to the bit, and the independent reader agrees; a flipped bit is seen."""
    parsed = parse_scheme(scheme)
    w = torch.randn(64, 128, generator=torch.Generator().manual_seed(1)) * torch.logspace(-9, 9, 64)[:, None]
    w[5] = 0
    q = round_to_nearest(w, parsed)
    tensors = Native().encode(q, torch.bfloat16)
    back = Native().decode(tensors, parsed, (64, 128))
    for name in ("codes", "scale", "global_scale"):
        first, second = getattr(q, name), getattr(back, name)
        assert (first is None and second is None) or torch.equal(first, second)
    compare("linear", q, "native", tensors)
    for suffix, tensor in tensors.items():
        broken = tensor.clone()
        broken.view(torch.uint8).view(-1)[0] ^= 8
        with pytest.raises(Exception, match="reads back as"):
            compare("linear", q, "native", {**tensors, suffix: broken})


@pytest.mark.parametrize("name", ["awq", "gptq", "gptq_v2"])
@pytest.mark.parametrize("scheme", ["fp4-e2m1-g32", "mxfp4"])
def test_integer_formats_refuse(place, name, scheme):
    run = [w for w in words(place, "rtn", scheme) if w not in ("--format", "native")]
    message = refused(*run, "--format", name)
    assert f"the codes of {scheme} are floats" in message and "--format native" in message
    assert name in FORMATS


@pytest.mark.parametrize(
    ("scheme", "expected"),
    [
        ("fp4-e4m0", "use one of fp4-e3m0, fp4-e2m1, fp4-e1m2"),
        ("fp4-e2m2", "use one of fp4-e3m0"),
        ("fp8-e6m1", "is not a float scheme"),
        ("mxfp6", "did you mean 'mxfp"),
        ("fp4-e2m1-g48", "asks for group 'g48'"),
    ],
)
def test_names_that_are_no_scheme(place, scheme, expected):
    assert expected in refused(*words(place, "rtn", scheme))


def test_groups_of_a_hardware_format_that_do_not_divide(tmp_path, place):
    tiny(tmp_path / "odd", intermediate_size=72)
    message = refused("quantize", tmp_path / "odd", "--method", "rtn", "--scheme", "nvfp4", "--out", tmp_path / "out")
    assert "72 input columns are not a multiple of group size 16" in message and "fp4-e2m1-gchannel" in message
    recipe = tmp_path / "r.toml"
    recipe.write_text(
        'method = "rtn"\nscheme = "nvfp4"\n[[rule]]\nmatch = "*down_proj"\nscheme = "fp4-e2m1-gchannel"\n'
    )
    done("quantize", tmp_path / "odd", "--recipe", recipe, "--format", "native", "--out", tmp_path / "out")
