"""Safetensors files: what is written is read back, the same tensors give the same bytes, damage is told."""

from __future__ import annotations

import json
import struct
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from calibration.errors import ToolkitError
from calibration.model.checkpoint import CheckpointReader, read_config, save_tensors, write_atomically
from calibration.model.headers import DTYPES
from calibration.model.shards import ShardWriter

INDEX = "model.safetensors.index.json"


def numbers(count: int, rows: int = 4, columns: int = 8) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {f"layer.{i}.weight": torch.randn(rows, columns, generator=generator) for i in range(count)}


def write(folder: Path, tensors: dict[str, torch.Tensor], shard_bytes: int = 10**9) -> list[str]:
    """A checkpoint folder of these tensors; returns the names of its shards."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text("{}")
    writer = ShardWriter(folder, shard_bytes)
    for name, tensor in tensors.items():
        writer.add(name, tensor)
    return writer.finish()


def raw(path: Path, header: dict, data: bytes = b"") -> Path:
    """A safetensors file by hand."""
    blob = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(blob)) + blob + data)
    return path


def entry(dtype: str, shape: list[int], start: int, end: int) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def refused(path: Path, *words: str) -> None:
    with pytest.raises(ToolkitError) as caught:
        CheckpointReader(path) if path.is_dir() else CheckpointReader.of_file(path)
    assert all(word in caught.value.message for word in (path.name, *words)), caught.value.message


def test_one_shard_has_no_index(tmp_path):
    tensors = numbers(3)
    assert write(tmp_path / "a", tensors) == ["model.safetensors"]
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["config.json", "model.safetensors"]
    with CheckpointReader(tmp_path / "a") as reader:
        assert all(torch.equal(reader.tensor(name), tensor) for name, tensor in tensors.items())
        assert reader.total_bytes == 3 * 4 * 8 * 4


def test_shards_and_index(tmp_path):
    tensors = numbers(5)  # 128 bytes each, two to a shard
    names = write(tmp_path / "a", tensors, shard_bytes=300)
    assert names == [f"model-{i:05d}-of-00003.safetensors" for i in (1, 2, 3)]
    index = json.loads((tmp_path / "a" / INDEX).read_text())
    assert index["metadata"] == {"total_size": 5 * 128}
    assert index["weight_map"] == {f"layer.{i}.weight": names[i // 2] for i in range(5)}
    assert not list((tmp_path / "a").glob("*.part")) and not list((tmp_path / "a").glob("*.tmp"))
    with CheckpointReader(tmp_path / "a") as reader:
        assert {name: info.shard for name, info in reader.infos.items()} == index["weight_map"]
        assert all(torch.equal(reader.tensor(name), tensor) for name, tensor in tensors.items())


KINDS = (torch.bfloat16, torch.uint8, torch.float32, torch.int64, torch.float8_e4m3fn)


def of_all_kinds(count: int) -> dict[str, torch.Tensor]:
    """Of sizes that are no multiples of 8 bytes, too."""
    return {f"{i}.\u00e9": torch.arange(i % 11 + 1).to(KINDS[i % 5]).view(1, -1) for i in range(count)}


@pytest.mark.parametrize("shard_bytes", [700, 10**6])
def test_shards_that_are_written_while_they_fill(tmp_path, monkeypatch, shard_bytes):
    """Pieces of a shard leave memory before it is full; the library and our reader find the same tensors."""
    monkeypatch.setattr("calibration.model.shards.PIECE_BYTES", 64)
    monkeypatch.setattr("calibration.model.shards.SPARE", 300)
    tensors, writer = of_all_kinds(100), ShardWriter(tmp_path, shard_bytes)
    for name, tensor in tensors.items():
        writer.add(name, tensor)
        assert sum(t.nbytes for t in writer._pending.values()) < 64 + 88
    names = writer.finish()
    assert (len(names) == 1) == (shard_bytes == 10**6)
    found = {name: tensor for file in names for name, tensor in load_file(tmp_path / file).items()}
    (tmp_path / "config.json").write_text("{}")
    with CheckpointReader(tmp_path) as reader:
        assert reader.infos.keys() == found.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape
            assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8)), name
            assert torch.equal(reader.tensor(name).view(torch.uint8), tensor.view(torch.uint8)), name


def test_a_disk_that_fills_up_while_a_shard_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr("calibration.model.shards.PIECE_BYTES", 64)

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("calibration.model.streamed.os.fsync", full)
    with pytest.raises(ToolkitError, match="the disk is full"):
        write(tmp_path / "a", of_all_kinds(100), shard_bytes=700)
    assert not list((tmp_path / "a").glob("*.safetensors"))


def test_a_tensor_larger_than_a_shard_has_its_own(tmp_path):
    sizes = {"small": torch.zeros(2), "large": torch.zeros(1000), "last": torch.zeros(2)}
    assert len(write(tmp_path / "a", sizes, shard_bytes=100)) == 3


def test_the_same_tensors_give_the_same_bytes(tmp_path):
    tensors = {**numbers(4), "t": torch.arange(12).view(3, 4).T}  # one that is not contiguous
    for name, order in (("a", list(tensors)), ("b", list(tensors)), ("c", list(reversed(tensors)))):
        write(tmp_path / name, {n: tensors[n] for n in order})
    contents = [(tmp_path / name / "model.safetensors").read_bytes() for name in "abc"]
    assert contents[0] == contents[1] == contents[2]
    assert torch.equal(load_file(tmp_path / "a/model.safetensors")["t"], tensors["t"])


def test_nothing_has_its_name_before_the_end(tmp_path):
    writer = ShardWriter(tmp_path, shard_bytes=200)
    for name, tensor in numbers(5).items():
        writer.add(name, tensor)
    assert not list(tmp_path.glob("*.safetensors")) and not (tmp_path / INDEX).exists()
    with pytest.raises(AssertionError, match="written twice"):
        writer.add("layer.0.weight", torch.zeros(1))


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "x.safetensors"
    save_tensors(path, {"a": torch.zeros(4)})
    write_atomically(tmp_path / "x.json", b"old")
    before = path.read_bytes()

    def fail(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("calibration.model.checkpoint.os.fsync", fail)
    with pytest.raises(ToolkitError, match="the disk is full"):
        save_tensors(path, {"a": torch.ones(4)})
    with pytest.raises(ToolkitError, match="the disk is full"):
        write_atomically(tmp_path / "x.json", b"new")
    assert path.read_bytes() == before and (tmp_path / "x.json").read_bytes() == b"old"


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype(dtype, tmp_path):
    kind = DTYPES[dtype]
    octets = (torch.arange(24 * kind.itemsize) % 2 if dtype == "BOOL" else torch.arange(24 * kind.itemsize)).byte()
    stored = octets.view(kind).view(4, 6)
    path = raw(tmp_path / "x.safetensors", {"w": entry(dtype, [4, 6], 0, octets.numel())}, bytes(octets.tolist()))
    with CheckpointReader.of_file(path) as reader:
        assert reader.infos["w"].dtype == kind and reader.infos["w"].nbytes == octets.numel()
        found = reader.tensor("w")
    assert found.dtype == kind and found.shape == (4, 6)
    assert torch.equal(found.view(torch.uint8), stored.view(torch.uint8))


def test_scalars_and_empty_tensors(tmp_path):
    tensors = {"scalar": torch.tensor(3.5), "empty": torch.zeros(0, 4), "none": torch.zeros(0)}
    save_file(tensors, tmp_path / "x.safetensors")
    with CheckpointReader.of_file(tmp_path / "x.safetensors") as reader:
        for name, tensor in tensors.items():
            assert torch.equal(reader.tensor(name), tensor) and reader.tensor(name).shape == tensor.shape


def test_tensors_outlive_the_reader(tmp_path):
    """They are copies: neither a closed file nor another one in its place changes them."""
    tensors = numbers(2)
    write(tmp_path / "a", tensors)
    with CheckpointReader(tmp_path / "a") as reader:
        found = reader.tensor("layer.0.weight")
        found.add_(0)  # and they may be written to
    (tmp_path / "a/model.safetensors").write_bytes(b"")
    assert torch.equal(found, tensors["layer.0.weight"])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_shards_are_not_mapped_and_closed(tmp_path):
    write(tmp_path / "a", numbers(4), shard_bytes=200)

    def files() -> list[str]:
        maps = [line for line in Path("/proc/self/maps").read_text().splitlines() if str(tmp_path) in line]
        return maps + [str(p) for p in Path("/proc/self/fd").iterdir() if str(tmp_path) in str(p.resolve())]

    reader = CheckpointReader(tmp_path / "a")
    assert files() == []  # headers alone leave nothing open
    kept = [reader.tensor(name) for name in reader.infos]
    assert not any("maps" in f or "-p " in f for f in files())
    reader.close()
    assert files() == [] and len(kept) == 4
    assert torch.equal(reader.tensor("layer.0.weight"), kept[0])  # opened again
    reader.close()


def test_truncated_and_corrupt_files(tmp_path):
    write(tmp_path / "a", numbers(3))
    content = (tmp_path / "a/model.safetensors").read_bytes()
    bad = tmp_path / "bad.safetensors"
    for length in (0, 4, 8, 60, len(content) - 1):
        bad.write_bytes(content[:length])
        refused(bad)
    bad.write_bytes(content + b"x")
    refused(bad, f"expected {len(content)}")
    bad.write_bytes(b"\xff" * len(content))
    refused(bad, "truncated or corrupt")
    bad.write_bytes(content[:8] + b"?" * (len(content) - 8))
    refused(bad, "corrupt")
    raw(bad, {"w": {"dtype": "F32"}})
    refused(bad, "corrupt safetensors header")


def test_offsets_that_do_not_fit_the_shape(tmp_path):
    bad = tmp_path / "bad.safetensors"
    raw(bad, {"v": entry("F32", [2], 0, 8), "w": entry("F32", [4, 4], 8, 24)}, bytes(24))
    refused(bad, "w", "16 bytes", "64")
    raw(bad, {"v": entry("F32", [2], -8, 0), "w": entry("F32", [2], 0, 8)}, bytes(8))
    refused(bad, "v")


def test_an_unknown_dtype_is_named(tmp_path):
    raw(tmp_path / "x.safetensors", {"w": entry("F4", [4], 0, 2)}, bytes(2))
    refused(tmp_path / "x.safetensors", "w has dtype 'F4'")


def test_missing_shards_and_damaged_indices(tmp_path):
    names = write(tmp_path / "a", numbers(5), shard_bytes=300)
    (tmp_path / "a" / names[1]).unlink()
    with pytest.raises(ToolkitError, match=rf"{names[1]}: missing shard, named by {INDEX}"):
        CheckpointReader(tmp_path / "a")
    for content in ("{", "[]", "{}", '{"weight_map": 3}'):
        (tmp_path / "a" / INDEX).write_text(content)
        with pytest.raises(ToolkitError, match=r"index.json: (corrupt index|not readable as JSON|holds a list)"):
            CheckpointReader(tmp_path / "a")


def test_which_files_are_the_checkpoint(tmp_path):
    """As in transformers: one file, else those of the index; other copies of the weights beside them are not read."""
    tensors = numbers(3)
    write(tmp_path / "a", tensors, shard_bytes=200)
    save_file({"other": torch.zeros(2)}, tmp_path / "a/consolidated.safetensors")
    assert set(CheckpointReader(tmp_path / "a").infos) == set(tensors)
    save_file({"single": torch.zeros(2)}, tmp_path / "a/model.safetensors")
    assert set(CheckpointReader(tmp_path / "a").infos) == {"single"}


def test_config_that_is_no_object(tmp_path):
    for content in ("{", "[1]", ""):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(ToolkitError, match=r"config\.json"):
            read_config(tmp_path)


def test_names_without_the_base_prefix(tmp_path):
    tensors = {"h.0.ln_1.weight": torch.ones(2), "lm_head.weight": torch.zeros(2)}
    write(tmp_path / "a", tensors)
    reader = CheckpointReader(tmp_path / "a")
    reader.add_base_prefix("transformer.")
    reader.add_base_prefix("transformer.")  # twice is once
    assert set(reader.infos) == {"transformer.h.0.ln_1.weight", "lm_head.weight"}
    assert torch.equal(reader.tensor("transformer.h.0.ln_1.weight"), torch.ones(2))
    reader.close()
