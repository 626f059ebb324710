"""Which files of a folder belong to its checkpoint, and what they hold: the list for copying and for telling models
apart. A folder also holds what must not travel: git histories, optimizer states, pickles, links to anywhere."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from calibration.errors import ToolkitError
from calibration.model.checkpoint import CheckpointReader
from calibration.model.reading import file_digest, inside
from calibration.threads import one_thread

PIECE_BYTES = 1 << 20  # of a tensor at a time: small enough for memory that was just freed to be taken again
SMALL_FILES = (
    "*.json",
    "*.model",
    "*.txt",
    "*.tiktoken",
    "*.jinja",
    "additional_chat_templates/*.jinja",
    "*.py",
    "LICENSE*",
    "NOTICE*",
)
"""Patterns of what lies beside the weights and belongs to the model."""


def small_files(folder: Path) -> list[Path]:
    """Files beside the weights, sorted by name: regular ones that lie in the folder. Left out are hidden files, shard
    indices, and links that lead out of the folder (but not into the blobs of a hub cache): their content is not part of
    the checkpoint, and must not end up in a folder made for uploading."""
    found = {path for pattern in SMALL_FILES for path in folder.glob(pattern)}
    return sorted(
        path
        for path in found
        if not path.name.startswith(".") and not path.name.endswith(".index.json") and inside(path, folder)
    )


def checkpoint_files(folder: Path) -> list[Path]:
    """`small_files`, and the safetensors files and indices of the weights."""
    weights = [path for pattern in ("*.safetensors", "*.index.json") for path in folder.glob(pattern)]
    return sorted({*small_files(folder), *(path for path in weights if path.is_file())})


def small_digest(folder: Path) -> str:
    """sha256 (first 16 hex digits) over names and contents of the `small_files`."""
    digest = hashlib.sha256()
    for path in small_files(folder):
        digest.update(f"{path.relative_to(folder)} {file_digest(path)} ".encode())
    return digest.hexdigest()[:16]


def check_weights(reader: CheckpointReader, advance: Callable[[str], None] | None = None) -> str:
    """Read every tensor once, in file order; refuse NaN and Inf before any work is done on them.

    Returns:
        sha256 (first 16 hex digits) over names, dtypes, shapes and all bytes: two models of one shape differ in it.

    Raises:
        ToolkitError: names the tensor and how many of its values are not finite.

    Scalars may hold anything: no model of the table has one for a parameter, and the mask value that older GPT-NeoX and
    GPT-2 files carry (``attention.masked_bias``, -1e9) is -inf in float16.
    """
    digest = hashlib.sha256()
    with one_thread(), ThreadPoolExecutor(1) as hashing:  # which lets go of the interpreter: the next piece is read
        for name, info in sorted(reader.infos.items(), key=lambda item: (item[1].shard, item[0])):
            hashed: Future[None] = hashing.submit(digest.update, f"{name} {info.dtype} {info.shape} ".encode())
            bad = 0
            for piece in reader.pieces(name, PIECE_BYTES):
                hashed.result()
                hashed = hashing.submit(_fold, digest, piece)
                bad += _not_finite(piece) if info.dtype.is_floating_point and info.shape else 0
            if bad:
                raise ToolkitError(
                    f"{name} in {info.shard}: {bad} of {info.numel} values are NaN or Inf",
                    "fetch the checkpoint again; if its author's file has them, it cannot be quantized",
                )
            if advance is not None:
                advance(name)
    reader.close()
    return digest.hexdigest()[:16]


def _fold(digest: Any, values: torch.Tensor) -> None:
    digest.update(memoryview(values.reshape(-1).view(torch.uint8).numpy().data))


def _not_finite(values: torch.Tensor) -> int:
    """How many of some values are NaN or Inf."""
    values = values.float() if values.element_size() == 1 else values
    if not values.numel() or all(bool(torch.isfinite(extreme)) for extreme in torch.aminmax(values)):  # NaN is both
        return 0
    return int((~torch.isfinite(values)).sum())
