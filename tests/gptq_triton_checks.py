"""Run by test_gptq_triton.py in a process of its own: the interpreter is chosen before Triton is imported."""

from __future__ import annotations

import sys
from collections.abc import Callable
from unittest import mock

import torch
from test_gptq_triton import plain

from ptq.numerics import column_loop, gptq_triton
from ptq.numerics.gptq import Rounded, asymmetry, gptq_round, inverse_factor
from ptq.numerics.grids import grid_of
from ptq.numerics.superblock_gptq import gptq_round_super
from ptq.scheme import Grouping, TensorQuant, parse_scheme

KINDS = (("sym_signed", 4), ("sym_restricted", 3), ("sym_full", 8), ("asym_zero_in", 2), ("asym_float", 4))
GROUP, ROWS_OF_COLUMN = Grouping("group", 8), Grouping("group", 3, "out")


def problem(out: int, width: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """W ``[out, in]``, the Gram matrix of correlated inputs of uneven size, one of them dead, and that of a difference
    of inputs with them; float32."""
    generator = torch.Generator().manual_seed(seed)
    w, x = torch.randn(out, width, generator=generator), torch.randn(400, width, generator=generator)
    x = (x + x.roll(1, 1)) * torch.randn(width, generator=generator).exp()
    x[:, width // 2] = 0
    difference = 0.2 * x.roll(2, 1)
    return w, x.T @ x, difference.T @ x


def check_block(quant: TensorQuant, out: int, columns: int, cross: bool) -> None:
    """Some weights against `plain`. Every third value lies between two levels."""
    for seed in range(3):
        w, h, d = problem(out, columns, seed)
        h.diagonal()[h.diagonal() == 0] = 1
        u = inverse_factor(h, 0.01)[0]
        grid = grid_of(w, quant)
        scale = grid.scale.repeat_interleave(quant.grouping.width(columns), dim=1)
        w[:, ::3] = (torch.round(w[:, ::3] / scale[:, ::3]) + 0.5) * scale[:, ::3]
        zero = None if grid.zero is None else grid.zero.T.contiguous()
        groups = (torch.arange(columns) // quant.grouping.width(columns)).tolist()
        grids = column_loop.Grids(quant, grid.scale.T.contiguous(), zero, groups, True, None)
        wt, p = w.T.contiguous(), asymmetry(d, u) if cross else None
        found = gptq_triton.round_block(wt, u, p, *grids.given(0, columns, out), quant)
        for value, other in zip(found, plain(wt, u, p, grids, 0), strict=True):
            if value is not wt:  # without cross nothing behind the block asks what was visited
                assert torch.equal(value, other), (quant, out, columns, cross, seed)


def both(run: Callable[[], Rounded], programs: int) -> None:
    """The same bytes from `plain` and from the program, which is started so many times."""
    with mock.patch.object(column_loop, "_visit", plain):
        expected = run()
        with (
            mock.patch.object(column_loop, "_runs_triton", lambda device: True),
            mock.patch.object(gptq_triton, "round_block", wraps=gptq_triton.round_block) as counted,
        ):
            found = run()
    assert counted.call_count == programs, (counted.call_count, programs)
    assert torch.equal(found.codes, expected.codes) and found.loss == expected.loss
    for one, other in ((found.scale, expected.scale), (found.zero, expected.zero)):
        assert (one is None and other is None) or torch.equal(one, other)


def main() -> None:
    for kind, bits in KINDS:
        check_block(TensorQuant(bits, GROUP, kind), 37, 16, cross=False)
        check_block(TensorQuant(bits, GROUP, kind), 5, 16, cross=True)
    w, h, cross = problem(9, 72)
    for order in ("natural", "activation", "group"):
        quant = TensorQuant(3, GROUP, "asym_zero_in")
        both(lambda q=quant, o=order: gptq_round(w, h, q, order=o, static_groups=True, block_size=32), 3)
        both(lambda q=quant, o=order: gptq_round(w, h, q, order=o), 0)  # grids of updated weights
    channel, by_row = TensorQuant(4, Grouping("channel"), "sym_gptq"), TensorQuant(4, ROWS_OF_COLUMN, "asym_zero_in")
    both(lambda: gptq_round(w, h, channel, block_size=60, cross=cross), 2)
    both(lambda: gptq_round(w, h, channel, block_size=300), 0)
    both(lambda: gptq_round(w.double(), h.double(), channel), 0)
    both(lambda: gptq_round(w, h, by_row, grid=grid_of(w, by_row), order="activation"), 1)
    both(lambda: gptq_round(w[:, :64], h[:64, :64], parse_scheme("mxfp4").weights, static_groups=True), 0)
    w, h, _ = problem(4, 256)
    both(lambda: gptq_round_super(w, h, parse_scheme("q4_k").weights), 4)
    sys.stdout.write("all equal\n")


if __name__ == "__main__":
    main()
