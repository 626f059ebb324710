"""Thresholds beside the weights: what is saved comes back, and what does not fit is refused."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import save_tiny

from calibration.errors import ToolkitError
from calibration.model.checkpoint import CheckpointReader
from calibration.model.opening import weights_fingerprint
from sparsity.files import SETTINGS_FILE, TENSORS_FILE, Sparsity, load_sparsity, save_sparsity, site_tensors, sites_from
from sparsity.sites import Site, prune, small

GATE, DOWN = "model.layers.0.mlp.gate_proj", "model.layers.0.mlp.down_proj"


@pytest.fixture
def folder(tmp_path):
    save_tiny("llama", tmp_path / "m")
    with CheckpointReader(tmp_path / "m") as reader:
        base = weights_fingerprint(reader)
    sites = (
        Site(GATE, "output", torch.rand(96)),
        Site(DOWN, "input", torch.tensor([0.5]), torch.tensor([-0.17]), torch.rand(64)),
    )
    saved = Sparsity("chess+scap", 0.5, base, sites, {"up_stat": "rms"}, {"tokens": 7}, {sites[0].name: 0.5})
    save_sparsity(saved, tmp_path / "m")
    return tmp_path / "m"


def test_saved_thresholds_come_back(folder):
    first, second = load_sparsity(folder), load_sparsity(folder)
    assert first is not None and second is not None
    assert (first.method, first.target, first.settings) == ("chess+scap", 0.5, {"up_stat": "rms"})
    assert [s.name for s in first.sites] == [f"{GATE}.output", f"{DOWN}.input"]
    assert first.reached == {f"{GATE}.output": 0.5}
    for name, tensor in site_tensors(first.sites).items():
        assert torch.equal(tensor, load_file(folder / TENSORS_FILE)[name])


def test_a_dense_folder_is_not_sparse(tmp_path):
    assert load_sparsity(save_tiny("llama", tmp_path)) is None


def test_other_weights_of_the_same_shape_are_refused(folder, tmp_path):
    save_tiny("llama", tmp_path / "other", seed=1)
    for name in (SETTINGS_FILE, TENSORS_FILE):
        (tmp_path / "other" / name).write_bytes((folder / name).read_bytes())
    with pytest.raises(ToolkitError, match="thresholds for the weights"):
        load_sparsity(tmp_path / "other")


def test_an_edited_config_is_not_another_base(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "use_cache": False}))
    assert load_sparsity(folder) is not None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: {**d, "schema_version": 9}, "schema version 9"),
        (lambda d: {k: v for k, v in d.items() if k != "base"}, "damaged"),
        (lambda d: {**d, "sites": d["sites"][:1]}, "different sites"),
    ],
)
def test_damaged_settings_are_refused(folder, change, message):
    path = folder / SETTINGS_FILE
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(ToolkitError, match=message):
        load_sparsity(folder)


@pytest.mark.parametrize(
    "change",
    [
        {f"{DOWN}.input.threshold": torch.tensor([-0.1])},
        {f"{DOWN}.input.threshold": torch.tensor([float("nan")])},
        {f"{DOWN}.input.threshold": torch.rand(64, dtype=torch.float64)},
        {f"{DOWN}.sideways.threshold": torch.tensor([0.1])},
        {f"{GATE}.output.center": torch.tensor([0.1])},
        {"stray": torch.tensor([0.1])},
    ],
)
def test_damaged_tensors_are_refused(folder, change):
    save_file({**load_file(folder / TENSORS_FILE), **change}, folder / TENSORS_FILE)
    with pytest.raises(ToolkitError):
        load_sparsity(folder)


def test_a_missing_or_cut_tensor_file_is_refused(folder):
    path = folder / TENSORS_FILE
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(ToolkitError, match="truncated or corrupt"):
        load_sparsity(folder)
    path.unlink()
    with pytest.raises(ToolkitError, match="no such file"):
        load_sparsity(folder)


def test_parts_without_a_threshold_are_refused():
    with pytest.raises(ToolkitError, match="belongs to no site"):
        sites_from({f"{DOWN}.input.center": torch.zeros(1)})


def test_the_rule_is_at_most_and_in_float32():
    x = torch.tensor([0.5, -0.5, 0.500001, 0.0, float("nan")])
    t = torch.tensor([0.5])
    assert small(x, t).tolist() == [True, True, False, True, False]
    assert prune(x, t)[:4].tolist() == [0.0, 0.0, x[2].item(), 0.0]
    centered = prune(torch.tensor([1.4, 1.6, 2.1]), torch.tensor([0.5]), torch.tensor([2.0]))
    assert centered.tolist() == pytest.approx([1.4, 2.0, 2.0])
    just_above = torch.tensor([1.0], dtype=torch.bfloat16)  # 1.001 rounds to 1.0 in bfloat16: it must not here
    assert small(just_above, torch.tensor([1.001])).item() and not small(just_above, torch.tensor([0.999])).item()
    assert prune(just_above, torch.tensor([0.5])).dtype == torch.bfloat16
