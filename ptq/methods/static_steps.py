"""What passes share that move a step per channel out of an input, so that one static step is left: schemes, shifts of
norms, and the biases that take the shifts back."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

import torch

from calibration.architectures import ArchitectureSpec, Balance, resolve
from calibration.walk.segment import Segment
from ptq.activations import ActivationQuant
from ptq.scheme import QuantScheme


def has_integer_inputs(scheme: QuantScheme) -> bool:
    return scheme.inputs is not None and scheme.inputs.kind == "int" and scheme.inputs.smooth is None


def with_static_inputs(scheme: QuantScheme, symmetric: bool = True) -> QuantScheme:
    """The scheme with one calibrated step for all of its integer inputs."""
    assert scheme.inputs is not None
    inputs = ActivationQuant(scheme.inputs.bits, "int", "tensor", dynamic=False, symmetric=symmetric)
    return dataclasses.replace(scheme, inputs=inputs)


def switched_biases(config: Any) -> Mapping[str, Any]:
    """Entries of ``config.json`` that switch on the biases of linears behind norms with a bias."""
    architecture = resolve(config)
    if architecture.norm != "layer":
        return {}
    return {key: True for key in architecture.bias_switches if not getattr(config, key)}


def biases_behind_norms(architecture: ArchitectureSpec, index: int, stored: Collection[str]) -> Collection[str]:
    """Linears of a block that lack a bias to take back the shift of their norm, and their siblings under one entry of
    ``config.json``."""
    found: dict[str, None] = {}
    for group in architecture.block(index).balance:
        if group.kind == "norm" and f"{group.producer}.bias" in stored:
            for linear in group.consumers:
                siblings = [members for members in architecture.bias_switches.values() if linear in members]
                found |= dict.fromkeys(n for members in siblings or [(linear,)] for n in members)
    return [linear for linear in found if f"{linear}.bias" not in stored]


def take_shift(segment: Segment, group: Balance, shift: torch.Tensor) -> torch.Tensor:
    """Subtract ``shift [channels]`` from the norm's output, and let the consumers' biases add W shift.

    Returns:
        The shift that was taken: a norm's bias is rounded to its stored dtype first, so that saving it does not undo
        exactness.
    """
    name = f"{group.producer}.bias"
    before = segment.masters[name].clone()
    after = (before - shift).to(segment.stored_dtypes[name]).to(before.dtype)
    taken = before - after
    segment.replace(name, after)
    for linear in group.consumers:
        bias = f"{linear}.bias"
        moved = segment.masters[bias].double() + segment.weight(linear).double() @ taken.double()
        segment.replace(bias, moved)
    return taken
