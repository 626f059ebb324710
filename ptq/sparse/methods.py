"""The methods of both packages, by the names that recipes use."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from calibration.errors import ToolkitError
from calibration.model.opening import locate
from calibration.walk.passes import Pass
from ptq.methods import METHODS as QUANTIZERS
from sparsity.files import load_sparsity
from sparsity.gate import GatePass
from sparsity.methods import METHODS as SPARSIFIERS


def all_methods(target: str | None) -> dict[str, Callable[..., Pass]]:
    """Methods of both packages; ``target`` is that of the sparsifying ones."""
    return {**QUANTIZERS, **sparsifiers(target)}


def sparsifiers(target: str | None, **settings: Any) -> dict[str, Callable[..., GatePass]]:
    """The methods of activation sparsity with a target as typed: ``0.5``, or shares by name (``down_proj=0.6,*=0.4``).

    Raises:
        ToolkitError: not a number, nor shares by name; a method that takes no shares by name.
    """
    if target is None:
        return dict(SPARSIFIERS)
    if "=" not in target:
        try:
            settings["target"] = float(target)
        except ValueError:
            raise ToolkitError(f"--target {target}: not a number", "use 0.5, or NAME=SHARE,NAME=SHARE") from None
        return {name: functools.partial(method, **settings) for name, method in SPARSIFIERS.items()}
    return {
        name: functools.partial(method, **{**settings, "targets": target})
        for name, method in SPARSIFIERS.items()
        if "targets" in getattr(method, "__dataclass_fields__", {})
    }


def refuse_sparse(model: str | Path) -> None:
    """Quantizing changes the weights that thresholds were made for.

    Raises:
        ToolkitError: MODEL has thresholds.
    """
    folder = locate(model)
    if load_sparsity(folder) is not None:
        raise ToolkitError(
            f"{folder}: has activation thresholds, which do not fit quantized weights",
            "quantize the dense checkpoint, with --method awq+scap --target 0.5 for new thresholds at once",
        )
