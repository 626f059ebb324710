"""Static inputs where one token holds hundreds of times what the others do: which linears keep their static step."""

from __future__ import annotations

import json

import pytest
import torch
from byte_tokenizer import byte_tokenizer
from tiny_runs import logits, plain_model, quantize, rewrite, tiny_checkpoint

from calibration.walk.ranges import TokenMaxima
from ptq.planning.job import prepare
from ptq.runtime.load import load_model

RARE = byte_tokenizer().convert_tokens_to_ids("l")  # the letter that every line of the text begins with
DOWN = "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A channel that only one letter fills makes its product of gate and up in block 1 enormous."""
    folder = tiny_checkpoint("llama", tmp_path_factory.mktemp("float"), hidden_size=64, intermediate_size=96)

    def plant(tensors):
        table = tensors["model.embed_tokens.weight"]
        table[:, 5] = 0
        table[RARE] *= 0.01
        table[RARE, 5] = 3 * table.norm(dim=1).max()
        for name in ("gate_proj", "up_proj"):
            tensors[f"model.layers.1.mlp.{name}.weight"][:1, 5] = 6.0
        tensors[f"{DOWN}.weight"][:, 0] *= 0.01
        return tensors

    return rewrite(folder, plant)


def schemes(model, out, **settings) -> dict[str, str]:
    quantize(model, out, scheme="w8a8-astatic", format="native", **{"method": "ranges+rtn", **settings})
    layers = json.loads((out / "config.json").read_text())["quantization_config"]["layers"]
    return {name: entry["scheme"].partition("sym-")[2] for name, entry in layers.items()}


def recipe(tmp_path, massive: str):
    path = tmp_path / "recipe.toml"
    path.write_text(f'scheme = "w8a8-astatic"\n[[pass]]\nname = "ranges"\nmassive = "{massive}"\n')
    return {"recipe": path, "method": None, "scheme": None}


def error(model, folder) -> float:
    exact, found = logits(load_model(model).model), logits(load_model(folder, dtype=torch.float32).model)
    return float((found - exact).square().mean().sqrt() / exact.square().mean().sqrt())


def test_only_inputs_with_a_massive_token_get_steps_per_token(model, tmp_path):
    found = schemes(model, tmp_path / "out")
    assert {name for name, scheme in found.items() if scheme == "atoken"} == {DOWN}
    assert set(found.values()) == {"atoken", "astatic"}
    record = json.loads((tmp_path / "out" / "report.json").read_text())
    assert "times the usual" in json.dumps(record)


def test_it_is_what_the_other_tokens_need(model, tmp_path):
    schemes(model, tmp_path / "token")
    quantize(model, tmp_path / "static", format="native", **recipe(tmp_path, "static"))
    quantize(model, tmp_path / "float", format="native", **recipe(tmp_path, "float"))
    errors = {name: error(model, tmp_path / name) for name in ("token", "static", "float")}
    assert errors["float"] <= errors["token"] * 1.05 and errors["token"] < 0.75 * errors["static"], errors


def test_transformers_reads_the_mixture(model, tmp_path):
    quantize(model, tmp_path / "out", method="ranges+rtn", scheme="w8a8-astatic", format="compressed-tensors")
    theirs, ours = logits(plain_model(tmp_path / "out")), logits(load_model(tmp_path / "out", kernel="reference").model)
    assert ((theirs - ours).abs() / ours.abs().max()).mean() < 0.01


def test_the_plan_says_it_unless_everything_stays_static(model, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("x" * 4000)
    planned = prepare(model, method="ranges+rtn", scheme="w8a8-astatic").plan
    assert any("get steps per token instead" in remark for remark in planned.remarks)
    kept = prepare(model, recipe=recipe(tmp_path, "static")["recipe"]).plan
    assert not any("instead of a static step" in remark for remark in kept.remarks)


def test_maxima_of_tokens_come_from_all_batches():
    seen = TokenMaxima(3, torch.device("cpu"))
    assert seen.disparity() == 0.0
    for x in ([[1.0, -2.0, 0.5], [0.0, 1.0, 0.0]], [[-80.0, 0.0, 1.0]]):
        seen.update(torch.tensor(x))
    assert seen.maxima().tolist() == [2.0, 1.0, 80.0] and seen.disparity() == 40.0 and seen.tokens == 3
