"""``ptq prepare``: a quantized model plus a trained low-rank part, written as a float checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from command import done, refused, text_file, tiny
from safetensors.torch import load_file
from tiny_runs import logits, plain_model

from calibration.model.opening import open_model
from ptq.preparation import LowRank, Training, trained_linears
from ptq.runtime.load import load_model

WORDS = ("--batch", "2", "--seq-len", "24", "--rank", "4")


@pytest.fixture(scope="module", params=["llama", "gpt2", "mixtral"])
def place(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prepare")
    text_file(folder / "text.txt")
    tiny(folder / "float", request.param)
    words = ["--scheme", "w2a16-g32", "--method", "rtn", "--format", "native"]
    done("quantize", folder / "float", *words, "--out", folder / "q")
    return folder


def prepare(place: Path, out: str, *words: str) -> str:
    return done("prepare", place / "q", "--dataset", place / "text.txt", *WORDS, *words, "--out", place / out)


def test_no_rate_to_speak_of_gives_the_quantized_model(place):
    prepare(place, "still", "--steps", "1", "--rate", "1e-12")
    still = logits(plain_model(place / "still", attn_implementation="sdpa"))
    expected = logits(load_model(place / "q", dtype=torch.float32).model)
    assert (still - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert "quantization_config" not in json.loads((place / "still/config.json").read_text())


def test_training_lowers_the_loss_and_changes_what_it_should(place):
    out = prepare(place, "p", "--steps", "30", "--rate", "1e-2")
    assert "float checkpoint written" in out
    record = json.loads((place / "p/preparation.json").read_text())
    assert record["last_loss"] < record["first_loss"] - 0.1 and record["rank"] == 4
    prepare(place, "again", "--steps", "30", "--rate", "1e-2")
    assert (place / "p/model.safetensors").read_bytes() == (place / "again/model.safetensors").read_bytes()
    before, after = load_file(place / "float/model.safetensors"), load_file(place / "p/model.safetensors")
    assert before.keys() == after.keys() and all(before[n].dtype == after[n].dtype for n in before)
    if not (place / "still").exists():
        prepare(place, "still", "--steps", "1", "--rate", "1e-12")
    start = load_file(place / "still/model.safetensors")
    moved = {n for n in start if (start[n] - after[n]).abs().max() > 1e-6}
    _, _, spec = open_model(place / "float")
    trained = {f"{n}.weight" for n in trained_linears(spec)}
    assert moved == trained and not any(n.endswith(("o_proj.weight", "attn.c_proj.weight")) for n in moved)
    for n in moved:
        difference = (after[n] - start[n]).double()
        assert torch.linalg.matrix_rank(difference, rtol=1e-3) <= 4


def test_the_result_can_be_quantized_again(place):
    prepare(place, "once", "--steps", "2")
    done("quantize", place / "once", "--scheme", "w2a16-g32", "--method", "rtn", "--out", place / "r")


def test_low_rank_part_and_schedule():
    part = LowRank(torch.nn.Linear(8, 6, bias=False), (6, 8), Training(rank=2, dropout=0.0))
    x = torch.randn(3, 8)
    assert torch.equal(part(x), part.base(x))
    with torch.no_grad():
        part.b.add_(1)
    assert torch.allclose(part(x), x @ (part.base.weight + part.delta()).T, atol=1e-6)
    training = Training(steps=100)
    factors = [training.factor(step) for step in range(100)]
    assert factors[:5] == [0.2, 0.4, 0.6, 0.8, 1.0] and factors[5] == 1 and factors[99] < 0.01
    assert factors[5:] == sorted(factors[5:], reverse=True)


def test_bad_input(tmp_path):
    source = tiny(tmp_path / "float")
    text_file(tmp_path / "text.txt")
    words = ["--dataset", tmp_path / "text.txt", "--seq-len", "24", "--out", tmp_path / "out"]
    message = refused("prepare", source, *words)
    assert "a float checkpoint" in message and "--method ptq1.61" in message
    done("quantize", source, "--scheme", "w2a16-g32", "--method", "rtn", "--format", "native", "--out", tmp_path / "q")
    assert "use a rank from 1 to 32" in refused("prepare", tmp_path / "q", "--rank", "64", *words)
    assert "nothing to train on" in refused("prepare", tmp_path / "q", "--steps", "0", *words)
    assert "outside (0, 1)" in refused("prepare", tmp_path / "q", "--rate", "2", *words)
    assert not (tmp_path / "out").exists()
