"""Layers that compute prompts densely and decode sparsely, from one copy of each weight.

A prompt multiplies every weight with many tokens: it is bound by arithmetic, and tokens prune different values, so it
runs as one dense product. A decoding step reads every weight once for one token: it is bound by memory, and rows of
pruned values are not read. Which of the two a forward pass is, `Phase` knows; the first position is always a prompt.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.nn.functional import linear

from sparsity.kernels.dispatch import select
from sparsity.kernels.int4 import Int4Rows
from sparsity.kernels.kernel import Mask, SparseQuery, Weight
from sparsity.sites import Mode, prune, small

BREAK_EVEN = 4
"""Tokens at a time up to which float rows in use are read faster than a dense product multiplies all of them: half of
the rows of 4096 x 14336 in bfloat16 on two cores with AVX-512 take 1.7 times less time with 2 tokens, 1.2 to 1.5 times
less with 4 pruned inputs, 1.3 times more with 8 (`benchmarks/sparse_gemv.py --tokens N`)."""


@dataclass
class Phase:
    """What the running forward pass is; one object, shared by all layers of a model.

    Attributes:
        decoding: one new position per sequence, behind others in the cache.
        masked: thresholds apply. Off, the same kernels read every row.
        counting: `Kept` tallies are kept up. It costs time; never on while timing.
    """

    decoding: bool = False
    masked: bool = True
    counting: bool = False


@dataclass
class Kept:
    """Rows that were read, of those there are, over all tokens counted."""

    rows: int = 0
    of: int = 0

    def count(self, kept: torch.Tensor) -> None:
        """kept: bool ``[B, n]``; a row is read where any token keeps it."""
        self.rows += int(kept.any(0).sum())
        self.of += kept.shape[1]


def row_slice(weight: Weight, start: int, stop: int) -> Weight:
    """Rows ``start`` to ``stop`` of an output-mode weight: views, not copies."""
    if isinstance(weight, torch.Tensor):
        return weight[start:stop]
    zero = None if weight.zero is None else weight.zero[start:stop]
    return replace(weight, codes=weight.codes[start:stop], scale=weight.scale[start:stop], zero=zero)


class DecodeLinear(nn.Module):
    """``x [..., in] -> x Wᵀ + bias``, or in mode "input" and while decoding ``z Wᵀ + bias + shift`` with the pruned
    and centered z of a `Site`.

    Attributes:
        mode: "input": Wᵀ is stored by rows, and rows of pruned inputs are skipped. "output": W is, as the model had
            it; every row is read here, and `GatedFeedForward` skips some.
        kept: rows that were read; see `Phase.counting`.
    """

    def __init__(
        self,
        weight: Weight,
        mode: Mode,
        bias: torch.Tensor | None,
        dtype: torch.dtype,
        phase: Phase,
        kernel: str | None = None,
    ) -> None:
        """
        Args:
            weight: rows of Wᵀ or of W, see ``mode``; float rows in ``dtype``.
            bias: ``[out]``.
            dtype: of activations.
            kernel: name of a sparse kernel; None takes the fastest that can run.

        Raises:
            ToolkitError: ``kernel`` is unknown or cannot run this layer.
        """
        super().__init__()
        self.mode, self.phase, self.kept = mode, phase, Kept()
        self.dtype = dtype
        device = weight.device if isinstance(weight, torch.Tensor) else weight.codes.device
        stored = "float" if isinstance(weight, torch.Tensor) else "int4"
        self.kernel = select(SparseQuery(mode, stored, dtype, device.type), kernel)  # type: ignore[arg-type]
        self.weight_rows = weight.detach() if isinstance(weight, torch.Tensor) else weight
        self.bias = None if bias is None else bias.detach().float()
        self.shifted_bias = self.bias
        self.mask: Mask | None = None

    def set_mask(self, threshold: torch.Tensor, center: torch.Tensor | None, shift: torch.Tensor | None) -> None:
        """Of a `Site` in mode "input"."""
        assert self.mode == "input", "rows of W are outputs"
        self.mask = Mask(threshold, center)
        if shift is not None:
            self.shifted_bias = shift if self.bias is None else self.bias + shift

    @property
    def shape(self) -> tuple[int, int]:
        """``(out, in)``"""
        rows = self.weight_rows
        lines, width = (rows.shape[0], rows.shape[1]) if isinstance(rows, torch.Tensor) else (rows.lines, rows.width)
        return (width, lines) if self.mode == "input" else (lines, width)

    @property
    def out_features(self) -> int:
        return self.shape[0]

    @property
    def in_features(self) -> int:
        return self.shape[1]

    @property
    def bytes_skipped(self) -> float:
        """Bytes that were not read over all counted tokens: rows, without scales and zeros."""
        rows = self.weight_rows.codes if isinstance(self.weight_rows, Int4Rows) else self.weight_rows
        return (self.kept.of - self.kept.rows) * rows.nbytes / len(rows)

    @property
    def weight_bytes(self) -> int:
        """Bytes of one pass over the whole layer."""
        return self.weight_rows.nbytes + (0 if self.bias is None else self.bias.nbytes)

    def dense_weight(self) -> torch.Tensor:
        """``[out, in]``: a view of float rows; codes are dequantized for the length of a call."""
        rows = self.weight_rows
        floats = self.kernel.dequantize(rows, self.dtype) if isinstance(rows, Int4Rows) else rows
        return floats.T if self.mode == "input" else floats

    def sparse_tokens(self, x: torch.Tensor) -> torch.Tensor | None:
        """``x [..., in]`` as contiguous ``[tokens, in]`` where this call runs on the kernel, else None."""
        most = self.kernel.max_tokens  # a dense product from codes would dequantize all of them first
        if isinstance(self.weight_rows, torch.Tensor):
            most = min(most, BREAK_EVEN)
        if not self.phase.decoding or x.numel() > most * x.shape[-1] or not x.numel():
            return None
        return x.reshape(-1, x.shape[-1]).contiguous()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = self.sparse_tokens(x)
        if rows is None:
            return linear(x, self.dense_weight(), None if self.bias is None else self.bias.to(x.dtype))
        if self.mode == "output":
            y = self.kernel.output_product(
                rows, self.weight_rows, rows.new_ones(len(rows), self.shape[0]), None, self.bias
            )
        elif self.mask is not None and self.phase.masked:
            if self.phase.counting:
                self.kept.count(~small(rows, self.mask.threshold, self.mask.center))
            y = self.kernel.input_product(rows, self.weight_rows, self.mask, self.shifted_bias)
        else:
            y = self.kernel.input_product(rows, self.weight_rows, None, self.bias)
        return y.view(*x.shape[:-1], -1)

    def extra_repr(self) -> str:
        out, n_in = self.shape
        masked = "" if self.mask is None else ", masked"
        return f"in={n_in}, out={out}, bias={self.bias is not None}, {self.mode}{masked}, kernel={self.kernel.name}"


class MaskedLinear(nn.Module):
    """A linear that no sparse kernel runs: its inputs are pruned while decoding, and all of its weight is read."""

    def __init__(self, inner: nn.Module, threshold: torch.Tensor, center: torch.Tensor | None, phase: Phase) -> None:
        super().__init__()
        self.inner, self.threshold, self.center, self.phase = inner, threshold, center, phase
        self.in_features, self.out_features = inner.in_features, inner.out_features

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pruned = prune(x, self.threshold, self.center) if self.phase.decoding and self.phase.masked else x
        y: torch.Tensor = self.inner(pruned)
        return y


class GatedFeedForward(nn.Module):
    """``down(act(gate(x)) * up(x))`` that, while decoding, computes ``up`` only where the pruned ``act(gate(x))`` is
    not zero, and reads ``down`` only there (CATS, arXiv 2404.08763; CHESS, arXiv 2409.01366).
    """

    def __init__(
        self,
        gate: nn.Module,
        up: nn.Module,
        down: nn.Module,
        activation: Callable[[torch.Tensor], torch.Tensor],
        threshold: torch.Tensor,
        phase: Phase,
    ) -> None:
        """
        Args:
            up: rows are skipped where it is a `DecodeLinear`.
            threshold: float32 ``[1]`` or ``[n]`` of ``act(gate(x))``.
        """
        super().__init__()
        self.gate, self.up, self.down, self.activation = gate, up, down, activation
        self.mask, self.phase = Mask(threshold), phase

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        g = self.activation(self.gate(x))
        y: torch.Tensor
        if not (self.phase.decoding and self.phase.masked):
            y = self.down(g * self.up(x))
            return y
        rows = self.up.sparse_tokens(x) if isinstance(self.up, DecodeLinear) else None
        if rows is None or not isinstance(self.up, DecodeLinear):
            y = self.down(prune(g, self.mask.threshold) * self.up(x))
            return y
        gates = g.reshape(len(rows), -1).contiguous()
        if self.phase.counting:
            self.up.kept.count(~small(gates, self.mask.threshold))
        h = self.up.kernel.output_product(rows, self.up.weight_rows, gates, self.mask, self.up.bias)
        y = self.down(h.view(g.shape))
        return y
