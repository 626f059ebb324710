"""How long the texts of a run are, from their names and the sizes of their files."""

from __future__ import annotations

from pathlib import Path

from calibration.model.checkpoint import CheckpointReader
from calibration.model.opening import DEMO_FOLDER
from calibration.text.corpora import BUILTIN
from ptq.planning.source import Source

CALIBRATED = {"wikitext2": 10_900_000, BUILTIN: (DEMO_FOLDER / "train.txt").stat().st_size}
"""Bytes of the text that calibration tokenizes, by set."""
SCORED = {"wikitext2": 1_290_000, BUILTIN: (DEMO_FOLDER / "test.txt").stat().st_size}
"""Bytes of the text that is scored, by set."""
BYTES_PER_TOKEN = 4.2  # of English, byte-level BPE of 30 to 130 thousand words


def text_bytes(name: str, sets: dict[str, int]) -> int:
    """Bytes of a text file or a known set; 0 for ids, and where nothing is known before it is fetched."""
    if Path(name).suffix == ".safetensors":
        return 0
    return Path(name).stat().st_size if Path(name).is_file() else sets.get(name, 0)


def scored_tokens(source: Source, name: str, windows: int | None) -> int:
    """Tokens of the whole windows that are scored, 0 where the text is not known before it is fetched.

    Args:
        windows: at most so many; None: all.
    """
    path = Path(name)
    if path.suffix == ".safetensors" and path.is_file():
        with CheckpointReader.of_file(path) as file:
            found = file.infos["input_ids"].shape[0] if "input_ids" in file.infos else 0
    else:
        found = int(text_bytes(name, SCORED) / BYTES_PER_TOKEN / source.seq_len)
    return source.seq_len * (found if windows is None else min(found, windows))
