"""That the processes which share a command are about to do the same with the same model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from calibration.distributed import Processes, idle_words
from calibration.model.contents import small_digest
from calibration.model.opening import open_model, weights_fingerprint
from calibration.progress import Progress
from calibration.versions import versions


def refuse_other_models(
    processes: Processes, folder: Path, facts: Mapping[str, Any], trust_remote_code: bool = False
) -> None:
    """Refuse a command whose processes have different models, versions, numbers of threads, or other ``facts``.

    Raises:
        ToolkitError: names what differs.
    """
    if processes.size == 1:
        return
    reader, _, _ = open_model(folder, trust_remote_code)
    with reader:
        weights = weights_fingerprint(reader)
    same = {"weights": weights, "files": small_digest(folder), "versions": versions()}
    processes.refuse_differences({**same, "threads": torch.get_num_threads(), **facts})


def tell_idle(processes: Processes, batches: int, progress: Progress) -> None:
    """Say where some processes have nothing to do."""
    words = idle_words(processes.size, batches)
    if words is not None:
        progress.message(words)
