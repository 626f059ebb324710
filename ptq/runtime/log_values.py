"""Logarithmic grids in a running model, simulated: for attention probabilities, and for what enters the last linear of
an MLP (RepQ-ViT, arXiv 2212.08254; AdaLog, arXiv 2407.12951)."""

from __future__ import annotations

import re
from functools import partial
from typing import Any

from calibration.architectures import ArchitectureSpec
from calibration.capture import transform_input
from calibration.errors import ToolkitError, nearest
from ptq.numerics.logarithmic import CANDIDATES, LogQuant, fake_quantize_log, log_sqrt2, signed_log
from ptq.runtime.explicit_attention import Probabilities

BITS = (3, 4, 5, 6, 8)
_GRID = re.compile(r"(log2|log-sqrt2|adalog(\d+))-(\d+)")


def parse_log_grid(option: str, text: str) -> LogQuant:
    """``log2-4``, ``log-sqrt2-4`` or ``adalog20-4`` (base 2^(20/37)), the last number being the bits.

    Raises:
        ToolkitError: the text is none of these; ``option`` is named in it.
    """
    found = _GRID.fullmatch(text.strip().lower())
    bits = int(found[3]) if found else 0
    if found is None or bits not in BITS or (found[2] and int(found[2]) not in CANDIDATES):
        closest = nearest(text, ["log2-4", "log-sqrt2-4", "adalog20-4"])
        choices = f"log2-B, log-sqrt2-B or adalogQ-B, B among {', '.join(map(str, BITS))}, Q from {CANDIDATES[0]} to "
        raise ToolkitError(f"{option}: unknown grid '{text}'", f"{closest}write {choices}{CANDIDATES[-1]}")
    return log_sqrt2(bits) if found[1] == "log-sqrt2" else LogQuant(bits, int(found[2] or LogQuant.q))


def log_probabilities(grid: LogQuant, softmax: Probabilities) -> Probabilities:
    """Attention probabilities on a grid. Keys, values and the product with them stay as they are; masked probabilities
    are exactly zero."""
    return lambda logits: fake_quantize_log(softmax(logits), grid)


def quantize_mlp_values(model: Any, spec: ArchitectureSpec, grid: LogQuant) -> None:
    """From now on what enters the last linear of every feed-forward network has a sign and a logarithmic magnitude."""
    for index, block in enumerate(model.get_submodule(spec.blocks)):
        for network in spec.block(index).feed_forward:
            transform_input(block.get_submodule(spec.module_name(network.down)), partial(signed_log, quant=grid))
