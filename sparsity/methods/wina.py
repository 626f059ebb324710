"""WINA (Chen et al. 2025, arXiv 2505.19427): values count by the weights that they meet.

Leaving x_i out changes the output of a linear by x_i times column i of W, so |x_i| ||W_:,i|| ranks values where |x_i|
alone ranks them as if all columns were equal. Linears that read one tensor rank it differently. The paper keeps the K
largest of every token and turns some weights so that their columns are orthogonal; here, as in TEAL, a threshold per
channel holds for all tokens, so that it can be compared inside a kernel, and weights stay as they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from calibration.walk.segment import Segment
from sparsity.methods.teal import Teal


@dataclass(frozen=True)
class Wina(Teal):
    """Prune what matters least in what every linear reads, with shares spread as by TEAL; settings as there."""

    name: ClassVar[str] = "wina"
    title: ClassVar[str | None] = "WINA"
    summary: ClassVar[str] = "prunes what every linear reads by size times the norm of the weights that it meets"

    def importance(self, segment: Segment, linear: str) -> torch.Tensor:
        """The norm of every column of the weight."""
        return segment.weight(linear).float().norm(dim=0)
