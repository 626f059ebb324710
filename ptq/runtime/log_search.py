"""AdaLog's bases for a running model, searched on calibration windows (Wu et al. 2024, arXiv 2407.12951).

Every layer is searched on the inputs that it has in the model as it is, and judged by what it makes of them: attention
by its output (one base for all heads; the scale is 1), the last linear of an MLP by its output. Behind GELU and ReLU
values have a lower bound, are shifted by it and get a scale of their own; products with a gate have a sign bit and a
magnitude relative to the largest of their token.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch

from calibration.architectures import ArchitectureSpec
from calibration.text.crops import TokenBatches
from calibration.walk.capture import accumulate
from calibration.walk.statistics import Sample
from ptq.numerics.log_search import SHIFTS, bases_of, errors_of, search_base, search_base_and_scale
from ptq.numerics.logarithmic import LogQuant, signed_log
from ptq.runtime.explicit_attention import Probabilities, Scores, exchanged_softmax
from ptq.runtime.log_values import mlp_inputs

WINDOWS = 8
WINDOW = 512  # tokens
QUERIES = 32  # per window and head, evenly spaced
ROWS = 128  # tokens on which the grid of an MLP is searched


@torch.no_grad()
def search_probabilities(
    model: Any, spec: ArchitectureSpec, softmax: Probabilities, quant: LogQuant, tokens: TokenBatches
) -> list[LogQuant]:
    """A grid per decoder layer, the one with the smallest squared error of the attention output."""
    candidates = bases_of(quant)
    errors = torch.zeros(spec.n_blocks, len(candidates), dtype=torch.float64)

    def look(scores: Scores) -> None:
        p = scores.probabilities
        some = p[:, :, :: max(1, p.shape[2] // QUERIES)]
        errors[scores.layer] += errors_of(candidates, some, scores.values.float()).cpu()

    with exchanged_softmax(model, softmax, look):
        _run(model, tokens)
    return [candidates[i] for i in errors.argmin(dim=1).tolist()]


@torch.no_grad()
def search_mlp_values(model: Any, spec: ArchitectureSpec, quant: LogQuant, tokens: TokenBatches) -> dict[str, LogQuant]:
    """A grid for what enters the last linear of every feed-forward network, by its path. Experts that see no token keep
    ``quant``."""
    places = mlp_inputs(spec)
    device = next(model.parameters()).device
    samples = {path: Sample(_width(model.get_submodule(path)), device) for path, _ in places}
    with ExitStack() as hooks:
        for index in range(spec.n_blocks):
            prefix = f"{spec.blocks}.{index}"
            inside = {p.removeprefix(f"{prefix}."): [s] for p, s in samples.items() if p.startswith(f"{prefix}.")}
            hooks.enter_context(accumulate(model.get_submodule(prefix), inside))
        _run(model, tokens)
    found = {}
    for path, activation in places:
        x = samples[path].rows
        x = x[:: max(1, len(x) // ROWS)]
        linear = model.get_submodule(path)
        if not len(x):
            found[path] = quant
        elif activation in SHIFTS:
            found[path] = search_base_and_scale(x, replace(quant, shift=SHIFTS[activation]), _columns(linear, x))
        else:
            found[path] = search_base(x, quant, _columns(linear, x), signed_log)
    return found


def _width(linear: torch.nn.Module) -> int:
    """Inputs of any kind of linear; Conv1D stores ``[in, out]`` and does not name them."""
    return int(getattr(linear, "in_features", None) or linear.get_parameter("weight").shape[0])


def _columns(linear: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Wᵀ ``[in, out]`` of any kind of linear, from what it makes of unit vectors."""
    units = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    return linear(units) - linear(torch.zeros_like(units[:1]))


def _run(model: Any, tokens: TokenBatches) -> None:
    for window in tokens.batches(1):
        model(window.to(model.device), use_cache=False)
