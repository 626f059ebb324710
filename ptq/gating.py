"""What runs with activation sparsity need from the package that implements it, which this one does not import.

The command line hands an implementation in. Without one, recipes know no ``GATE`` passes and checkpoints run dense.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from calibration.architectures import ArchitectureSpec
from calibration.walk.passes import Pass


class SparseRuntime(Protocol):
    """Saving thresholds, and pruning by those that are saved."""

    def write(
        self, folder: Path, steps: Sequence[Pass], gates: Mapping[str, torch.Tensor], calibration: Mapping[str, Any]
    ) -> None:
        """Put the thresholds of a finished walk (``segment.gates`` of all blocks) beside the weights in ``folder``."""

    def attach(self, model: Any, spec: ArchitectureSpec, folder: Path, dense: int) -> str:
        """Prune in every forward pass of a model that was loaded from ``folder``, if there are thresholds.

        Args:
            dense: positions at the start of each sequence that are never pruned.

        Returns:
            what was attached, for the record; empty where the checkpoint is not sparse.
        """
