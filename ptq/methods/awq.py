"""AWQ (Lin et al. 2023, arXiv 2306.00978): balance channels, then choose clipping ranges. It does not round.

The searches are in `ptq.numerics.awq`. Statistics are those of the run's one stream: the float model's inputs, as
published, unless another pass of the recipe works on the quantized stream.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from calibration.architectures import Balance
from calibration.errors import Problem
from calibration.walk.context import Context
from calibration.walk.cost import BlockShape, Work, nearest
from calibration.walk.passes import Pass, Phase, PlanView, Stream
from calibration.walk.segment import Segment
from calibration.walk.statistics import AbsMean, Gram, Statistic
from ptq.linears import ModelLayout
from ptq.methods.balancing import balance, by_value_channel, note_all, quantized_consumers, spread
from ptq.methods.rounding import global_scales
from ptq.numerics.awq import candidate_scales, clip_bounds, duo_scales, relative_magnitude, sample_rows, scaled_error
from ptq.numerics.grids import grid_of


@dataclass(frozen=True)
class Awq(Pass):
    """Channel scales by a grid over alpha, then a clipping bound per group of weights.

    Attributes:
        grid: number of alphas, 0, 1/grid, ..., (grid - 1)/grid.
        duo: AutoAWQ's scales, which divide by the weights' magnitude as well; has no plain rounding among them.
        rows: rows per weight on which candidates are scored, evenly spaced; 0 takes all.
        clip: search clipping ranges (queries and keys excepted: softmax lies behind them).
        clip_steps, clip_shrink: bounds tried per group, and how far the last would shrink.
        values: also balance attention values against the output projection, tied across query heads that share one.
    """

    grid: int = 20
    duo: bool = False
    rows: int = 512
    clip: bool = True
    clip_steps: int = 10
    clip_shrink: float = 0.5
    values: bool = True

    name: ClassVar[str] = "awq"
    title: ClassVar[str | None] = "AWQ"
    summary: ClassVar[str] = "scales input channels so that weights that meet large activations are rounded more finely"
    phases: ClassVar[tuple[Phase, ...]] = (Phase.BALANCE, Phase.CHOOSE)
    expected_errors: ClassVar[Literal["nearest", "feedback"] | None] = "nearest"
    stream: ClassVar[Stream] = "either"
    statistics: ClassVar[tuple[type[Statistic], ...]] = (Gram, AbsMean)
    spreads: ClassVar[bool] = True

    def check(self, view: PlanView[ModelLayout]) -> Iterable[Problem]:
        if self.grid < 1:
            yield Problem("awq.grid", f"{self.grid} is not positive", "use 20")
        if self.rows < 0:
            yield Problem("awq.rows", f"{self.rows} is negative", "use 512, or 0 for all")
        if self.clip_steps < 1 or not 0 <= self.clip_shrink < 1:
            yield Problem(
                "awq.clip",
                f"clip_steps {self.clip_steps}, clip_shrink {self.clip_shrink}",
                "use clip_steps = 10 and clip_shrink = 0.5",
            )

    def cost(self, block: BlockShape) -> list[Work]:
        """For every alpha a sample of each linear's rows, rounded, times the Gram matrix; for every clipping bound each
        weight, rounded, times the Gram matrix of its group."""
        tasks = []
        for rows, n in block.linears:
            sample = rows if self.rows == 0 else rows // -(-rows // self.rows)
            scaled = nearest(sample, n) + Work(products=2.0 * sample * n**2, fresh=1.0 * sample * n, calls=20.0)
            tasks.append(scaled * self.grid)
        if self.clip:
            steps = float(self.clip_steps)
            tasks += [
                (nearest(rows, n) + Work(exact=2.0 * rows * n * block.group, values=25.0 * rows * n)) * steps
                for rows, n in block.linears
            ]
        return tasks

    def apply(self, segment: Segment, context: Context) -> None:
        for group in segment.spec.balance:
            if group.kind != "value" or self.values:
                self._balance(segment, context, group)
        if self.clip:
            shared = global_scales(segment)
            # K-quants choose the ranges of their groups themselves, with the integers that they have for them
            linears = [
                linear
                for linear, scheme in segment.schemes.items()
                if linear not in segment.spec.scores and not scheme.weights.superblocks
            ]
            linears = [linear for linear in linears if context.statistic(linear, Gram).tokens]

            def bounds_of(i: int) -> torch.Tensor:
                gram, quant = context.statistic(linears[i], Gram).matrix, segment.schemes[linears[i]].weights
                return clip_bounds(segment.weight(linears[i]), gram, quant, self.clip_steps, self.clip_shrink)

            costs = [segment.weight(linear).numel() for linear in linears]
            for linear, bounds in zip(linears, context.spread(costs, bounds_of), strict=True):
                w, quant = segment.weight(linear), segment.schemes[linear].weights
                segment.grids[linear] = grid_of(w, quant, bounds, shared.get(linear))

    def _balance(self, segment: Segment, context: Context, group: Balance) -> None:
        inputs = quantized_consumers(segment, group)
        if not inputs:
            return  # every consumer stays in float: scaling would only cost precision
        mean = _channel_mean([context.statistic(names[0], AbsMean) for names in inputs])
        mean = by_value_channel(group, mean).mean(dim=0)
        alphas = [i / self.grid for i in range(self.grid)]
        scales = candidate_scales(mean, alphas)
        if self.duo and group.heads is None:
            weights = torch.cat([segment.weight(name) for names in inputs for name in names])
            quant = segment.schemes[inputs[0][0]].weights
            scales = duo_scales(mean, relative_magnitude(weights, quant), alphas)
        factors = [spread(group, s) for s in scales]

        def losses_of(own: Sequence[torch.Tensor]) -> torch.Tensor:
            found = torch.zeros(len(own), device=mean.device)
            for names in inputs:
                gram = context.product_gram(names[0])
                for name in names:
                    quant = segment.schemes[name].weights
                    w = segment.weight(name)
                    if quant.grouping.axis == "in":  # a sample of rows would tear groups of rows apart
                        w = sample_rows(w, self.rows)
                    for i, s in enumerate(own):  # an error that stays a tensor would lie where a candidate lay
                        found[i] += scaled_error(w, s, gram, quant)
            return found

        n = min(context.workers, len(factors))  # every n-th candidate in each process
        shares = context.spread([1.0] * n, lambda i: losses_of(factors[i::n]))
        losses = torch.zeros(len(factors), device=mean.device)
        for i, found in enumerate(shares):
            losses[i::n] = found
        if not bool(torch.isfinite(losses).any()):
            return
        best = int(losses.nan_to_num(torch.inf).argmin())
        balance(segment, context, group, scales[best])
        note_all(segment, inputs, **{"awq.alpha": alphas[best]})
        context.show(group.producer)


def _channel_mean(statistics: Sequence[AbsMean]) -> torch.Tensor:
    """Mean |x| over all tokens of all inputs; experts of one layer together see every token top-k times."""
    weight = sum(s.weight for s in statistics)
    total = torch.stack([s.total for s in statistics]).sum(dim=0)
    return total / weight if weight > 0 else total
