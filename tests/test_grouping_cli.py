"""Whole runs with groups along the outputs, asked for by scheme or chosen by AdaDim."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from command import done, products, refused, text_file, tiny
from test_cli import codes

from calibration.record import read_record
from calibration.walk.finished import FinishedBlocks
from ptq.formats.registry import FORMATS
from ptq.runtime.load import load_model

FAST = ("--samples", "3", "--seq-len", "24")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("grouping")
    text_file(folder / "text.txt")
    tiny(folder / "llama", intermediate_size=128, num_key_value_heads=4)
    tiny(folder / "gpt2", "gpt2")
    return folder


def words(place: Path, model: str, method: str, scheme: str, out: str) -> list[str | Path]:
    run = ["quantize", place / model, "--method", method, "--scheme", scheme, *FAST]
    return [*run, "--dataset", place / "text.txt", "--out", place / out, "--overwrite"]


@pytest.mark.parametrize("model", ["llama", "gpt2"])
@pytest.mark.parametrize("method", ["rtn-ada", "gptq-ada", "adadim-published", "awq+gptq-ada"])
def test_runs(place, model, method):
    """Axes end up mixed in the file, the reference kernel runs them, and the record names them."""
    out = done(*words(place, model, method, "w3a16-g32-asym", "run"))
    assert "format native (compressed-tensors cannot hold this model: " in out and "read back and compared" in out
    found = codes(place / "run")
    record = read_record(place / "run")
    assert {e.name: e.scheme for e in record.linears} == {n: str(q.scheme) for n, q in found.items()}
    axes = {q.scheme.weights.grouping.axis for q in found.values()}
    assert axes == {"in", "out"} or model == "gpt2" or "awq" in method  # random weights: balanced ones prefer "in"
    assert record.result["bits_per_weight"] == pytest.approx(3 + 19 / 32)
    for q in found.values():
        assert q.scale.shape == q.scheme.weights.grouping.scales(q.shape)
    loaded = load_model(place / "run", dtype=torch.float32)
    assert loaded.kernels == {"reference": len(found)}
    for name, q in found.items():
        path = name if model == "llama" else f"transformer.{name.removeprefix('transformer.')}"
        x = torch.randn(5, q.shape[1], generator=torch.Generator().manual_seed(0))
        linear = loaded.model.get_submodule(path)
        expected = torch.nn.functional.linear(x, q.dequantize())
        got = linear(x) - (0 if linear._buffers.get("bias") is None else linear.bias)
        assert torch.allclose(got, expected, atol=1e-5)
    bf16 = load_model(place / "run", dtype=torch.bfloat16)
    assert axes == {"in"} or any("along the outputs" in r or "outputs of a column" in r for _, r in bf16.reasons)
    assert done("generate", place / "run", "--prompt", "12", "--max-new-tokens", 3).startswith("12")
    assert axes == {"in"} or "32 output rows of a column" in (place / "run" / "report.html").read_text()


@pytest.mark.parametrize("scheme", ["w3a16-ic32-sym", "w4a16-icchannel-asym", "w8a16-ic64"])
@pytest.mark.parametrize("method", ["rtn", "gptq", "awq"])
def test_groups_along_the_outputs_by_scheme(place, method, scheme):
    done(*words(place, "llama", method, scheme, "ic"))
    found = codes(place / "ic")
    assert {q.scheme.weights.grouping.axis for q in found.values()} == {"out"}
    assert load_model(place / "ic").kernels == {"reference": 14}


@pytest.mark.parametrize("name", [n for n in FORMATS if n not in ("native", "gguf")])
def test_other_formats_refuse_and_say_what_works(place, name):
    for method, scheme in (("rtn", "w4a16-ic32-sym"), ("rtn-ada", "w4a16-g32-sym")):
        run = words(place, "llama", method, scheme, "refused")
        message = refused(*run, "--format", name)
        assert "has groups along its outputs" in message and "--format native" in message
        assert not (place / "refused").exists()
        done(*run, "--format", "native", "--dry-run")
    done(*words(place, "llama", "rtn", "w4a16-ic32-sym", "native"))
    assert "--format native" in refused("export", place / "native", "--format", name, "--out", place / "converted")


def test_groups_that_do_not_divide_the_outputs(place):
    message = refused(*words(place, "gpt2", "rtn", "w4a16-ic128-sym", "refused"))
    assert "64 output rows are not a multiple of group size 128" in message and "use group size 32 or 64" in message
    assert "icchannel (one step per input column)" in message
    done(*words(place, "gpt2", "rtn", "w4a16-icchannel-sym", "fixed"))


def test_a_killed_run_resumes_to_the_same_bytes(place, monkeypatch):
    """The axes chosen in finished blocks come back from their files."""
    run = words(place, "llama", "gptq-ada", "w3a16-g32-sym", "whole")
    done(*run)
    write = FinishedBlocks._write

    def killed(self, *args):
        write(self, *args)
        raise KeyboardInterrupt

    run[run.index(place / "whole")] = place / "killed"
    with monkeypatch.context() as patch:
        patch.setattr(FinishedBlocks, "_write", killed)
        with pytest.raises(AssertionError):
            done(*run)
    run.remove("--overwrite")
    done(*run, "--resume")
    assert products(place / "killed") == products(place / "whole")
