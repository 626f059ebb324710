"""Bias correction (Nagel et al. 2019, arXiv 1906.04721): the mean error of a rounded layer leaves through its bias."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch

from calibration.errors import Problem
from calibration.walk.context import Context
from calibration.walk.passes import Pass, Phase, PlanView, Stream
from calibration.walk.segment import Segment
from calibration.walk.statistics import Mean, Statistic
from ptq.formats.checks import matching
from ptq.linears import ModelLayout
from ptq.numerics.dfq import expected_relu, mean_error


@dataclass(frozen=True)
class BiasCorrect(Pass):
    """b -= (W_q - W) E[x] for every quantized linear that has a bias. Others are left alone: no bias is added.

    Attributes:
        data: take E[x] from calibration inputs. Without data it is known behind LayerNorm (its bias), for attention
            values and behind the ReLU of a feed-forward network; other linears are left alone then.
    """

    data: bool = True

    name: ClassVar[str] = "bias-correct"
    summary: ClassVar[str] = "takes the mean error of a rounded layer out of its bias"
    phases: ClassVar[tuple[Phase, ...]] = (Phase.REPAIR,)

    @property
    def stream(self) -> Stream:
        return "either" if self.data else "none"

    @property
    def statistics(self) -> tuple[type[Statistic], ...]:
        return (Mean,) if self.data else ()

    def check(self, view: PlanView[ModelLayout]) -> Iterable[Problem]:
        if view.layout.quantized and not matching(view.layout, lambda linear: linear.bias):
            yield Problem(
                "bias-correct",
                "no quantized linear of this model has a bias, and its file has no place for new ones",
                "leave bias-correct out; lorc and norm-tweak repair models without biases",
            )

    def apply(self, segment: Segment, context: Context) -> None:
        expected = {} if self.data else expected_inputs(segment)
        for linear in segment.schemes:
            name = f"{linear}.bias"
            if name not in segment.masters:
                continue
            mean = context.statistic(linear, Mean).mean() if self.data else expected.get(linear)
            if mean is not None:
                w = segment.weight(linear)
                error = mean_error(segment.original(linear), w, mean.to(w.dtype))
                segment.set_vector(name, segment.masters[name] - error)
                segment.note(linear, **{"bias-correct.moved": float(error.norm())})


def expected_inputs(segment: Segment) -> dict[str, torch.Tensor]:
    """E[x] ``[in]`` of linears for which weights alone tell it: behind a norm its bias (outputs of LayerNorm have mean
    beta and deviation gamma per channel; RMSNorm has no bias, so 0), behind attention the mean value, behind a ReLU the
    mean of a clipped normal. Weights are those before rounding."""
    found: dict[str, torch.Tensor] = {}
    deviations: dict[str, torch.Tensor] = {}
    for group in segment.spec.balance:
        if group.kind != "norm":
            continue
        gain = segment.gain(group.producer)
        mean = segment.masters.get(f"{group.producer}.bias", torch.zeros_like(gain))
        for name in group.consumers:
            found[name], deviations[name] = mean, gain.abs()
    for group in segment.spec.balance:
        if group.heads is None or group.producer not in found:
            continue
        rows = slice(*group.rows) if group.rows else slice(None)
        values = _mean_output(segment, group.producer, found[group.producer])[rows]
        found[group.consumers[0]] = group.heads.spread(values)
    pairs = {(group.producer, name) for group in segment.spec.balance for name in group.consumers}
    for network in segment.spec.feed_forward:
        plain = (network.up, network.down) in pairs  # no rotation lies between the two
        if network.gate is None and network.activation == "relu" and network.up in found and plain:
            mean = _mean_output(segment, network.up, found[network.up])
            variance = segment.original(network.up).square() @ deviations[network.up].square()
            found[network.down] = expected_relu(mean, variance.sqrt())
    return found


def _mean_output(segment: Segment, linear: str, mean: torch.Tensor) -> torch.Tensor:
    """W E[x] + b, as it was before rounding."""
    name = f"{linear}.bias"
    output = segment.original(linear) @ mean
    bias = segment.originals.get(name, segment.masters.get(name))
    return output if bias is None else output + bias
