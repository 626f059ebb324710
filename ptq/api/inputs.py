"""What a caller has in memory, as the files that everything else reads: models, texts, and a display of progress.

A checkpoint is read block by block, and a text through the readers of files, whatever they come from. So what is in
memory is written to a temporary folder (see `tempfile.tempdir`) for the length of the call, and gives the same bytes
as the file it stands for.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Union

from calibration.errors import ToolkitError
from calibration.progress import CallbackProgress, Progress, Silent

if TYPE_CHECKING:
    import datasets
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Model = Union[str, Path, "PreTrainedModel"]
"""A folder, a hub id, ``demo``, or a transformers model in memory."""

Text = Union[str, Path, Sequence[str], "datasets.Dataset", "torch.Tensor"]
"""A known set, a file, texts, a data set with a column ``text``, or token ids ``[n, seq_len]``."""

Display = Progress | Callable[[str, int, int, str], None]
"""A `Progress`, or what is called with (stage, units done, units in all, detail)."""

TEXT_COLUMNS = ("text", "sentence")
NO_TEXT = "pass a name, a file, a list of strings, a datasets.Dataset or a tensor of token ids"


class Tokenizer(Protocol):
    """Whatever has ``save_pretrained``."""

    def save_pretrained(self, save_directory: str | Path, /) -> Any: ...


def display(progress: Display | None) -> Progress:
    """A caller's display as the `Progress` that the library talks to."""
    if progress is None:
        return Silent()
    return progress if hasattr(progress, "stage") else CallbackProgress(progress)  # type: ignore[return-value]


@contextmanager
def checkpoint(model: Model, tokenizer: PreTrainedTokenizerBase | None = None) -> Iterator[str | Path]:
    """A model as a folder, hub id or ``demo``; one in memory as a temporary checkpoint with its tokenizer.

    Raises:
        ToolkitError: a model in memory without a tokenizer, or a tokenizer for a model that has its own.
    """
    if isinstance(model, (str, Path)):
        if tokenizer is not None:
            fix = "leave tokenizer out, or pass the model itself"
            raise ToolkitError(f"tokenizer: {model} has its own", fix)
        yield model
        return
    if not hasattr(model, "save_pretrained"):
        raise ToolkitError(f"model: a {type(model).__name__}", "pass a folder, a hub id, or a transformers model")
    if tokenizer is None:
        raise ToolkitError("model: one in memory comes without its tokenizer", "pass tokenizer= too")
    with tempfile.TemporaryDirectory(prefix="ptq-") as place:
        known = str(getattr(model, "name_or_path", "") or getattr(model.config, "model_type", ""))
        folder = Path(place) / (Path(known).name or "model")
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        yield folder


@contextmanager
def text_file(dataset: Text | None) -> Iterator[str | None]:
    """A text as the name or file that stands for it: strings and rows of a data set as a ``.jsonl`` file, token ids as
    a ``.safetensors`` file.

    Raises:
        ToolkitError: none of these, empty, or without a column of text.
    """
    if dataset is None or isinstance(dataset, (str, Path)):
        yield None if dataset is None else str(dataset)
        return
    with tempfile.TemporaryDirectory(prefix="ptq-") as place:
        yield str(_write_ids(dataset, Path(place)) if _is_tensor(dataset) else _write_rows(dataset, Path(place)))


def _is_tensor(dataset: Any) -> bool:
    import torch

    return isinstance(dataset, torch.Tensor)


def _write_ids(ids: Any, folder: Path) -> Path:
    import torch
    from safetensors.torch import save_file

    if ids.ndim != 2 or ids.is_floating_point() or not ids.numel():
        found = f"{ids.dtype} {list(ids.shape)}".removeprefix("torch.")
        raise ToolkitError(f"dataset: a tensor of {found}", "pass token ids, integers [n, seq_len]")
    path = folder / "ids.safetensors"
    save_file({"input_ids": ids.detach().cpu().to(torch.int64).contiguous()}, path)
    return path


def _write_rows(dataset: Any, folder: Path) -> Path:
    path = folder / "texts.jsonl"
    with path.open("w", encoding="utf-8") as file:
        count = 0
        for row in _rows(dataset):
            if not isinstance(row, str):
                raise ToolkitError(f"dataset: a {type(row).__name__} where a text was expected", NO_TEXT)
            file.write(json.dumps({"text": row}) + "\n")
            count += 1
    if not count:
        raise ToolkitError("dataset: no texts in it", NO_TEXT)
    return path


def _rows(dataset: Any) -> Iterable[Any]:
    columns = getattr(dataset, "column_names", None)
    if columns is None:
        if not isinstance(dataset, Iterable):
            raise ToolkitError(f"dataset: a {type(dataset).__name__}", NO_TEXT)
        return dataset
    if isinstance(columns, dict):
        raise ToolkitError(f"dataset: has the splits {', '.join(columns)}", "pass one of them")
    column = next((name for name in TEXT_COLUMNS if name in columns), None)
    if column is None:
        raise ToolkitError(f"dataset: no column of text (found: {', '.join(columns)})", "rename the column to 'text'")
    return (row[column] for row in dataset)
