"""The headers of safetensors files, and which files of a folder hold the weights."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from calibration.errors import ToolkitError
from calibration.model.reading import read_json, regular_file

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
LONGEST_HEADER = 100_000_000  # bytes; the library's own limit

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
DAMAGED = "the download or copy was cut short, or another program wrote it wrongly: fetch this file again"


@dataclass(frozen=True)
class TensorInfo:
    """What a header says of one tensor.

    Attributes:
        dtype: in which it is read.
        start: offset of its first byte in the shard.
        codes: of the stored values, where they are float8 codes that are multiplied by ``scale`` on reading; uint8 for
            pairs of MXFP4 codes.
        parts: tensors of the files that lie one after the other in this one.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    shard: str
    start: int = 0
    codes: torch.dtype | None = None
    scale: TensorInfo | None = None
    parts: tuple[TensorInfo, ...] = ()

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
    """The header of one shard.

    The library opens the file first and judges it (offsets without gaps and overlaps, shapes, types, size of the file);
    what it accepts is read again here for the offsets, which it does not tell.

    Raises:
        ToolkitError: not a regular file, truncated, corrupt, the same name twice, or a dtype that is not known.
    """
    regular_file(path, "fetch it again")
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(size - 8, LONGEST_HEADER):
                raise ToolkitError(f"{path}: truncated or corrupt ({size} bytes, header of {length})", DAMAGED)
            header = json.loads(file.read(length).decode("utf-8"), object_pairs_hook=_once)
        entries = {k: v for k, v in header.items() if k != "__metadata__"}
        for name, entry in entries.items():
            if entry["dtype"] not in DTYPES:
                raise ToolkitError(
                    f"{path}: {name} has dtype '{entry['dtype']}', which is not read here",
                    f"start from a checkpoint in 16 or 32 bits; known dtypes: {', '.join(DTYPES)}",
                )
        infos = {name: _info(path, name, entry, 8 + length) for name, entry in entries.items()}
        end = max((v["data_offsets"][1] for v in entries.values()), default=0)
        if 8 + length + end != size:
            raise ToolkitError(f"{path}: truncated or corrupt: {size} bytes, expected {8 + length + end}", DAMAGED)
        with safe_open(path, framework="pt"):
            return infos
    except SafetensorError as error:
        raise ToolkitError(f"{path}: corrupt safetensors header ({error})", DAMAGED) from error
    except (struct.error, ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise ToolkitError(f"{path}: corrupt safetensors header ({error!r})", DAMAGED) from error
    except OSError as error:
        raise ToolkitError(
            f"{path}: cannot be read ({error.strerror})", "check the file and its permissions"
        ) from error


def _info(path: Path, name: str, entry: dict[str, Any], data: int) -> TensorInfo:
    """One entry of a header; ``data`` is where the tensors begin."""
    numbers = [*entry["shape"], *entry["data_offsets"]]
    if not all(type(n) is int and n >= 0 for n in numbers):
        raise ToolkitError(f"{path}: corrupt: {name} has the shape or offsets {numbers}", DAMAGED)
    first, last = entry["data_offsets"]
    info = TensorInfo(DTYPES[entry["dtype"]], tuple(entry["shape"]), path.name, data + first)
    if last - first != info.nbytes:
        raise ToolkitError(
            f"{path}: corrupt: {name} has {last - first} bytes, its shape and dtype {info.nbytes}", DAMAGED
        )
    return info


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose keys are all different: of two tensors of one name a reader would see only the last."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"'{next(n for n in names if names.count(n) > 1)}' is there twice")
    return found


def shards_of(folder: Path) -> list[str]:
    """File names of the shards: ``model.safetensors`` comes before the index, as in transformers. Other files beside
    them (Mistral's ``consolidated.safetensors``) are other copies of the weights, and not read.

    Raises:
        ToolkitError: a shard is missing, or the index names a file outside the folder; only pickle files; no weights.
    """
    if (folder / SINGLE_FILE).exists():
        return [SINGLE_FILE]
    if (folder / INDEX_FILE).exists():
        return _indexed(folder)
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


def _indexed(folder: Path) -> list[str]:
    """The shards that the index names: plain names of files beside it."""
    index = folder / INDEX_FILE
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ToolkitError(f"{index}: corrupt index: no map from tensors to files", "fetch this file again")
    names = sorted(set(weight_map.values()))
    for name in names:
        if Path(name).name != name or name in ("", ".", ".."):
            raise ToolkitError(
                f"{index}: names '{name}', which is no file beside it", "an index names files of its own folder only"
            )
        if not (folder / name).exists():
            raise ToolkitError(
                f"{folder / name}: missing shard, named by {INDEX_FILE}", "fetch the missing file into the folder"
            )
    return names
