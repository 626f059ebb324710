"""Runtime Smooth as a method: which linears it smooths, with and without a rotation, and what it is worth."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_runs import logits, quantize, tiny_checkpoint

from calibration.errors import PlanError
from calibration.walk.passes import check_order
from ptq.methods.rs import group_of
from ptq.planning.recipe import method_recipe, parse_method
from ptq.runtime.load import load_model

ATTENTION = ("q_proj", "k_proj", "v_proj")


def names(method: str) -> str:
    return "+".join(p.name for p in parse_method(method))


def schemes(folder) -> dict[str, str]:
    layers = json.loads((folder / "config.json").read_text())["quantization_config"]["layers"]
    return {name: entry["scheme"] for name, entry in layers.items()}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_checkpoint("llama", tmp_path_factory.mktemp("float"), hidden_size=64, intermediate_size=96)


def test_names_stand_for_passes_and_schemes():
    assert names("rrs") == "rotate+rs+gptq" and names("rrs+rtn") == "rotate+rs+rtn" and names("rs") == "rs+rtn"
    assert names("rtn-ada+gptq") == "adadim+gptq"
    for method in ("rs", "rrs", "rotate+gptq"):
        recipe = method_recipe(method, None, None)
        assert str(recipe.rules[0].scheme) == "w4a4-gchannel-sym-atoken" and not list(check_order(recipe.passes))
    assert str(method_recipe("smoothquant", None, None).rules[0].scheme) == "w8a8-gchannel-sym-atoken"


def by_recipe(model, tmp_path, text: str) -> dict[str, str]:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(text)
    quantize(model, tmp_path / "out", method=None, scheme=None, recipe=recipe)
    return schemes(tmp_path / "out")


def test_every_linear_smooths_over_blocks_of_tokens_in_groups_by_width(model, tmp_path):
    quantize(model, tmp_path / "out", method="rs", scheme="w4a4")
    assert set(schemes(tmp_path / "out").values()) == {"w4a4-gchannel-sym-atoken-rs16b64"}
    assert [group_of(width) for width in (8, 64, 576, 1536, 2048, 4096, 14336)] == [16, 16, 16, 32, 64, 128, 128]


def test_as_published_groups_are_128_wide_over_the_sequence_and_attention_stays_plain(model, tmp_path):
    published = '[[pass]]\nname = "rs"\ngroup = 128\nblock = 0\nattention = false\n'
    for name, scheme in by_recipe(model, tmp_path, f'scheme = "w4a4"\n{published}').items():
        assert scheme.endswith("-atoken" if name.endswith(ATTENTION) else "-rs128")


def test_settings_reach_the_schemes(model, tmp_path):
    table = '[[pass]]\nname = "rs"\ngroup = 32\nreorder = false\nblock = 8\n'
    assert set(by_recipe(model, tmp_path, f'scheme = "w4a8"\n{table}').values()) == {"w4a8-gchannel-sym-atoken-rs32nb8"}


def test_what_norms_feed_is_smoothed_and_what_down_reads_is_rotated(model, tmp_path):
    """The combination of both: the rotation at run time alone, and smoothing everywhere else."""
    passes = '[[pass]]\nname = "rotate"\nresidual = false\nvalues = false\n[[pass]]\nname = "rs"\ntransformed = false\n'
    for name, scheme in by_recipe(model, tmp_path, f'scheme = "w4a4"\n{passes}').items():
        assert scheme.endswith("-atoken" if name.endswith("down_proj") else "-rs16b64"), name
    transformed = [name for name in load_file(tmp_path / "out" / "model.safetensors") if name.endswith("hadamard")]
    assert transformed and all("down_proj" in name for name in transformed)


@pytest.mark.parametrize("method", ["rs+gptq", "rrs"])
def test_integers_equal_the_simulation(method, model, tmp_path):
    quantize(model, tmp_path / "out", method=method, scheme="w4a4")
    integer, simulated = (load_model(tmp_path / "out", dtype=torch.float32, kernel=k) for k in (None, "reference"))
    assert integer.path.startswith("integer x 14") and "simulated x 14" in simulated.path
    expected = logits(simulated.model)
    difference = (logits(integer.model) - expected).abs() / expected.abs().max()
    assert difference.mean() <= 2e-3 and difference.quantile(0.25) <= 1e-5


def test_rotation_with_smoothing_switched_off_is_the_float_model(model, tmp_path):
    """Oracle 10, with codes fine enough that little is lost: the logits of the original."""
    quantize(model, tmp_path / "fine", method="rrs", scheme="w8a8")
    exact, found = logits(load_model(model).model), logits(load_model(tmp_path / "fine", dtype=torch.float32).model)
    assert (found - exact).abs().mean() <= 0.02 * exact.abs().max()


def test_it_is_better_than_plain_tokens_where_channels_have_outliers(tmp_path):
    """Usefulness: gains of the norm in front of the MLP and columns behind it trade a factor of 60 on some channels."""
    folder = tiny_checkpoint("llama", tmp_path / "float", hidden_size=64, intermediate_size=96)
    tensors = load_file(folder / "model.safetensors")
    for layer in range(2):
        prefix = f"model.layers.{layer}."
        tensors[prefix + "post_attention_layernorm.weight"][:4] *= 60
        for linear in ("gate_proj", "up_proj"):
            tensors[f"{prefix}mlp.{linear}.weight"][:, :4] /= 60
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    exact, errors = logits(load_model(folder).model), {}
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('scheme = "w8a4"\n[[pass]]\nname = "rs"\ngroup = 16\n')
    for name, settings in (("rtn", {"method": "rtn", "scheme": "w8a4"}), ("rs", {"recipe": recipe, "scheme": None})):
        quantize(folder, tmp_path / name, format="native", **{"method": None, **settings})
        errors[name] = (logits(load_model(tmp_path / name, dtype=torch.float32).model) - exact).square().mean()
    assert errors["rs"] < 0.7 * errors["rtn"], errors


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"scheme": "w4a16"}, "smooths symmetric integer inputs per token"),
        ({"scheme": "w4a4", "format": "compressed-tensors"}, "smoothed at run time"),
    ],
)
def test_refusals(settings, reason, model, tmp_path):
    with pytest.raises(PlanError, match=reason):
        quantize(model, tmp_path / "out", method="rs", **settings)


@pytest.mark.parametrize("line", ["group = -1", "block = -1"])
def test_settings_out_of_range(line, model, tmp_path):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(f'scheme = "w4a4"\n[[pass]]\nname = "rs"\n{line}\n')
    with pytest.raises(PlanError, match=r"rs\.(group|block)"):
        quantize(model, tmp_path / "out", method=None, scheme=None, recipe=recipe)
