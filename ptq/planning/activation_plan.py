"""What a plan checks of quantized inputs and KV caches, and where a cache is quantized."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from calibration.architectures import ArchitectureSpec
from calibration.errors import Problem
from calibration.walk.passes import Pass, PlanView
from ptq.formats.checks import matching, refuse
from ptq.linears import ModelLayout
from ptq.methods.cache_steps import static_cache
from ptq.quantized import CACHE_STEPS
from ptq.runtime.attention import cache_layers, has_interface
from ptq.scheme import QuantScheme


def activation_problems(view: PlanView[ModelLayout]) -> Iterable[Problem]:
    """Every reason why the inputs or the cache cannot be quantized as the schemes say."""
    layout, spec = view.layout, view.spec
    static = matching(layout, lambda linear: not _inputs(linear.scheme, "dynamic", True))
    known = _calibrated(layout, view.passes, spec)
    fix = "put 'ranges' in front of the rounding, as in --method ranges+rtn, or use -atoken or -atensor"
    without = [linear for linear in static if linear.name not in known]
    yield from refuse(without, "has static inputs, and no pass calibrates their range", fix)
    for linear in layout.quantized:
        size = _inputs(linear.scheme, "group_size", None)
        if size is not None and linear.shape[1] % size:
            reason = f"{linear.shape[1]} input columns are not a multiple of the {size} that share a step"
            yield Problem(linear.name, reason, "use another -agN, or -atoken")
    try:
        layers = cache_layers(spec, {linear.name: linear.scheme for linear in layout.linears})
    except ValueError as error:
        yield Problem(str(error), "disagree about the KV cache of their layer", "give them the same kv in their rules")
        return
    if not any(CACHE_STEPS[0] in step.parts for step in view.passes):
        static = matching(layout, lambda linear: static_cache(linear.scheme) is not None)
        fix = "put 'ranges' in front of the rounding, as in --method ranges+rtn, or leave kvstatic out"
        yield from refuse(static, "has a static KV cache, and no pass calibrates its steps", fix)
    if layers and not has_interface(view.config):
        reason = f"the KV cache of '{spec.family}' cannot be quantized: its attention is not exchangeable"
        yield Problem("kv", reason, "leave kv out of the scheme")


def _calibrated(layout: ModelLayout, passes: Sequence[Pass], spec: ArchitectureSpec) -> set[str]:
    """Full names of the linears whose static inputs some pass gives a range."""
    found: set[str] = set()
    for index in range(spec.n_blocks):
        prefix, block = spec.prefix(index), spec.block(index)
        quantized = [linear.name.removeprefix(prefix) for linear in layout.quantized if linear.block == index]
        for step in passes:
            block = block.with_transformed_inputs(step.input_transforms(block, quantized))
            found |= {prefix + linear for linear in step.calibrated(block)}
    return found


def _inputs(scheme: QuantScheme | None, attribute: str, default: Any) -> Any:
    return default if scheme is None or scheme.inputs is None else getattr(scheme.inputs, attribute)
