"""Quantized files are held against their scheme before anything is computed from them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from command import done, refused, tiny
from safetensors.torch import load_file, save_file

FORMATS = ("native", "compressed-tensors", "gptq", "awq")
LINEAR = "model.layers.0.mlp.up_proj"
CODES = {"native": "codes", "compressed-tensors": "weight_packed", "gptq": "qweight", "awq": "qweight"}
STEPS = {"native": "scale", "compressed-tensors": "weight_scale", "gptq": "scales", "awq": "scales"}
ZEROS = {"native": "zero", "compressed-tensors": "weight_zero_point", "gptq": "qzeros", "awq": "qzeros"}
Change = Callable[[torch.Tensor], torch.Tensor]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("quantized")
    model = tiny(place / "model", intermediate_size=64)
    for name in FORMATS:
        words = ["quantize", model, "--method", "rtn", "--scheme", "w4a16-g32-asym", "--format", name]
        done(*words, "--out", place / name)
    words = ["quantize", model, "--method", "rtn", "--scheme", "w4a16-g32-asym_float", "--format", "native"]
    done(*words, "--out", place / "float zeros")
    return {name: place / name for name in (*FORMATS, "float zeros")}


def inf(t: torch.Tensor) -> torch.Tensor:
    t.view(-1)[0] = torch.inf
    return t


CHANGES: dict[str, tuple[dict[str, str], Change]] = {
    "codes of another dtype": (CODES, lambda t: t.to(torch.float32)),
    "codes as bytes": (CODES, lambda t: t.view(torch.uint8)),
    "codes a row short": (CODES, lambda t: t[:-1]),
    "steps doubled": (STEPS, lambda t: torch.cat([t, t])),
    "no steps": (STEPS, lambda t: t[:0]),
    "steps as integers": (STEPS, lambda t: t.to(torch.int32)),
    "infinite steps": (STEPS, inf),
    "NaN steps": (STEPS, lambda t: t * torch.nan),
    "zero points of another shape": (ZEROS, lambda t: t[:-1]),
    "zero points of another dtype": (ZEROS, lambda t: t.to(torch.bool)),
}


def changed(source: Path, place: Path, suffix: str, change: Change) -> Path:
    shutil.copytree(source, place)
    tensors = load_file(place / "model.safetensors")
    name = f"{LINEAR}.{suffix}"
    tensors[name] = change(tensors[name]).contiguous()
    save_file(tensors, place / "model.safetensors", {"format": "pt"})
    return place


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("kind", CHANGES)
def test_tensors_that_are_not_those_of_the_scheme(folders, tmp_path, name, kind):
    suffixes, change = CHANGES[kind]
    damaged = changed(folders[name], tmp_path / "q", suffixes[name], change)
    message = refused("export", damaged, "--format", "native", "--out", tmp_path / "out")
    assert LINEAR in message and not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", [*FORMATS, "float zeros"])
def test_good_files_are_read(folders, tmp_path, name):
    assert "read back and compared" in done("export", folders[name], "--format", "native", "--out", tmp_path / "out")


def test_float_zero_points(folders, tmp_path):
    for i, change in enumerate((lambda t: t * torch.nan, lambda t: t.to(torch.float32), lambda t: t[:-1])):
        damaged = changed(folders["float zeros"], tmp_path / str(i), "zero", change)
        assert LINEAR in refused("export", damaged, "--format", "native", "--out", tmp_path / "out")


@pytest.mark.parametrize("index", [-1, 10**6])
def test_group_indices_outside_the_groups(folders, tmp_path, index):
    damaged = changed(folders["gptq"], tmp_path / "q", "g_idx", lambda t: torch.full_like(t, index))
    assert LINEAR in refused("export", damaged, "--format", "native", "--out", tmp_path / "out")


@pytest.mark.parametrize(("name", "suffix"), [("gptq", "g_idx"), ("awq", "scales"), ("native", "scale")])
def test_a_name_with_a_slip_is_not_carried_along(folders, tmp_path, name, suffix):
    """A GPTQ file without the group of every column is decoded as if groups were in order."""
    shutil.copytree(folders[name], tmp_path / "q")
    file = tmp_path / "q" / "model.safetensors"
    tensors = load_file(file)
    tensors[f"{LINEAR}.{suffix}_x"] = tensors[f"{LINEAR}.{suffix}"].clone()
    save_file(tensors, file, {"format": "pt"})
    said = refused("export", tmp_path / "q", "--format", "native", "--out", tmp_path / "out")
    assert f"{LINEAR}.{suffix}_x: no tensor of a linear in" in said


def test_reordered_columns_need_their_groups(folders, tmp_path):
    import json

    shutil.copytree(folders["gptq"], tmp_path / "q")
    file, config = tmp_path / "q" / "model.safetensors", tmp_path / "q" / "config.json"
    tensors = load_file(file)
    del tensors[f"{LINEAR}.g_idx"]
    save_file(tensors, file, {"format": "pt"})
    done("export", tmp_path / "q", "--format", "native", "--out", tmp_path / "natural")  # groups in order need none
    data = json.loads(config.read_text())
    data["quantization_config"]["desc_act"] = True
    config.write_text(json.dumps(data))
    assert "no g_idx" in refused("export", tmp_path / "q", "--format", "native", "--out", tmp_path / "out")


@pytest.mark.parametrize("name", FORMATS)
def test_a_copy_lacks_nothing(folders, tmp_path, name):
    """Tensors beside the quantized linears are held against the model class, as those of a float model are."""
    shutil.copytree(folders[name], tmp_path / "q")
    file, norm = tmp_path / "q" / "model.safetensors", "model.layers.0.post_attention_layernorm.weight"
    tensors = load_file(file)
    words = ["export", tmp_path / "q", "--format", "native", "--out", tmp_path / "out"]
    save_file({**tensors, f"{norm}_x": tensors[norm].clone()}, file, {"format": "pt"})
    assert f"{norm}_x: in the checkpoint, but" in refused(*words)
    save_file({n: t for n, t in tensors.items() if n != norm}, file, {"format": "pt"})
    assert f"{norm}: not in the checkpoint" in refused(*words)
    for broken in (norm, "model.norm.weight"):
        save_file({**tensors, broken: tensors[broken] * torch.nan}, file, {"format": "pt"})
        assert f"{broken}: NaN or Inf" in refused(*words) and not (tmp_path / "out").exists()
