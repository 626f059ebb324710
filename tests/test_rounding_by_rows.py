"""Rounding without calibration text looks at a weight some rows at a time, and makes no float32 copy of it."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import pytest
import torch

from calibration.errors import ToolkitError
from calibration.model import contents
from calibration.model.checkpoint import CheckpointReader, save_tensors
from calibration.walk.masters import Masters
from ptq.api.running import quantize
from ptq.committed import NATIVE, CommittedBlocks
from ptq.formats.native import ORDER
from ptq.methods.rounding import relative_errors
from ptq.methods.rtn import round_to_nearest
from ptq.numerics.objective import relative_energy
from ptq.scheme import parse_scheme

CPU = torch.device("cpu")
SCHEMES = [
    "w4a16-g64-sym",
    "w4a16-g128-asym",
    "w3a16-ic64-asym",
    "w8a16-gchannel",
    "w2a16-gtensor",
    "w4a16-g64-asym_float",
]
SCHEMES += ["mxfp4", "fp4-e2m1-g128", "fp8-e4m3fn-gblock", "q4_k", "q3_k"]


def weight(rows: int = 512, columns: int = 768) -> torch.Tensor:
    """bfloat16 ``[rows, columns]``, several chunks of rows."""
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(3)).to(torch.bfloat16)


@pytest.mark.parametrize("text", SCHEMES)
def test_rows_of_16_bits_round_as_the_float32_matrix_does(text):
    w, scheme = weight(), parse_scheme(text)
    found, expected = round_to_nearest(w, scheme), round_to_nearest(w.float(), scheme)
    for name in ("codes", "scale", "zero", "super_scale", "super_min"):
        a, b = getattr(found, name), getattr(expected, name)
        assert (a is None and b is None) or torch.equal(a, b), name
    whole = expected.dequantize()
    rows = found.by_rows()
    assert all(torch.equal(rows(slice(i, i + 96)), whole[i : i + 96]) for i in range(0, 480, 96))
    error = relative_energy(w, rows, torch.float32)
    assert error == relative_errors(w.float(), whole, None)["weight"]
    assert error == pytest.approx(float((whole - w.float()).square().sum() / w.float().square().sum()), rel=1e-4)


def test_masters_are_read_once_and_made_when_asked_for():
    reads: list[str] = []
    stored = {name: weight(8, 8) for name in ("a", "b", "c")}

    def read(name: str) -> torch.Tensor:
        reads.append(name)
        return stored[name]

    masters = Masters({name: partial(read, name) for name in stored}, CPU, torch.float32)
    assert list(masters) == ["a", "b", "c"] and "a" in masters and reads == []
    assert masters.exact("a") is stored["a"] and masters.exact("a").dtype == torch.bfloat16
    held = masters["a"]
    assert torch.equal(held, stored["a"].float()) and masters.exact("a") is held
    masters.overwrite("a", lambda: torch.ones(8, 8))
    assert masters["a"] is held and bool((held == 1).all()), "who holds a master sees what it becomes"
    masters.overwrite("b", lambda: torch.full((8, 8), 2.0))
    assert bool((masters["b"] == 2).all()) and masters.exact("b") is masters["b"] and reads == ["a"]
    assert Masters({"c": partial(read, "c")}, CPU, torch.float64).exact("c").dtype == torch.float64
    masters["d"] = held
    del masters["c"]
    assert list(masters) == ["a", "b", "d"]
    masters.clear()
    assert len(masters) == 0


def test_rounding_makes_no_float32_copy_of_a_block(tmp_path, monkeypatch):
    asked: set[str] = set()
    original = Masters.__getitem__

    def watched(self: Masters, name: str) -> torch.Tensor:
        asked.add(name)
        return original(self, name)

    monkeypatch.setattr(Masters, "__getitem__", watched)
    quantize("demo", method="rtn", scheme="w4a16-g64-sym", format="native", out=tmp_path / "out")
    assert asked == {"input_layernorm.weight", "post_attention_layernorm.weight"}


@pytest.mark.parametrize("text", [*SCHEMES, "nvfp4"])
def test_stored_blocks_are_what_decoding_and_encoding_them_gives(tmp_path, text):
    """An output in the native layout takes the tensors of committed blocks as they are."""
    parts = {"lora_scale": torch.ones(2), "lora_b": torch.ones(512, 2), "lora_a": torch.ones(2, 768)}
    tensors, linears = {"norm.weight": torch.ones(8)}, []
    for name in ("z", "a"):
        q = round_to_nearest(weight(), parse_scheme(text))
        encoded = NATIVE.encode(q, torch.bfloat16) | (parts if name == "a" else {})
        assert [s for s in ORDER if s in encoded] == [
            *NATIVE.encode(q, torch.bfloat16),
            *sorted(encoded.keys() & parts),
        ]
        tensors |= {f"{name}.{suffix}": tensor for suffix, tensor in encoded.items()}
        linears.append(SimpleNamespace(name=name, scheme=q.scheme, shape=q.shape))
    save_tensors(tmp_path / "block.safetensors", tensors)
    blocks = CommittedBlocks([tmp_path / "block.safetensors"], SimpleNamespace(quantized=linears))  # type: ignore[arg-type]
    advanced: list[str] = []
    ((none, found),) = blocks.stored(advanced.append)
    ((quantized, others),) = blocks.blocks()
    expected = dict(others)
    for name, q in quantized.items():
        expected |= {f"{name}.{suffix}": tensor for suffix, tensor in NATIVE.encode(q, torch.bfloat16).items()}
    assert none == {} and list(found) == list(expected) and advanced == ["z", "a"]
    assert all(found[n].dtype == t.dtype and torch.equal(found[n], t) for n, t in expected.items())


def test_weights_are_checked_in_pieces(tmp_path, monkeypatch):
    w = weight(16, 24)
    tensors = {"a": w, "b": torch.arange(5), "c": torch.zeros(0, 4), "d": torch.tensor(torch.inf)}
    save_tensors(tmp_path / "m.safetensors", tensors)
    digest = contents.check_weights(CheckpointReader.of_file(tmp_path / "m.safetensors"))
    monkeypatch.setattr(contents, "PIECE_BYTES", 40)
    assert contents.check_weights(CheckpointReader.of_file(tmp_path / "m.safetensors")) == digest
    w[0, 3] = w[15, 23] = torch.nan
    w[7, 0] = torch.inf
    save_tensors(tmp_path / "bad.safetensors", tensors)
    with pytest.raises(ToolkitError, match=r"a in bad\.safetensors: 3 of 384 values are NaN or Inf"):
        contents.check_weights(CheckpointReader.of_file(tmp_path / "bad.safetensors"))
    assert digest != contents.check_weights(_changed(tmp_path, tensors))


def _changed(folder, tensors: dict[str, torch.Tensor]) -> CheckpointReader:
    """A file whose last value of "a" is another one."""
    changed = weight(16, 24)
    changed[15, 23] += 1
    save_tensors(folder / "other.safetensors", tensors | {"a": changed})
    return CheckpointReader.of_file(folder / "other.safetensors")
