"""Learned rounding: offsets before rounding and the ends of every range move by the sign of their gradient.

Cheng, Zhang, Shen, Cai, He, Lv, "Optimize Weight Rounding via Signed Gradient Descent for the Quantization of LLMs",
arXiv 2309.05516, equations 3 to 5: ``w = s (clamp(round(W/s + V) + z, 0, N) - z)`` with V in [-1/2, 1/2] and s, z from
a range whose ends are multiplied by trained factors. Gradients are straight through: rounding counts as the identity,
and what lies outside the range moves its end only.

Here V counts from a start that may be any rounding of W, not only the nearest: a weight that the start rounded
elsewhere begins in its own cell of the grid, at the end nearest to W. From rounding to nearest that is the published
method. Factors of the ends are logarithms, so that ranges widen as easily as they shrink.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from ptq.numerics.groups import join, split
from ptq.numerics.integers import round_scale
from ptq.scheme import TensorQuant

CHUNK = 1 << 16  # weights handled at a time: what is computed on the way stays in the cache
INSIDE = 0.499  # how far from its level a weight may start without being rounded to another


@dataclass
class Learned:
    """One weight in training. Units are ``[lines, G, width]``, see `ptq.numerics.groups.split`.

    Attributes:
        position: of the weights at the start, in first steps, counted from the zero point.
        scale, zero: first steps and zero points ``[lines, G]``; zero is None for symmetric grids.
        offset: V, like ``position``.
        low, high: logarithms ``[lines, G]`` of the factors of a range's ends. Symmetric grids have one, ``high``.
    """

    quant: TensorQuant
    position: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor | None
    offset: torch.Tensor
    low: torch.Tensor
    high: torch.Tensor

    @staticmethod
    def start(
        w: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, quant: TensorQuant
    ) -> Learned:
        """Begin at a rounding of ``w [out, in]``: uint8 codes ``[out, in]``, scale and zero ``[lines, G]``."""
        scale = scale.to(w.dtype)
        zero = None if zero is None else zero.to(w.dtype)
        shift = _shift(zero, quant)
        code = split(codes, quant.grouping).to(w.dtype)
        lowest = torch.where(code <= _lowest(quant), -torch.inf, code - shift - INSIDE)
        highest = torch.where(code >= quant.levels, torch.inf, code - shift + INSIDE)
        position = (split(w, quant.grouping) / scale.unsqueeze(-1)).clamp(lowest, highest).contiguous()
        ends = torch.zeros_like(scale)
        return Learned(quant, position, scale, zero, torch.zeros_like(position), ends, ends.clone())

    def copy(self) -> Learned:
        """With tensors of its own for what is trained."""
        return replace(self, offset=self.offset.clone(), low=self.low.clone(), high=self.high.clone())

    def grid(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Steps ``[lines, G]``, rounded to their stored precision, and zero points."""
        if self.zero is None:
            return round_scale(self.scale * self.high.exp()), None
        low, high = self._ends(self.zero)
        step = round_scale((high - low) / self.quant.levels)
        return step, torch.round(-low / step).clamp_(0, self.quant.levels)

    def _ends(self, zero: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return -zero * self.scale * self.low.exp(), (self.quant.levels - zero) * self.scale * self.high.exp()

    def rounded(self) -> dict[str, torch.Tensor | None]:
        """What a `QuantizedTensor` has of it."""
        step, zero = self.grid()
        return {"codes": self.codes(), "scale": step.float(), "zero": None if zero is None else zero.to(torch.uint8)}

    def codes(self) -> torch.Tensor:
        """uint8 ``[out, in]``."""
        found = torch.cat([part._codes(*part.grid()) for part in self._parts()])
        return join(found, self.quant.grouping).to(torch.uint8).contiguous()

    def weight(self) -> torch.Tensor:
        """The rounded weight ``[out, in]``."""
        parts = []
        for part in self._parts():
            step, zero = part.grid()
            parts.append(part._codes(step, zero).sub_(_shift(zero, self.quant)).mul_(step.unsqueeze(-1)))
        return join(torch.cat(parts), self.quant.grouping)

    def _parts(self) -> Iterator[Learned]:
        """The same over a few lines at a time, whose tensors are views."""
        tensors = (self.position, self.scale, self.zero, self.offset, self.low, self.high)
        lines = max(1, CHUNK // (self.position[0].numel() or 1))
        for first in range(0, self.position.shape[0], lines):
            part = slice(first, first + lines)
            position, scale, zero, offset, low, high = (None if t is None else t[part] for t in tensors)
            assert position is not None and scale is not None
            assert offset is not None and low is not None and high is not None
            yield Learned(self.quant, position, scale, zero, offset, low, high)

    def _unclamped(self, step: torch.Tensor, zero: torch.Tensor | None) -> torch.Tensor:
        position = self.position * (self.scale / step).unsqueeze(-1)
        return position.add_(self.offset).round_().add_(_shift(zero, self.quant))

    def _codes(self, step: torch.Tensor, zero: torch.Tensor | None) -> torch.Tensor:
        return self._unclamped(step, zero).clamp_(_lowest(self.quant), self.quant.levels)

    def descend(self, gradient: torch.Tensor, rate: float, range_rate: float) -> None:
        """One step against the signs of the gradients.

        Args:
            gradient: of the loss in `weight`, ``[out, in]``.
            rate: what offsets move; range_rate: what the logarithms of the ends move.
        """
        lines = split(gradient, self.quant.grouping)
        first = 0
        for part in self._parts():
            stop = first + part.position.shape[0]
            part._descend(lines[first:stop], rate, range_rate)
            first = stop

    def _descend(self, g: torch.Tensor, rate: float, range_rate: float) -> None:
        step, zero = self.grid()
        n, lowest, shift = self.quant.levels, _lowest(self.quant), _shift(zero, self.quant)
        position = self.position * (self.scale / step).unsqueeze(-1)
        code = torch.add(position, self.offset).round_().add_(shift)
        clamped = code.clamp(lowest, n)
        inside = g * (clamped == code)
        pull = position.mul_(inside).sum(dim=-1)
        if self.zero is None:  # where clamped the weight is a fixed number of steps
            slope = (g * clamped).sum(dim=-1) - 2 ** (self.quant.bits - 1) * g.sum(dim=-1) - pull
            self.high -= range_rate * (slope * step).sign()
        else:
            slope = clamped.sub_(shift).mul_(inside).sum(dim=-1) - pull
            above = (g * (code > n)).sum(dim=-1)
            below = (g - inside).sum(dim=-1) - above
            low, high = self._ends(self.zero)
            self.high -= range_rate * ((slope / n + above) * high).sign()
            self.low -= range_rate * ((below - slope / n) * low).sign()
        if self.zero is None:
            inside.mul_(step.unsqueeze(-1))  # of either sign
        self.offset.sub_(inside.sign_(), alpha=rate).clamp_(-0.5, 0.5)


def relative_loss(y: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean over tokens of ``|y - target|² / |target|²``, for hidden states ``[..., hidden]``; float32.

    The published loss is the mean squared error, to which a few tokens of enormous hidden states contribute nearly all
    in many models; the norm that reads the states divides by their length (docs/token_weights.md).
    """
    difference, target = (y - target).float(), target.float()
    lengths = target.square().sum(dim=-1)
    floor = lengths.median() * 1e-6  # for silent tokens
    return (difference.square().sum(dim=-1) / lengths.clamp(min=floor)).mean()


def _lowest(quant: TensorQuant) -> int:
    return 1 if quant.quantizer == "sym_restricted" else 0


def _shift(zero: torch.Tensor | None, quant: TensorQuant) -> torch.Tensor | int:
    return 2 ** (quant.bits - 1) if zero is None else zero.unsqueeze(-1)
