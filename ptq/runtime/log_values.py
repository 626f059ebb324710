"""Logarithmic grids in a running model, simulated: for attention probabilities, and for what enters the last linear of
an MLP (RepQ-ViT, arXiv 2212.08254; AdaLog, arXiv 2407.12951)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from calibration.architectures import ArchitectureSpec
from calibration.errors import ToolkitError, nearest
from calibration.walk.capture import transform_input
from ptq.numerics.log_search import SHIFTS
from ptq.numerics.logarithmic import CANDIDATES, LogQuant, fake_quantize_log, log_sqrt2, signed_log
from ptq.runtime.explicit_attention import Probabilities

BITS = (3, 4, 5, 6, 8)
_GRID = re.compile(r"(log2|log-sqrt2|adalog(\d*))-(\d+)(-published)?")


@dataclass(frozen=True)
class LogGrid:
    """What an option asks for.

    Attributes:
        quant: the grid, or where a search begins.
        search: the base is searched for every layer.
    """

    quant: LogQuant
    search: bool = False


def parse_log_grid(option: str, text: str) -> LogGrid:
    """``log2-4``, ``log-sqrt2-4``, ``adalog20-4`` (base 2^(20/37)) or ``adalog-4`` (base searched), the last number
    being the bits. Behind it ``-published``: zero has no code of its own, which makes 2^bits + 1 values.

    Raises:
        ToolkitError: the text is none of these; ``option`` is named in it.
    """
    found = _GRID.fullmatch(text.strip().lower())
    bits = int(found[3]) if found else 0
    if found is None or bits not in BITS or (found[2] and int(found[2]) not in CANDIDATES):
        closest = nearest(text, ["log2-4", "log-sqrt2-4", "adalog-4", "adalog20-4"])
        choices = f"log2-B, log-sqrt2-B, adalog-B or adalogQ-B, B among {', '.join(map(str, BITS))}, Q from "
        raise ToolkitError(
            f"{option}: unknown grid '{text}'", f"{closest}write {choices}{CANDIDATES[0]} to {CANDIDATES[-1]}"
        )
    quant = log_sqrt2(bits) if found[1] == "log-sqrt2" else LogQuant(bits, int(found[2] or LogQuant.q))
    return LogGrid(replace(quant, zero_code=not found[4]), search=found[2] == "")


def log_probabilities(grid: LogQuant, softmax: Probabilities) -> Probabilities:
    """Attention probabilities on a grid. Keys, values and the product with them stay as they are; masked probabilities
    are exactly zero."""
    return lambda logits: fake_quantize_log(softmax(logits), grid)


def mlp_inputs(spec: ArchitectureSpec) -> list[tuple[str, str | None]]:
    """Path of the last linear of every feed-forward network below the model, and the nonlinearity in front of it;
    None where a gate multiplies, so that values have both signs and no bound."""
    return [
        (f"{spec.blocks}.{index}.{spec.module_name(network.down)}", None if network.gate else network.activation)
        for index in range(spec.n_blocks)
        for network in spec.block(index).feed_forward
    ]


def quantize_mlp_values(model: Any, spec: ArchitectureSpec, grids: LogQuant | Mapping[str, LogQuant]) -> None:
    """From now on what enters the last linear of every feed-forward network is on a grid: one for all, of a sign and a
    magnitude relative to the largest of each token, or searched ones by path (`ptq.runtime.log_search`)."""
    for path, activation in mlp_inputs(spec):
        if isinstance(grids, LogQuant):
            transform = partial(signed_log, quant=grids)
        else:
            transform = partial(fake_quantize_log if activation in SHIFTS else signed_log, quant=grids[path])
        transform_input(model.get_submodule(path), transform)


def describe(option: str, grid: LogGrid, found: Sequence[LogQuant]) -> str:
    """What was simulated, for the line that says how a model was computed."""
    words = f"{option} of {grid.quant.bits} bits simulated"
    words += "" if grid.quant.zero_code else " (zero beside the codes)"
    return words + (f" (searched q: {' '.join(str(quant.q) for quant in found)})" if found else "")
