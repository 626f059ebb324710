"""Logarithmic grids for values in [0, 1], such as attention probabilities: log2, log-sqrt2 and AdaLog.

Codes are ``i = round(-log_base(u))`` of ``u = (x + shift) / s``, and n = 2^k of them. Log2 and log-sqrt2: RepQ-ViT (Li
et al. 2022, arXiv 2212.08254). AdaLog (Wu et al. 2024, arXiv 2407.12951) has the base 2^(q / 37) with a searched
integer q and decodes with two tables: a shift T1 and a mantissa T2 of k + 1 bits.

The published code gives all n codes values above zero and zero a code of its own: n + 1 values. Here that is
``zero_code = False``; with True, the honest grid of k bits, the last code is zero. Zero comes back exactly either way
(where shift is 0), so that masked tokens stay out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

RESOLUTION = 37  # r of AdaLog: prime, so that the residues of i q spread
SMALLEST = 1e-15
CANDIDATES = range(10, 138)  # of q, as the published search evaluates


@dataclass(frozen=True)
class LogQuant:
    """A logarithmic grid.

    Attributes:
        bits: of a code.
        q: the base is 2^(q / 37); 37 is log2.
        half: the base is the square root of 2 instead, decoded exactly (shift and parity).
        scale: s, what code 0 stands for; larger values are clipped to it.
        shift: added before encoding, subtracted after decoding.
        zero_code: whether the last code is the zero, see the module.
    """

    bits: int = 4
    q: int = RESOLUTION
    half: bool = False
    scale: float = 1.0
    shift: float = 0.0
    zero_code: bool = True

    @property
    def codes(self) -> int:
        """n = 2^bits."""
        return 2**self.bits

    @property
    def last(self) -> int:
        """The last code that stands for a value above zero."""
        return self.codes - 1 - self.zero_code


def log_sqrt2(bits: int) -> LogQuant:
    return LogQuant(bits, half=True)


def encode(x: torch.Tensor, quant: LogQuant) -> torch.Tensor:
    """Codes int64 in [0, n]: `LogQuant.last` + 1 stands for zero (and everything below the grid)."""
    u = ((x + quant.shift) / quant.scale).clamp(SMALLEST, 1)
    per_octave = 2.0 if quant.half else RESOLUTION / quant.q
    return (-torch.log2(u) * per_octave).round().clamp(max=quant.last + 1).long()


def tables(quant: LogQuant, device: torch.device | str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    """T1 (shifts, int64) and T2 (mantissas, float64) of every code above zero: a value is ``s 2^-T1 T2``."""
    i = torch.arange(quant.last + 1, device=device)
    if quant.half:
        return (i + 1) // 2, torch.where(i % 2 == 1, math.sqrt(2), 1.0).double()
    steps = 2 * quant.codes - 2
    residues = ((i * quant.q) % RESOLUTION).double()
    return (i * quant.q) // RESOLUTION, torch.round(2.0 ** (-residues / RESOLUTION) * steps) / steps


def decode(codes: torch.Tensor, quant: LogQuant, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The values of codes, in ``dtype``."""
    shift, mantissa = tables(quant, codes.device)
    values = torch.cat([quant.scale * mantissa * 2.0 ** -shift.double(), torch.zeros(1, device=codes.device).double()])
    return values[codes].sub(quant.shift).to(dtype)


def fake_quantize_log(x: torch.Tensor, quant: LogQuant) -> torch.Tensor:
    """``x`` after encoding and decoding, in its own dtype."""
    return decode(encode(x.float(), quant), quant, x.dtype)


def signed_log(x: torch.Tensor, quant: LogQuant) -> torch.Tensor:
    """A sign bit and a logarithm of the magnitude in ``bits - 1``, relative to the largest of each token: for products
    such as SwiGLU's, which have both signs and no bound."""
    scale = x.float().abs().amax(dim=-1, keepdim=True).clamp(min=SMALLEST)
    magnitude = LogQuant(quant.bits - 1, quant.q, quant.half, 1.0, 0.0, quant.zero_code)
    return (fake_quantize_log(x.float().abs() / scale, magnitude) * scale * x.float().sign()).to(x.dtype)
