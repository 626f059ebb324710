"""PTQ1.61 (Zhao et al. 2025, arXiv 2502.13179): one bit per weight, four in salient channels, trained per block."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch

from calibration.errors import Problem
from calibration.walk.context import Context
from calibration.walk.passes import Pass, Phase, PlanView, Stream
from calibration.walk.segment import Segment
from calibration.walk.states import Reference
from calibration.walk.statistics import AbsMax, Gram, Statistic
from ptq.formats.checks import matching, refuse
from ptq.linears import ModelLayout
from ptq.methods.rounding import put
from ptq.numerics.binary import (
    SALIENT_BITS,
    binary_start,
    binary_weight,
    block_loss,
    pack_mask,
    salient_mask,
    signs,
)
from ptq.numerics.integers import dequantize, grid_parameters, quantize
from ptq.quantized import BINARY, QuantizedTensor
from ptq.scheme import Grouping, QuantScheme, TensorQuant

SALIENT = TensorQuant(SALIENT_BITS, Grouping("channel"), "asym_zero_in")


@dataclass
class MixedLinear:
    """One linear in training: what is fixed, and the three vectors that learn.

    Attributes:
        codes: uint8 ``[out, in]``; step, zero ``[out, 1]``: of the salient columns; mask bool ``[in]``.
        salient: dequantized salient columns, 0 elsewhere; sign: of the others, ``[out, in]``; mean ``[out, 1]``.
        scale, row ``[out, 1]``, column ``[in]``: trained.
    """

    scheme: QuantScheme
    codes: torch.Tensor
    step: torch.Tensor
    zero: torch.Tensor
    mask: torch.Tensor
    salient: torch.Tensor
    sign: torch.Tensor
    mean: torch.Tensor
    scale: torch.Tensor
    row: torch.Tensor
    column: torch.Tensor

    @staticmethod
    def start(w: torch.Tensor, peaks: torch.Tensor, scheme: QuantScheme) -> MixedLinear:
        """The analytic start. The range of a row's 4-bit grid is that of its salient weights (the published code takes
        the whole row, which is never narrower)."""
        mask = salient_mask(peaks, scheme.weights.salient_count(w.shape[1]))
        step, zero = grid_parameters(torch.where(mask, w, 0.0), SALIENT)
        assert zero is not None
        step, zero = step[:, None], zero[:, None]
        four = quantize(w, step, zero, SALIENT)
        scale, mean = binary_start(w, mask)
        sign = signs(w, mean)
        return MixedLinear(
            scheme=scheme,
            codes=torch.where(mask, four, (sign + 1) / 2).to(torch.uint8),
            step=step,
            zero=zero,
            mask=mask,
            salient=torch.where(mask, dequantize(four, step, zero, SALIENT), 0.0),
            sign=torch.where(mask, 0.0, sign),
            mean=mean,
            scale=scale.clone().requires_grad_(),
            row=torch.ones_like(scale).requires_grad_(),
            column=torch.ones(w.shape[1], dtype=w.dtype, device=w.device).requires_grad_(),
        )

    def weight(self) -> torch.Tensor:
        """The weight ``[out, in]``, differentiable in what is trained."""
        binary = binary_weight(self.sign, self.scale, self.mean, self.row, self.column)
        return self.salient + torch.where(self.mask, 0.0, binary)

    def finish(self) -> QuantizedTensor:
        """As stored, in float16 vectors."""
        vectors = (self.row * self.scale, self.row * self.mean, self.column)
        scale, mean, column = (v.detach().flatten().half() for v in vectors)
        parts = dict(zip(BINARY, (pack_mask(self.mask), scale, mean, column), strict=True))
        return QuantizedTensor(self.codes, self.step.float(), self.zero.to(torch.uint8), self.scheme, parts=parts)


@dataclass(frozen=True)
class Ptq161(Pass):
    """Binarize every linear whose scheme is ``w1a16-salientN``, and train scales so that the block's output stays.

    Attributes:
        epochs: passes over the calibration set, one step per batch. The analytic scales alone are useless: a model
            loses everything without training.
        scale_rate: AdamW's rate for the row scales, of their mean; rotation_rate: for both vectors of the rank-1
            correction, which start at 1.
    """

    epochs: int = 20
    scale_rate: float = 0.02
    rotation_rate: float = 1e-3

    name: ClassVar[str] = "ptq1.61"
    summary: ClassVar[str] = "keeps signs and a few 4-bit columns, and trains their scales block by block"
    default_scheme: ClassVar[str | None] = "w1a16-salient20"
    phases: ClassVar[tuple[Phase, ...]] = (Phase.ROUND,)
    stream: ClassVar[Stream] = "quantized"
    statistics: ClassVar[tuple[type[Statistic], ...]] = (AbsMax,)
    parts: ClassVar[tuple[str, ...]] = BINARY
    references: ClassVar[tuple[Reference, ...]] = ("inputs", "model")

    def part_bits(self, out_features: int, in_features: int) -> int:
        """Bitmap of salient columns, and three 16-bit vectors."""
        return 8 * -(-in_features // 8) + 16 * (2 * out_features + in_features)

    def check(self, view: PlanView[ModelLayout]) -> Iterable[Problem]:
        if self.epochs < 0:
            yield Problem("ptq1.61.epochs", f"{self.epochs} is negative", "use 20")
        for name in ("scale_rate", "rotation_rate"):
            if not 0 <= getattr(self, name) < 1:
                fix = f"use {getattr(Ptq161, name)}"
                yield Problem(f"ptq1.61.{name}", f"{getattr(self, name)} is outside [0, 1)", fix)
        others = matching(view.layout, lambda linear: linear.scheme.weights.salient_percent is None)  # type: ignore[union-attr]
        yield from refuse(
            others,
            "ptq1.61 makes one-bit weights with salient columns, not those of this scheme",
            'use --scheme w1a16-salient20, and scheme = "float" in rules for what it should leave alone',
        )

    def forwards(self) -> int:
        return self.epochs

    def apply(self, segment: Segment, context: Context) -> None:
        linears = {
            name: MixedLinear.start(segment.weight(name), context.statistic(name, AbsMax).maximum, scheme)
            for name, scheme in segment.schemes.items()
        }
        losses = self._train(segment, context, linears) if linears else []
        for name, mixed in linears.items():
            q = mixed.finish()
            segment.parts[name] = {**segment.parts.get(name, {}), **q.parts}
            put(segment, name, q, context.statistic(name, Gram).matrix if context.has(Gram) else None)
            if losses:
                segment.note(name, **{"ptq1.61.first_loss": losses[0], "ptq1.61.last_loss": losses[-1]})
            context.advance(name)

    def _train(self, segment: Segment, context: Context, linears: dict[str, MixedLinear]) -> list[float]:
        """The mean loss of every epoch."""
        groups = [
            {"params": [m.scale], "lr": self.scale_rate * float(m.scale.detach().mean())} for m in linears.values()
        ]
        groups += [{"params": [m.row, m.column], "lr": self.rotation_rate} for m in linears.values()]
        optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
        losses = []
        for _ in range(self.epochs):
            total = 0.0
            for batch in context.batches:
                with torch.enable_grad():
                    weights = {f"{name}.weight": _stored(segment, mixed.weight()) for name, mixed in linears.items()}
                    y = context.output(batch, weights)
                    loss = block_loss(context.reference("model", batch), context.reference("inputs", batch), y)
                    optimizer.zero_grad()
                    loss.backward()
                optimizer.step()
                total += float(loss.detach())
            losses.append(total / len(context.batches))
        return losses


def _stored(segment: Segment, w: torch.Tensor) -> torch.Tensor:
    """``W [out, in]`` as the model class keeps it: GPT-2's Conv1D transposed."""
    return w.T if segment.architecture.conv1d else w
