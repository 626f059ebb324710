"""Headers of safetensors files: names, dtypes, shapes and places of tensors, without the tensors."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from pathlib import Path

import torch

from calibration.errors import ToolkitError

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "C64": torch.complex64,
    "I64": torch.int64,
    "U64": torch.uint64,
    "I32": torch.int32,
    "U32": torch.uint32,
    "I16": torch.int16,
    "U16": torch.uint16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class TensorInfo:
    """What a header says of one tensor.

    Attributes:
        dtype: in which it is read.
        start: offset of its first byte in the shard.
        codes: of the stored values, where they are float8 codes that are multiplied by ``scale`` on reading.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    shard: str
    start: int = 0
    codes: torch.dtype | None = None
    scale: TensorInfo | None = None

    @property
    def numel(self) -> int:
        n = 1
        for d in self.shape:
            n *= d
        return n

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The header of one shard, checked against the size of the file."""
    damaged = "the download or copy was cut short: fetch this file again"
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(size - 8, 100_000_000):
                raise ToolkitError(f"{path}: truncated or corrupt ({size} bytes, header of {length})", damaged)
            header = json.loads(file.read(length))
        entries = {k: v for k, v in header.items() if k != "__metadata__"}
        for name, entry in entries.items():
            if entry["dtype"] not in DTYPES:
                raise ToolkitError(
                    f"{path}: {name} has dtype '{entry['dtype']}', which is not read here",
                    f"start from a checkpoint in 16 or 32 bits; known dtypes: {', '.join(DTYPES)}",
                )
        infos = {
            k: TensorInfo(DTYPES[v["dtype"]], tuple(v["shape"]), path.name, 8 + length + v["data_offsets"][0])
            for k, v in entries.items()
        }
        for name, info in infos.items():
            first, last = entries[name]["data_offsets"]
            if first < 0 or last - first != info.nbytes:
                raise ToolkitError(
                    f"{path}: corrupt: {name} has {last - first} bytes, its shape and dtype {info.nbytes}", damaged
                )
        end = max((v["data_offsets"][1] for v in entries.values()), default=0)
    except (struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ToolkitError(f"{path}: corrupt safetensors header ({error!r})", damaged) from None
    if 8 + length + end != size:
        raise ToolkitError(f"{path}: truncated or corrupt: {size} bytes, expected {8 + length + end}", damaged)
    return infos


def shards_of(folder: Path) -> list[str]:
    """File names of the shards: ``model.safetensors`` comes before the index, as in transformers. Other files beside
    them (Mistral's ``consolidated.safetensors``) are other copies of the weights, and not read."""
    if (folder / SINGLE_FILE).exists():
        return [SINGLE_FILE]
    index = folder / INDEX_FILE
    if index.exists():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ToolkitError(f"{index}: corrupt index ({error!r})", "fetch this file again") from None
        for name in names:
            if not (folder / name).exists():
                raise ToolkitError(
                    f"{folder / name}: missing shard, named by {INDEX_FILE}", "fetch the missing file into the folder"
                )
        return names
    found = sorted(p.name for p in folder.glob("*.safetensors"))
    if found:
        return found
    pickles = sorted(p.name for p in [*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")])
    if pickles:
        raise ToolkitError(
            f"{folder}: no safetensors, only pickle files ({', '.join(pickles[:3])}), which can run code when loaded",
            "convert them first, e.g. with AutoModelForCausalLM.from_pretrained(...).save_pretrained(...) "
            "on a machine where you trust them",
        )
    raise ToolkitError(f"{folder}: no safetensors files in it", "name a folder that holds a Hugging Face checkpoint")
