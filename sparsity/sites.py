"""`Site`: one place of a model where small activations are replaced, and the rule that says which.

Two kinds of places skip weights when one token is decoded. ``input``: what a linear reads is pruned, so columns of its
weight are skipped (SCAP, TEAL; the query and output projections of CHESS). ``output``: what a gated feed-forward
network's nonlinearity gives is pruned, so rows of ``up`` and columns of ``down`` are skipped (CATS, CHESS).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch

Mode = Literal["input", "output"]
MODES: tuple[str, ...] = get_args(Mode)


@dataclass(frozen=True)
class Site:
    """Prune where ``|x - center| <= threshold``: such values become ``center``.

    Attributes:
        linear: path of a linear in the model class. ``input``: the linear whose input is pruned. ``output``: the gate;
            ``act(gate(x))`` is pruned, before it is multiplied by ``up(x)``.
        mode: see above.
        threshold: float32 ``[1]`` or one per channel ``[n]``, not negative; n is the width of what is pruned.
        center: float32 ``[1]`` or ``[n]``; None: 0. Only in mode ``input``.
        shift: float32 ``[out]``, ``W @ center``: with it ``x Wᵀ + b == (x - center) Wᵀ + (b + shift)``, so that only
            columns of values that are not pruned are read (SCAP). None where there is no center.
    """

    linear: str
    mode: Mode
    threshold: torch.Tensor
    center: torch.Tensor | None = None
    shift: torch.Tensor | None = None

    @property
    def name(self) -> str:
        """``model.layers.0.mlp.down_proj.input``: unique in a model."""
        return f"{self.linear}.{self.mode}"


def small(x: torch.Tensor, threshold: torch.Tensor, center: torch.Tensor | None = None) -> torch.Tensor:
    """Bool ``[..., n]``: where ``|x - center| <= threshold``, compared in float32 (float64 for float64).

    Thresholds in 16 bits would move the sparsity by up to 0.3 points, and 16-bit differences to a center lose digits
    (sources: CHESS, arXiv 2409.01366; SCAP, arXiv 2412.07174). NaN is not small.

    Args:
        x: ``[..., n]``, any float dtype.
        threshold, center: ``[1]`` or ``[n]``.
    """
    wide = x if x.dtype == torch.float64 else x.float()
    if center is not None:
        wide = wide - center.to(wide.dtype)
    return wide.abs() <= threshold.to(wide.dtype)


def prune(x: torch.Tensor, threshold: torch.Tensor, center: torch.Tensor | None = None) -> torch.Tensor:
    """``x`` with every small value replaced by the center (or 0), in the dtype of x. Arguments as in `small`."""
    replacement = torch.zeros(1, dtype=x.dtype, device=x.device) if center is None else center.to(x.dtype)
    return torch.where(small(x, threshold, center), replacement, x)
