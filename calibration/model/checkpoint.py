"""Safetensors checkpoints: one tensor at a time, shards that appear whole or not at all."""

from __future__ import annotations

import copy
import errno
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from calibration.errors import ToolkitError, short_of_memory
from calibration.model import mxfp4
from calibration.model.float8 import dequantized
from calibration.model.headers import TensorInfo, read_header, shards_of
from calibration.model.reading import read_json


class TensorSource(Protocol):
    """A checkpoint's tensors by name: `CheckpointReader`, or what makes float weights of a quantized checkpoint."""

    @property
    def infos(self) -> Mapping[str, TensorInfo]: ...

    def tensor(self, name: str) -> torch.Tensor: ...

    def rows(self, name: str, indices: torch.Tensor) -> torch.Tensor: ...

    def close(self) -> None: ...


class CheckpointReader:
    """A Hugging Face checkpoint folder: config and headers at once, tensors one at a time.

    Shards are opened on first use and stay open until `close`.

    Raises:
        ToolkitError: missing or empty folder, no safetensors, missing, truncated or corrupt shard.
    """

    computed: torch.dtype | None = None
    """What values that are computed from codes and scales are rounded to, once; None: to the dtype in ``infos``."""

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise ToolkitError(f"{folder}: no such folder", "name a folder with config.json and *.safetensors")
        self.folder = folder
        self.config: dict[str, Any] = read_config(folder)
        self.infos: dict[str, TensorInfo] = {}
        self._in_file: dict[str, str] = {}  # names that differ, see `rename`
        for shard in shards_of(folder):
            for name, info in read_header(folder / shard).items():
                if name in self.infos:
                    other = self.infos[name].shard
                    raise ToolkitError(
                        f"{folder}: {name} is in {other} and in {shard}", "remove the shard that is not of it"
                    )
                self.infos[name] = info
        self._open: dict[str, Any] = {}

    @classmethod
    def of_file(cls, path: Path) -> CheckpointReader:
        """One safetensors file without a config."""
        reader = cls.__new__(cls)
        reader.folder, reader.config, reader._open = path.parent, {}, {}
        reader.infos, reader._in_file = read_header(path), {}
        return reader

    def add_base_prefix(self, prefix: str, outside: tuple[str, ...] = ("lm_head.",)) -> None:
        """Put ``prefix`` in front of all names but ``outside``, unless some name already has it."""
        if any(name.startswith(prefix) for name in self.infos):
            return
        names = {n: n if n.startswith(outside) else prefix + n for n in self.infos}
        self.infos = {names[n]: info for n, info in self.infos.items()}

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
        self._in_file = {new: self.stored_name(old) for new, old in taken.items()}

    def join(self, name: str, parts: Sequence[str], shape: Sequence[int]) -> None:
        """Let tensors of one dtype count as one tensor ``name``: their values after each other, in this order."""
        found = tuple(self.infos.pop(part) for part in parts)
        self.infos[name] = replace(found[0], shape=tuple(shape), parts=found)

    def stored_name(self, name: str) -> str:
        """What the file calls a tensor, or would call another tensor of the same module."""
        if name in self._in_file:
            return self._in_file[name]
        module, _, leaf = name.rpartition(".")
        beside = self._in_file.get(f"{module}.weight")
        return name if beside is None else f"{beside.removesuffix('weight')}{leaf}"

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor, read and not mapped: pages of a mapped shard count as resident memory. In its stored dtype, but
        for float8 and MXFP4 codes, which come multiplied by their scales."""
        return self._values(name, self.infos[name])

    def rows(self, name: str, indices: torch.Tensor) -> torch.Tensor:
        """Rows ``[count, ...]`` of a tensor by their numbers, int64 ``[count]`` and rising, as `tensor` has them. Of a
        tensor that is stored as it is read, no other row is read."""
        info = self.infos[name]
        assert not len(indices) or 0 <= int(indices[0]) <= int(indices[-1]) < info.shape[0], f"{name}: no such row"
        if info.parts or info.codes is not None:
            return self.tensor(name)[indices]
        made, width = torch.empty(len(indices), *info.shape[1:], dtype=info.dtype), info.nbytes // info.shape[0]
        first = 0
        for run in indices.tensor_split((indices.diff() != 1).nonzero().flatten() + 1):  # of rows side by side
            own = made[first : first + len(run)]
            if len(run):
                own.copy_(self._read(name, info, own.nbytes, int(run[0]) * width).view(info.dtype).view(own.shape))
            first += len(run)
        return made

    def _values(self, name: str, info: TensorInfo) -> torch.Tensor:
        if info.parts:
            return torch.cat([self._values(name, part).flatten() for part in info.parts]).view(info.shape)
        if info.codes is None or info.scale is None:
            return self._plain(name, info)
        scale = self._plain(name, info.scale)
        if info.codes == torch.uint8:
            codes = self._read(name, info, info.numel // 2).view(*scale.shape, -1)
            return mxfp4.dequantized(codes, scale).to(self.computed or info.dtype)
        codes = self._read(name, info, info.numel).view(info.codes).view(info.shape)
        return dequantized(name, codes, scale).to(self.computed or info.dtype)

    def _plain(self, name: str, info: TensorInfo) -> torch.Tensor:
        return self._read(name, info, info.nbytes).view(info.dtype).view(info.shape)

    def piece_bytes(self, name: str, most: int) -> int:
        """How many bytes of a tensor `pieces` has in memory at a time: ``most`` (a multiple of 8), or all of them where
        it has fewer or is made of several tensors."""
        info = self.infos[name]
        return info.nbytes if info.parts or info.codes is not None else min(most, info.nbytes)

    def pieces(self, name: str, most: int) -> Iterator[torch.Tensor]:
        """The values of a tensor in their order, ``[count]`` in its stored dtype, `piece_bytes` at a time."""
        info, step = self.infos[name], self.piece_bytes(name, most)
        if step == info.nbytes:
            yield self.tensor(name).flatten()
            return
        for first in range(0, info.nbytes, step):
            yield self._read(name, info, min(step, info.nbytes - first), first).view(info.dtype)

    def first_bytes(self, name: str, count: int) -> bytes:
        """The first ``count`` bytes of a tensor as stored, or all where it has fewer."""
        info = self.infos[name]
        info = info.parts[0] if info.parts else info
        stored = info.nbytes if info.codes is None else info.numel // (2 if info.codes == torch.uint8 else 1)
        return self._read(name, info, min(count, stored)).numpy().tobytes()

    def _read(self, name: str, info: TensorInfo, n_bytes: int, first: int = 0) -> torch.Tensor:
        """uint8 ``[n_bytes]`` of a tensor from its byte ``first`` on."""
        data = torch.empty(n_bytes, dtype=torch.uint8)
        try:
            file = self._opened(info.shard)
            file.seek(info.start + first)
            view = memoryview(data.numpy().data)
            while view:
                count = file.readinto(view)
                if not count:
                    raise OSError("the file ends early")
                view = view[count:]
        except OSError as error:
            raise ToolkitError(f"{self.folder / info.shard}: cannot read {name} ({error})", "fetch it again") from None
        return data

    def expect(self, names: Iterable[str]) -> None:
        """Tell the system, where it listens, which tensors are read next: it fetches them from the disk meanwhile."""
        with suppress(OSError):  # a file that is gone is named when it is read
            if not hasattr(os, "posix_fadvise"):
                return
            for part in (part for name in names for part in self.infos[name].parts or (self.infos[name],)):
                os.posix_fadvise(self._opened(part.shard).fileno(), part.start, part.nbytes, os.POSIX_FADV_WILLNEED)

    def again(self) -> Self:
        """The same tensors by open files of its own, for another thread."""
        other = copy.copy(self)
        other._open = {}
        return other

    def _opened(self, shard: str) -> Any:
        if shard not in self._open:
            self._open[shard] = (self.folder / shard).open("rb", buffering=0)
        return self._open[shard]

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
    if not (folder / "config.json").exists():
        raise _no_config(folder)
    return read_json(folder / "config.json")


def _no_config(folder: Path) -> ToolkitError:
    """What a folder without ``config.json`` holds instead of a model, as far as it shows."""
    fix = "name a folder that holds a Hugging Face checkpoint"
    adapter = folder / "adapter_config.json"
    if adapter.exists():
        try:
            base = str(read_json(adapter).get("base_model_name_or_path"))
        except ToolkitError:
            base = "its base model"
        return ToolkitError(
            f"{folder}: an adapter of {base}, not a model",
            f"merge it first: PeftModel.from_pretrained(base, '{folder.name}').merge_and_unload().save_pretrained(...)",
        )
    if any(folder.glob("tokenizer*")) and not any(folder.glob("*.safetensors")):
        return ToolkitError(f"{folder}: a tokenizer without a model (no config.json, no *.safetensors)", fix)
    return ToolkitError(f"{folder / 'config.json'}: no such file", fix)


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn a full disk, a read-only folder and the like into an error that names the path."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if short_of_memory(error):
            raise
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
    """Write a file under a temporary name, fsync, rename. Every file of ours that is no checkpoint is written here.

    Links are followed, so that the file they name is replaced and not the link. What is there and no regular file (a
    pipe, ``/dev/stdout``) is written to: renaming over it would turn it into a file.

    Raises:
        ToolkitError: ``path`` is a folder, or the disk does not take it; nothing is left behind.
    """
    with disk_errors(path):
        path = path.resolve() if path.is_symlink() else path
        mode = path.stat().st_mode if path.exists() else stat.S_IFREG
        if stat.S_ISDIR(mode):
            raise ToolkitError(f"{path}: is a folder", "name a file in it")
        if not stat.S_ISREG(mode):
            with path.open("wb", buffering=0) as device:
                device.write(data)
            return
        temporary = path.with_name(f"{path.name}.tmp")
        try:
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.rename(path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
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
