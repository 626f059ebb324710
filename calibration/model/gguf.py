"""A GGUF file as a source model: float weights one tensor at a time, config and tokenizer as files beside it.

``model.gguf`` becomes a folder in the user's cache with ``config.json`` (made by transformers' reader of GGUF), the
tokenizer and a link to the file; everything that takes a folder then takes it. Weights are dequantized when they
are read, by the ``gguf`` package, into bfloat16 (float16 or float32 where the file's matrices are).
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from calibration.errors import ToolkitError, foreign
from calibration.model.checkpoint import CheckpointReader, TensorInfo, read_config, write_atomically
from calibration.model.gguf_families import FAMILIES, checkpoint_name, complete, norm_shift, paired_rows
from calibration.model.pretokenizers import byte_level_tokenizer

SUFFIX = ".gguf"
LINK = "source.gguf"
VERSIONS = (2, 3)
_FLOATS = {"F16": torch.float16, "F32": torch.float32, "BF16": torch.bfloat16}


def cache_folder() -> Path:
    """Where folders for GGUF files are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ptq" / "gguf"


def folder_of(path: Path) -> Path:
    """The folder that stands for a GGUF file, made where it is not there yet.

    Raises:
        ToolkitError: the package ``gguf`` is missing; not a GGUF file, truncated, or of an architecture or tokenizer
            that is not read.
    """
    file = path.resolve()
    stamp = file.stat()
    key = hashlib.sha256(f"{file} {stamp.st_size} {stamp.st_mtime_ns} 1".encode()).hexdigest()[:16]
    folder = cache_folder() / f"{file.stem}-{key}"
    if folder.is_dir():
        return folder
    with foreign(f"{path}: not readable as GGUF", "fetch the file again"):
        config = _config(file, open_file(path))
    partial = folder.with_name(f"{folder.name}.{os.getpid()}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        with foreign(f"{path}: no tokenizer that is read", "name the original model"):
            _save_tokenizer(file, partial)
        write_atomically(partial / "config.json", (json.dumps(config, indent=1, sort_keys=True) + "\n").encode())
        (partial / LINK).symlink_to(file)
        with foreign(f"{path}: not readable as GGUF", "fetch the file again"):
            GgufReader(partial)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def file_of(folder: Path) -> Path | None:
    """The GGUF file for which a folder stands, None for other folders."""
    link = folder / LINK
    return link.resolve() if link.is_symlink() else None


def said(folder: Path, name: str = "") -> str:
    """What a message calls a model's folder, or a file in it: the GGUF file where the folder stands for one."""
    return str(file_of(folder) or (folder / name if name else folder))


def open_file(path: Path) -> Any:
    """The ``gguf`` package's reader of a file, every tensor of which is inside it.

    Raises:
        ToolkitError: see `folder_of`.
    """
    try:
        import gguf
    except ImportError:
        raise ToolkitError(f"{path}: the package 'gguf' is not installed", "pip install 'ptq[gguf]'") from None
    _check_version(path)
    try:
        reader = gguf.GGUFReader(path)
    except (OSError, ValueError, IndexError, KeyError, TypeError, OverflowError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ToolkitError(f"{path}: not readable as GGUF ({reason})", "fetch the file again") from None
    _check_places(path, reader)
    return reader


def let_go(reader: Any) -> None:
    """Give back the pages of a mapped file that were read: until then they count as resident memory, in the end all
    of the file. They are read again where they are wanted again."""
    mapped = reader.data.base
    if isinstance(mapped, mmap.mmap) and hasattr(mapped, "madvise"):
        mapped.madvise(mmap.MADV_DONTNEED)


def _check_places(path: Path, reader: Any) -> None:
    """Refuse tensors that do not lie one behind the other, as GGUF has them: one wrong number in the table, and a
    weight is read from the bytes of another."""
    end = reader.data_offset
    for tensor in reader.tensors:
        expected = end + -end % reader.alignment
        if tensor.data_offset != expected:
            raise ToolkitError(
                f"{path}: not readable as GGUF ({tensor.name} lies at byte {tensor.data_offset}, not {expected})",
                "fetch the file again",
            )
        end = tensor.data_offset + tensor.n_bytes


def _check_version(path: Path) -> None:
    """Refuse versions that the package does not know, which it calls damaged."""
    try:
        with path.open("rb") as file:
            start = file.read(8)
    except OSError as error:
        raise ToolkitError(f"{path}: not readable ({error.strerror})", "name a GGUF file") from None
    version = int.from_bytes(start[4:], "little")
    if start[:4] == b"GGUF" and len(start) == 8 and version not in VERSIONS:
        known = " and ".join(map(str, VERSIONS))
        what = "a big-endian file" if version & 0xFFFF == 0 and version else f"version {version} of GGUF"
        fix = f"versions {known} are read, little-endian: convert the original model again, with an older llama.cpp"
        raise ToolkitError(f"{path}: {what}", fix)


def _config(file: Path, reader: Any) -> dict[str, Any]:
    """config.json: transformers' reading of the keys, and what it leaves out."""
    from transformers import AutoConfig

    architecture = reader.fields["general.architecture"].contents()
    known = {family.architecture for family in FAMILIES.values()}
    if architecture not in known:
        raise ToolkitError(
            f"{file}: architecture '{architecture}' is not read from GGUF", f"read are {', '.join(sorted(known))}"
        )
    try:
        config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name).to_dict()
    except (ValueError, KeyError, OSError) as error:
        raise ToolkitError(f"{file}: {' '.join(str(error).split())}", "name the Hugging Face checkpoint") from None
    shapes = {tensor.name: tuple(int(n) for n in tensor.shape) for tensor in reader.tensors}
    if "token_embd.weight" not in shapes or not {"blk.0.attn_q.weight", "blk.0.attn_qkv.weight"} & set(shapes):
        raise ToolkitError(f"{file}: tensors are missing", "fetch the file again; a split file is joined first")
    prefix = f"{architecture}."
    keys = {n.removeprefix(prefix): f.contents() for n, f in reader.fields.items() if n.startswith(prefix)}
    config = complete(config, keys, shapes)
    if "rope_freqs.weight" in shapes and config["rope_parameters"].get("rope_type") != "llama3":
        raise ToolkitError(f"{file}: rotary factors that its settings do not explain", "name the original checkpoint")
    return config


def _save_tokenizer(file: Path, folder: Path) -> None:
    """Byte-level BPE whose pre-tokenizer has a name known here is made from the keys; for others transformers' reader
    has to guess the pattern."""
    keys = {n: f.contents() for n, f in open_file(file).fields.items() if n.startswith("tokenizer.")}
    tokenizer = byte_level_tokenizer(keys)
    if tokenizer is None:
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        except (ValueError, KeyError, OSError, TypeError, AttributeError) as error:
            reason = " ".join(str(error).split())
            raise ToolkitError(f"{file}: no tokenizer that is read ({reason})", "name the original model") from None
    tokenizer.save_pretrained(folder)


class GgufReader(CheckpointReader):
    """`CheckpointReader` on the folder of a GGUF file: names, shapes and rows of the Hugging Face checkpoint."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = read_config(folder)
        self._tensors: dict[str, Any] = {}
        self.infos, self._in_file, self._open = {}, {}, {}
        self._file = open_file(folder / LINK)
        tensors = self._file.tensors
        matrices = [_FLOATS.get(t.tensor_type.name) for t in tensors if len(t.shape) == 2]
        quantized = any(dtype is None for dtype in matrices)
        dtype = torch.bfloat16 if quantized else next((d for d in matrices if d is not None), torch.float32)
        for tensor in tensors:
            name = checkpoint_name(tensor.name, str(self.config["model_type"]))
            if name is None:
                if tensor.name != "rope_freqs.weight":
                    raise ToolkitError(f"{said(folder)}: tensor {tensor.name!r} is not known", "name the original")
                continue
            shape = tuple(int(n) for n in reversed(tensor.shape))
            self.infos[name] = TensorInfo(dtype, shape, LINK)
            order = paired_rows(name, self.config)
            if order is not None and len(order) != shape[0]:
                raise ToolkitError(
                    f"{said(folder)}: {tensor.name} has {shape[0]} rows, the settings of its heads say {len(order)}",
                    "fetch the file again",
                )
            self._tensors[name] = tensor

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor dequantized, in ``computed``, or else the dtype of its entry in ``infos``."""
        import gguf

        stored = self._tensors[self.stored_name(name)]
        values = torch.tensor(gguf.quants.dequantize(stored.data, stored.tensor_type))
        values = values.view(self.infos[name].shape) - norm_shift(name, self.config)
        order = paired_rows(name, self.config)
        if order is not None:
            values[order] = values.clone()
        return values.to(self.computed or self.infos[name].dtype)

    def rows(self, name: str, indices: torch.Tensor) -> torch.Tensor:
        """Rows of an embedding, of which the others are not dequantized."""
        import gguf

        stored = self._tensors[self.stored_name(name)]
        assert paired_rows(name, self.config) is None, f"{name}: its rows lie in another order"
        values = torch.tensor(gguf.quants.dequantize(stored.data[indices.numpy()], stored.tensor_type))
        values = values.view(len(indices), *self.infos[name].shape[1:]) - norm_shift(name, self.config)
        return values.to(self.computed or self.infos[name].dtype)

    def close(self) -> None:
        """Give its pages back. Reading another tensor reads them again."""
        let_go(self._file)

    def expect(self, names: Iterable[str]) -> None:
        """The file is mapped: what is read next comes when it is touched."""

    def piece_bytes(self, name: str, most: int) -> int:
        """All of them: tensors are dequantized as a whole."""
        return self.infos[name].nbytes

    def first_bytes(self, name: str, count: int) -> bytes:
        """The first bytes as they are stored."""
        data = self._tensors[self.stored_name(name)].data
        return bytes(data.reshape(-1).view("uint8")[:count].tobytes())


def open_reader(folder: Path) -> CheckpointReader:
    """The reader that fits a folder."""
    return GgufReader(folder) if (folder / LINK).exists() else CheckpointReader(folder)
