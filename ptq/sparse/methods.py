"""The methods of both packages, by the names that recipes use."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from calibration.errors import ToolkitError, unknown_value
from calibration.walk.passes import Pass
from ptq.methods import METHODS as QUANTIZERS
from sparsity.files import load_sparsity
from sparsity.gate import GatePass
from sparsity.methods import METHODS as SPARSIFIERS

METHODS: dict[str, type[Pass]] = {**QUANTIZERS, **SPARSIFIERS}

Target = float | str | None
"""Share of activations to prune: ``0.5``, as a number or as typed; or shares by name (``down_proj=0.6,*=0.4``)."""


def all_methods(target: Target = None) -> Mapping[str, Callable[..., Pass]]:
    """`METHODS`, with a target for the sparsifying ones.

    Raises:
        ToolkitError: see `sparsifiers`.
    """
    return METHODS if target is None else {**QUANTIZERS, **sparsifiers(target)}


def check_target(method: str, target: Target) -> None:
    """Refuse a target that no part of a method takes.

    Raises:
        ToolkitError: see above.
    """
    parts = {part.strip() for part in method.split("+")}
    if target is not None and not parts & set(SPARSIFIERS):
        fix = "use awq+scap, or leave it out"
        raise ToolkitError(f"--target {target}: no part of '{method}' prunes activations", fix)


def sparsifier(method: str, target: Target = None) -> GatePass:
    """One method of activation sparsity.

    Raises:
        ToolkitError: an unknown method, a target that it does not take.
    """
    if method not in SPARSIFIERS:
        raise unknown_value("--method", method, SPARSIFIERS)
    known = sparsifiers(target)
    if method not in known:
        raise ToolkitError(f"--target {target}: '{method}' prunes one kind of site", "pass one share, --target 0.5")
    return known[method]()


def sparsifiers(target: Target) -> Mapping[str, Callable[..., GatePass]]:
    """The methods of activation sparsity with a target; where it is shares by name, those that take them.

    Raises:
        ToolkitError: not a number, nor shares by name.
    """
    if target is None:
        return SPARSIFIERS
    settings: dict[str, Any]
    if isinstance(target, str) and "=" in target:
        named = [n for n, m in SPARSIFIERS.items() if "targets" in getattr(m, "__dataclass_fields__", {})]
        settings = {"targets": target}
    else:
        try:
            settings = {"target": float(target)}
        except (TypeError, ValueError):
            raise ToolkitError(f"--target {target}: not a number", "use 0.5, or NAME=SHARE,NAME=SHARE") from None
        named = list(SPARSIFIERS)
    return {name: functools.partial(SPARSIFIERS[name], **settings) for name in named}


def refuse_sparse(folder: Path) -> None:
    """Quantizing changes the weights that thresholds were made for.

    Raises:
        ToolkitError: the checkpoint has thresholds.
    """
    if load_sparsity(folder) is not None:
        raise ToolkitError(
            f"{folder}: has activation thresholds, which do not fit quantized weights",
            "quantize the dense checkpoint, with --method awq+scap --target 0.5 for new thresholds at once",
        )
