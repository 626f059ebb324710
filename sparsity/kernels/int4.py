"""`Int4Rows`: 4-bit codes of a weight by rows, one layout for dense and sparse decoding on every processor.

A row is cut into pieces of 128 columns, 64 bytes each: 16 little-endian 32-bit words, where nibble k (bits 4k to
4k + 3) of word j is the code of column ``16 k + j``. One 64-byte register then gives eight vectors of 16 consecutive
columns by shifts alone, and a 16-entry table look-up turns codes into numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sparsity.kernels.pages import on_huge_pages
from sparsity.sites import Mode

PIECE = 128
"""Columns of 64 bytes."""


@dataclass(frozen=True)
class Int4Rows:
    """A weight ``(code - zero) * scale``, ``W [out, in]`` with groups along ``in``, stored by rows of W or of Wᵀ.

    Attributes:
        mode: "input": lines are the ``in`` rows of Wᵀ; "output": the ``out`` rows of W.
        codes: uint8 ``[lines, 64 * ceil(width / 128)]``, see above; columns past ``width`` hold anything.
        scale: bfloat16 (exact, see `ptq` scales) ``[in / group, out]`` for "input", ``[out, in / group]`` for "output".
        zero: uint8 in the shape of ``scale``; None: 8.
        width: weights per line.
        group: inputs per scale.
    """

    mode: Mode
    codes: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor | None
    width: int
    group: int

    @property
    def lines(self) -> int:
        return len(self.codes)

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scale.nbytes + (0 if self.zero is None else self.zero.nbytes)

    @staticmethod
    def pack(codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, mode: Mode) -> Int4Rows:
        """From the plain form.

        Args:
            codes: uint8 ``[out, in]`` in [0, 15].
            scale: ``[out, in / group]``, values exact in bfloat16.
            zero: uint8 in the shape of ``scale``, or None for 8.
            mode: see the class.
        """
        group = codes.shape[1] // scale.shape[1]
        narrow = scale.to(torch.bfloat16)
        assert torch.equal(narrow.to(scale.dtype), scale), "scales are exact in bfloat16"
        if mode == "input":
            codes, narrow, zero = codes.T, narrow.T, None if zero is None else zero.T
        lines, width = codes.shape
        padded = torch.nn.functional.pad(codes, (0, -width % PIECE))
        nibbles = padded.reshape(lines, -1, 8, 16).transpose(2, 3)  # [lines, pieces, word, nibble]
        packed = on_huge_pages((nibbles[..., ::2] | nibbles[..., 1::2] << 4).reshape(lines, -1))
        zero = None if zero is None else on_huge_pages(zero.to(torch.uint8))
        return Int4Rows(mode, packed, on_huge_pages(narrow), zero, width, group)

    def dequantize(self, index: torch.Tensor | None = None) -> torch.Tensor:
        """Float32 ``[lines, width]``, or the lines of ``index`` only."""
        packed = self.codes if index is None else self.codes[index]
        nibbles = torch.stack((packed & 15, packed >> 4), dim=-1).unflatten(1, (-1, 64)).flatten(2)
        codes = nibbles.unflatten(2, (16, 8)).transpose(2, 3).flatten(1)[:, : self.width].float()
        zero = torch.full((), 8.0) if self.zero is None else self.zero.float()
        if self.mode == "input":
            line = torch.arange(self.lines, device=packed.device) if index is None else index
            scale, zero = self.scale[line // self.group].float(), zero if zero.ndim == 0 else zero[line // self.group]
        else:
            scale, zero = (t if index is None or t.ndim == 0 else t[index] for t in (self.scale.float(), zero))
            scale, zero = (t if t.ndim == 0 else t.repeat_interleave(self.group, dim=1) for t in (scale, zero))
        return (codes - zero) * scale


def int4_problem(n_in: int, group: int) -> str | None:
    """Why a weight with such groups has no sparse product in 4 bits, or None."""
    if n_in % group:
        return f"groups of {group} do not divide {n_in} inputs"
    if group not in (32, 64) and group % PIECE and group != n_in:
        return f"groups of {group} inputs: the kernels take 32, 64, multiples of {PIECE}, or one group per row"
    return None
