"""The data sets of the Hugging Face hub that the literature calibrates and scores on, and how each is used.

Sources of the conventions: GPTQ (Frantar et al. 2022, arXiv 2210.17323; the "new" variants of C4 and PTB) and AWQ (Lin
et al. 2023, arXiv 2306.00978; the Pile).
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from calibration.errors import ToolkitError

Purpose = Literal["calibrate", "score"]
Builder = Literal["text", "documents", "blocks", "chats"]


class Unreachable(ToolkitError):
    """A data set of the hub that is not cached, while the hub does not answer."""


ZSTANDARD = "pip install 'ptq[pile]'"
C4_SCORED_DOCUMENTS = 1100
C4_SCORED_WINDOWS = 256
CHATS = 2048  # of a set of conversations, the first: a million tokens or more


@dataclass(frozen=True)
class HubSplit:
    """One split: its name, the files of the repository that hold it (None: as the repository declares), its joiner."""

    split: str
    files: str | None
    joiner: str | None


@dataclass(frozen=True)
class HubSet:
    """A data set of the hub and how the literature uses it.

    Attributes:
        builder: how calibration windows are cut, see `calibration.text.crops.calibration_tokens`.
        score: None where there is no published protocol for scoring on it.
        first_rows, max_windows: limits of the scoring protocol; of conversations the first so many are read.
        zstandard: its files are compressed so; `datasets` reads them only where the package of that name is installed.
    """

    repo: str
    config: str | None
    column: str
    revision: str | None
    builder: Builder
    calibrate: HubSplit
    score: HubSplit | None
    first_rows: int | None = None
    max_windows: int | None = None
    zstandard: bool = False

    @property
    def source(self) -> str:
        """``Salesforce/wikitext wikitext-2-raw-v1``."""
        return " ".join(part for part in (self.repo, self.config) if part)


HUB_SETS: dict[str, HubSet] = {
    "wikitext2": HubSet(
        repo="Salesforce/wikitext",
        config="wikitext-2-raw-v1",
        column="text",
        revision=None,
        builder="text",
        calibrate=HubSplit("train", None, "\n\n"),
        score=HubSplit("test", None, "\n\n"),
    ),
    # No configuration name: with one, `datasets` expects all 1024 shards.
    "c4": HubSet(
        repo="allenai/c4",
        config=None,
        column="text",
        revision=None,
        builder="documents",
        calibrate=HubSplit("train", "en/c4-train.00000-of-01024.json.gz", None),
        score=HubSplit("validation", "en/c4-validation.00000-of-00008.json.gz", " "),
        first_rows=C4_SCORED_DOCUMENTS,
        max_windows=C4_SCORED_WINDOWS,
    ),
    # The main branch holds a loading script, which datasets >= 4 refuses; the hub keeps its own parquet conversion.
    "ptb": HubSet(
        repo="ptb-text-only/ptb_text_only",
        config=None,
        column="sentence",
        revision="refs/convert/parquet",
        builder="text",
        calibrate=HubSplit("train", "penn_treebank/train/*.parquet", " "),
        score=HubSplit("test", "penn_treebank/test/*.parquet", " "),
    ),
    "pileval": HubSet(
        repo="mit-han-lab/pile-val-backup",
        config=None,
        column="text",
        revision=None,
        builder="blocks",
        calibrate=HubSplit("validation", None, None),
        score=None,
        zstandard=True,
    ),
    "ultrachat": HubSet(
        repo="HuggingFaceH4/ultrachat_200k",
        config=None,
        column="messages",
        revision=None,
        builder="chats",
        calibrate=HubSplit("train_sft", None, None),
        score=HubSplit("test_sft", None, None),
        first_rows=CHATS,
    ),
    "open-platypus": HubSet(
        repo="garage-bAInd/Open-Platypus",
        config=None,
        column="instruction",
        revision=None,
        builder="chats",
        calibrate=HubSplit("train", None, None),
        score=None,
        first_rows=CHATS,
    ),
}


def check_readable(name: str) -> None:
    """Refuse a known set whose files could not be read here.

    Raises:
        ToolkitError: names the package that is missing.
    """
    if HUB_SETS[name].zstandard and importlib.util.find_spec("zstandard") is None:
        raise ToolkitError(f"--dataset {name}: its files are .zst, and zstandard is not installed", ZSTANDARD)


def load_hub_split(hub: HubSet, part: HubSplit, hub_root: Path | None) -> tuple[Sequence[Any], str]:
    """The rows of one split (lazily read; of conversations the first so many, as dictionaries) and the commit they come
    from ("" where unknown).

    Args:
        hub_root: folder with local copies of hub repositories, read instead of the hub.

    Raises:
        ToolkitError: neither cached nor reachable, or not what the hub has.
    """
    arguments: dict[str, Any] = {"split": part.split}
    if part.files is not None:
        arguments["data_files"] = {part.split: part.files}
    location = hub.repo if hub_root is None else str(hub_root / hub.repo)
    if hub_root is None:
        arguments |= {"name": hub.config, "revision": hub.revision}
    elif hub.config is not None:
        # Configurations are declared in the repository's README; a copy without one still has their folders.
        declared = (hub_root / hub.repo / "README.md").is_file()
        arguments["name" if declared else "data_dir"] = hub.config
    dataset = load_dataset(location, hub.source, arguments)
    revision = _revision(dataset.info.download_checksums)
    if hub.builder == "chats":
        text_column(dataset, hub.source, (hub.column,))
        return dataset.select(range(min(len(dataset), hub.first_rows or len(dataset)))), revision
    return text_column(dataset, hub.source, (hub.column,)), revision


def load_dataset(location: str, label: str, arguments: dict[str, Any]) -> Any:
    """``datasets.load_dataset`` with its many exceptions turned into one error."""
    import datasets

    fix = "give a local text with --dataset FILE.txt, FILE.jsonl or FILE.parquet, or connect once to cache it"
    try:
        with _without_waiting(location):
            return datasets.load_dataset(location, **arguments)
    except (ConnectionError, TimeoutError) as error:
        raise Unreachable(f"data set {label}: not cached, and the hub cannot be reached ({error})", fix) from None
    except ImportError as error:
        fix = f"pip install {error.name}" if error.name else ZSTANDARD
        raise ToolkitError(f"data set {label}: {error}", fix) from None
    except Exception as error:
        reason = str(error).split("\n")[0]
        if "zstd" in reason:  # the Pile's file; `datasets` reads it only where this package is
            fix = ZSTANDARD
        raise ToolkitError(f"data set {label}: {type(error).__name__}: {reason}", fix) from error


@contextmanager
def _without_waiting(location: str) -> Iterator[None]:
    """The hub's client asks an unreachable hub for a minute, file by file. Asked once here; where nothing answers, the
    cache alone is read."""
    import datasets
    import huggingface_hub

    if Path(location).is_dir() or huggingface_hub.constants.HF_HUB_OFFLINE:
        yield
        return
    answered = False
    with suppress(Exception):  # the client's own kinds, which change with its version
        huggingface_hub.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=10)
        answered = True
    if answered:
        yield
        return
    before = datasets.config.HF_HUB_OFFLINE
    huggingface_hub.constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        huggingface_hub.constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = False, before


def text_column(dataset: Any, label: str, names: Sequence[str]) -> Sequence[str]:
    for name in names:
        if name in dataset.column_names:
            column: Sequence[str] = dataset[name]
            return column
    raise ToolkitError(
        f"data set {label}: no column '{names[0]}' (found: {', '.join(dataset.column_names)})",
        f"rename the text column to '{names[0]}'",
    )


def _revision(checksums: dict[str, Any] | None) -> str:
    """The commit in ``hf://datasets/Salesforce/wikitext@<commit>/...``, or "" for local files."""
    for url in checksums or {}:
        found = re.search(r"@([0-9a-f]{40})/", url)
        if found:
            return found.group(1)
    return ""
