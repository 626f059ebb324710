"""Weights and inputs of all linears in eight bits, static, in a model that runs: the setting that outliers hurt most.

Bondarenko et al. (arXiv 2306.12929) quantize so: weights symmetric, inputs with zero points, one min-max range for each
tensor. Simulated in the model itself, because its attention may differ from that of any checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch

from calibration.architectures import ArchitectureSpec
from calibration.model.watching import Watch, watching
from calibration.walk.capture import accumulate
from calibration.walk.ranges import Extremes
from ptq.numerics.activations import fake_quantize_inputs, step_and_zero
from ptq.numerics.grids import fake_quantize
from ptq.scheme import parse_scheme

SCHEME = "w8a8-gtensor-sym-astatic-azp"

Ranges = dict[tuple[int, str], Extremes]
"""(block, first of the linears that share an input) -> smallest and largest values of that input."""


@contextmanager
def gathering_ranges(model: Any, spec: ArchitectureSpec) -> Iterator[Ranges]:
    """While open, every forward pass of a transformers model widens the ranges of the inputs of its linears."""
    ranges: Ranges = {}
    with ExitStack() as stack:
        for index, block in enumerate(model.get_submodule(spec.blocks)):
            found = {}
            for shared in spec.block(index).inputs:
                linear = block.get_submodule(spec.module_name(shared.linears[0]))
                width = linear.weight.shape[0 if spec.conv1d else 1]
                found[shared.linears[0]] = Extremes(width, linear.weight.device)
            ranges.update({(index, name): extremes for name, extremes in found.items()})
            stack.enter_context(accumulate(block, {spec.module_name(name): [e] for name, e in found.items()}))
        yield ranges


@contextmanager
def static_inputs(model: Any, spec: ArchitectureSpec, ranges: Ranges) -> Iterator[None]:
    """While open, inputs of linears are on the grids of these ranges."""
    grid = parse_scheme(SCHEME).inputs
    assert grid is not None
    with ExitStack() as stack:
        for index, block in enumerate(model.get_submodule(spec.blocks)):
            watches = []
            for shared in spec.block(index).inputs:
                seen = ranges[index, shared.linears[0]]
                if not seen.tokens:  # an expert that nothing was sent to
                    continue
                scale, zero = step_and_zero(seen.low.min(), seen.high.max(), grid)
                rounded = partial(fake_quantize_inputs, quant=grid, scale=scale, zero=zero)
                watches += [Watch.transforming(spec.module_name(name), rounded) for name in shared.linears]
            stack.enter_context(watching(block, watches))
        yield


@torch.no_grad()
def round_weights(model: Any, spec: ArchitectureSpec) -> None:
    """Round the weights of all linears of the blocks in place, for good."""
    quant = parse_scheme(SCHEME).weights
    for index, block in enumerate(model.get_submodule(spec.blocks)):
        for name in spec.block(index).linears:
            weight = block.get_submodule(spec.module_name(name)).weight
            weight.copy_(fake_quantize(weight.float(), quant))  # one scale: a transposed weight is as good
