"""SmoothQuant (Xiao et al. 2022, arXiv 2211.10438): outliers of activation channels move into the weights.

The published method smooths what a norm feeds with one alpha for the whole model; here alpha may be searched for every
pair, and the pairs up -> down and v -> o may be smoothed as well. It does not round. The mathematics is in
`ptq.numerics.smoothquant`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from calibration.architectures import Balance
from calibration.errors import Problem
from calibration.walk.context import Context
from calibration.walk.passes import Pass, Phase, PlanView, Stream
from calibration.walk.segment import Segment
from calibration.walk.statistics import AbsMax, Gram, Sample, Statistic
from ptq.activations import ActivationQuant
from ptq.linears import ModelLayout
from ptq.methods.balancing import balance, by_value_channel, note_all, quantized_consumers, spread
from ptq.numerics.awq import sample_rows
from ptq.numerics.smoothquant import HALF_RANGE, activation_noise, smoothed_error, smoothing_scales


@dataclass(frozen=True)
class SmoothQuant(Pass):
    """Channel scales s = max|x|^alpha / max|w|^(1 - alpha) in front of linears that share an input.

    Attributes:
        alpha: migration strength in [0, 1]; 0.5 suits OPT and BLOOM, 0.8 to 0.9 Llama with weights per channel.
        search: choose alpha for every pair among 0, 1/grid, ..., 1 and "none" by the expected error of the outputs,
            with inputs as the scheme quantizes them (to 8 bits per token where it does not).
        grid: number of steps of the search.
        rows: rows per weight on which candidates are scored, evenly spaced; 0 takes all.
        down: also smooth up -> down.
        values: also smooth v -> o, tied across query heads that share a value.
    """

    alpha: float = 0.5
    search: bool = False
    grid: int = 20
    rows: int = 512
    down: bool = False
    values: bool = False

    name: ClassVar[str] = "smoothquant"
    summary: ClassVar[str] = "moves the range of activation outliers into the weights"
    default_scheme: ClassVar[str | None] = "w8a8"
    phases: ClassVar[tuple[Phase, ...]] = (Phase.BALANCE,)
    stream: ClassVar[Stream] = "either"

    @property
    def statistics(self) -> tuple[type[Statistic], ...]:
        return (AbsMax, Gram, Sample) if self.search else (AbsMax,)

    def check(self, view: PlanView[ModelLayout]) -> Iterable[Problem]:
        if not 0 <= self.alpha <= 1:
            yield Problem("smoothquant.alpha", f"{self.alpha} is outside [0, 1]", "use 0.5, or search = true")
        if self.grid < 1:
            yield Problem("smoothquant.grid", f"{self.grid} is not positive", "use 20")
        if self.rows < 0:
            yield Problem("smoothquant.rows", f"{self.rows} is negative", "use 512, or 0 for all")

    def apply(self, segment: Segment, context: Context) -> None:
        wanted = {"norm": True, "linear": self.down, "value": self.values}
        for group in segment.spec.balance:
            inputs = quantized_consumers(segment, group)
            if wanted[group.kind] and inputs:
                self._smooth(segment, context, group, inputs)
                context.show(group.producer)

    def _smooth(self, segment: Segment, context: Context, group: Balance, inputs: Sequence[Sequence[str]]) -> None:
        x_max = torch.stack([context.statistic(names[0], AbsMax).maximum for names in inputs]).amax(dim=0)
        w_max = torch.stack([segment.weight(name).abs().amax(dim=0) for name in group.consumers]).amax(dim=0)
        x_max, w_max = (by_value_channel(group, m).amax(dim=0) for m in (x_max, w_max))
        alphas: list[float | str] = [self.alpha]
        scales = [smoothing_scales(x_max, w_max, self.alpha)]
        if self.search:
            grid = [i / self.grid for i in range(self.grid + 1)]
            alphas = ["none", *grid]
            scales = [torch.ones_like(x_max)] + [smoothing_scales(x_max, w_max, alpha) for alpha in grid]
        if segment.stored_dtypes[f"{group.producer}.weight"] == torch.float16:
            scales = [s.clamp(*HALF_RANGE) for s in scales]
        best = 0
        if len(scales) > 1:
            losses = torch.zeros(len(scales), device=x_max.device)
            for i, s in enumerate(scales):  # losses that stay tensors of their own would lie where candidates lay
                losses[i] = self._loss(segment, context, inputs, spread(group, s))
            best = int(losses.nan_to_num(torch.inf).argmin())
        balance(segment, context, group, scales[best])
        note_all(segment, inputs, **{"smoothquant.alpha": alphas[best]})

    def _loss(
        self, segment: Segment, context: Context, inputs: Sequence[Sequence[str]], s: torch.Tensor
    ) -> torch.Tensor:
        """Expected error of the outputs of all linears of a group, for factors ``s [in]`` of their columns."""
        total = torch.zeros((), device=s.device)
        for names in inputs:
            gram, tokens = context.product_gram(names[0]), context.statistic(names[0], Gram).tokens
            inputs_quant = segment.schemes[names[0]].inputs or ActivationQuant()
            if inputs_quant.granularity == "tensor":
                maxima = (context.statistic(names[0], AbsMax).maximum / s).amax(dim=0, keepdim=True)
            else:
                maxima = (context.statistic(names[0], Sample).rows / s).abs().amax(dim=1)
            if maxima.numel():
                noise = activation_noise(maxima, inputs_quant.bits)
                for name in names:
                    quant, w = segment.schemes[name].weights, segment.weight(name)
                    if quant.grouping.axis == "in":  # a sample of rows would tear groups of rows apart
                        share = w.shape[0] / sample_rows(w, self.rows).shape[0]
                        w = sample_rows(w, self.rows)
                    else:
                        share = 1.0
                    total += share * smoothed_error(w, s, gram, quant, noise, tokens)
        return total
