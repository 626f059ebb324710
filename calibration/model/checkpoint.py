"""Safetensors checkpoints: headers without tensors, one tensor at a time, shards that appear whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

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
    """What a header says of one tensor; ``start`` is the offset of its first byte in the shard."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    shard: str
    start: int = 0

    @property
    def numel(self) -> int:
        n = 1
        for d in self.shape:
            n *= d
        return n

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


def _header(path: Path) -> dict[str, TensorInfo]:
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


def _shards(folder: Path) -> list[str]:
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


class TensorSource(Protocol):
    """A checkpoint's tensors by name: `CheckpointReader`, or what makes float weights of a quantized checkpoint."""

    @property
    def infos(self) -> Mapping[str, TensorInfo]: ...

    def tensor(self, name: str) -> torch.Tensor: ...

    def close(self) -> None: ...


class CheckpointReader:
    """A Hugging Face checkpoint folder: config and headers at once, tensors one at a time.

    Shards are opened on first use and stay open until `close`.

    Raises:
        ToolkitError: missing or empty folder, no safetensors, missing, truncated or corrupt shard.
    """

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise ToolkitError(f"{folder}: no such folder", "name a folder with config.json and *.safetensors")
        self.folder = folder
        self.config: dict[str, Any] = read_config(folder)
        self._stored: dict[str, str] = {}  # name of the model class -> name in the file
        self.infos: dict[str, TensorInfo] = {}
        for shard in _shards(folder):
            for name, info in _header(folder / shard).items():
                self.infos[name] = info
                self._stored[name] = name
        self._open: dict[str, Any] = {}

    @classmethod
    def of_file(cls, path: Path) -> CheckpointReader:
        """One safetensors file without a config."""
        reader = cls.__new__(cls)
        reader.folder, reader.config, reader._open = path.parent, {}, {}
        reader.infos = _header(path)
        reader._stored = {name: name for name in reader.infos}
        return reader

    def add_base_prefix(self, prefix: str, outside: tuple[str, ...] = ("lm_head.",)) -> None:
        """Put ``prefix`` in front of all names but ``outside``, unless some name already has it."""
        if any(name.startswith(prefix) for name in self.infos):
            return
        names = {n: n if n.startswith(outside) else prefix + n for n in self.infos}
        self.infos = {names[n]: info for n, info in self.infos.items()}
        self._stored = {names[n]: stored for n, stored in self._stored.items()}

    def rename(self, new_name: Callable[[str], str]) -> None:
        """Call every tensor by the name that ``new_name`` makes of its own.

        Raises:
            ToolkitError: two tensors would have one name.
        """
        names = {n: new_name(n) for n in self.infos}
        taken: dict[str, str] = {}
        for old, new in names.items():
            if new in taken:
                raise ToolkitError(
                    f"{self.folder}: {taken[new]} and {old} are both '{new}' in the model class",
                    "remove the one that does not belong to this model",
                )
            taken[new] = old
        self.infos = {names[n]: info for n, info in self.infos.items()}
        self._stored = {names[n]: stored for n, stored in self._stored.items()}

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor in its stored dtype, read and not mapped: pages of a mapped shard count as resident memory."""
        info = self.infos[name]
        return self._read(name, info.nbytes).view(info.dtype).view(info.shape)

    def first_bytes(self, name: str, count: int) -> bytes:
        """The first ``count`` bytes of a tensor, or all where it has fewer."""
        return self._read(name, min(count, self.infos[name].nbytes)).numpy().tobytes()

    def _read(self, name: str, n_bytes: int) -> torch.Tensor:
        """uint8 ``[n_bytes]`` from the start of a tensor."""
        info = self.infos[name]
        data = torch.empty(n_bytes, dtype=torch.uint8)
        try:
            if info.shard not in self._open:
                self._open[info.shard] = (self.folder / info.shard).open("rb", buffering=0)
            file = self._open[info.shard]
            file.seek(info.start)
            view = memoryview(data.numpy().data)
            while view:
                count = file.readinto(view)
                if not count:
                    raise OSError("the file ends early")
                view = view[count:]
        except OSError as error:
            raise ToolkitError(f"{self.folder / info.shard}: cannot read {name} ({error})", "fetch it again") from None
        return data

    def close(self) -> None:
        """Close all shards. Reading another tensor opens them again."""
        for file in self._open.values():
            file.close()
        self._open.clear()

    def __enter__(self) -> CheckpointReader:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    @property
    def total_bytes(self) -> int:
        return sum(info.nbytes for info in self.infos.values())


def read_config(folder: Path) -> dict[str, Any]:
    """``config.json`` of a checkpoint folder.

    Raises:
        ToolkitError: missing, or not JSON.
    """
    path = folder / "config.json"
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ToolkitError(f"{path}: no such file", "name a folder that holds a Hugging Face checkpoint") from None
    except ValueError as error:
        raise ToolkitError(f"{path}: not readable as JSON ({error})", "fetch this file again") from None
    if not isinstance(data, dict):
        raise ToolkitError(f"{path}: holds a {type(data).__name__}, not an object", "fetch this file again")
    return data


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn a full disk, a read-only folder and the like into an error that names the path."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        code = getattr(error, "errno", None)
        if code in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error):
            fix = "free some space, then run again (`ptq quantize` goes on with --resume)"
            raise ToolkitError(f"{path}: the disk is full", fix) from None
        if isinstance(error, SafetensorError) and "os error" not in str(error).lower():
            raise
        raise ToolkitError(f"{path}: not writable ({error})", "choose another place to write to") from None


def sync_folder(folder: Path) -> None:
    """fsync a directory, so that the names in it survive a crash."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file under a temporary name, fsync, rename."""
    temporary = path.with_name(path.name + ".tmp")
    with disk_errors(path):
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)
        sync_folder(path.parent)


def save_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write one safetensors file under a temporary name, fsync, rename. The same tensors give the same bytes."""
    temporary = path.with_name(path.name + ".tmp")
    with disk_errors(path):
        save_file({k: v.contiguous() for k, v in tensors.items()}, temporary, metadata=metadata or {"format": "pt"})
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_umask())  # the library creates files that only their owner may read
        temporary.rename(path)
        sync_folder(path.parent)


def _umask() -> int:
    """The process's file mode mask, which can only be read by setting it."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
