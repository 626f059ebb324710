"""Run by test_sparse_triton.py in a process of its own: the interpreter is chosen before Triton is imported."""

from __future__ import annotations

import sys

import torch
from test_sparse_int4 import check_input as check_int4_input
from test_sparse_int4 import check_output as check_int4_output
from test_sparse_int4 import rows
from test_sparse_kernels import BF16, FP32, check_input, check_output, draw, mask_for

from sparsity.kernels.gpu import TRITON
from sparsity.kernels.kernel import Mask

SHAPES = [(7, 5), (65, 200), (130, 70)]
CASES = [("w4a16-g32-sym", 5, 64), ("w4a16-g64-asym", 130, 192), ("w4a16-gchannel-asym", 33, 130)]


def main() -> None:
    for n_in, n_out in SHAPES:
        for dtype in (FP32, BF16):
            for density, tokens in ((0.0, 1), (0.5, 1), (1.0, 1), (0.3, 3)):
                for check in (check_input, check_output):
                    check(TRITON, n_in, n_out, tokens, lambda v, d=density: mask_for(v, d), dtype, bias=tokens == 3)
    for center in (None, torch.tensor([0.3]), draw(65, seed=6)):
        mask = Mask(draw(65, seed=5).abs(), center)
        check_input(TRITON, 65, 40, 2, lambda _, m=mask: m, FP32, bias=True)
    check_input(TRITON, 65, 40, 1, lambda _: None, FP32, bias=True)
    check_output(TRITON, 40, 65, 2, lambda _: Mask(draw(65, seed=5).abs()), FP32, bias=True)
    for scheme, n_out, n_in in CASES:
        for check, mode in ((check_int4_input, "input"), (check_int4_output, "output")):
            weight, w = rows(scheme, n_out, n_in, mode)
            for density, tokens in ((0.0, 1), (0.5, 1), (1.0, 3)):
                check(TRITON, weight, w, tokens, density, FP32, bias=tokens == 3)
            check(TRITON, weight, w, 1, 0.5, BF16, bias=False)
    sys.stdout.write("all equal\n")


if __name__ == "__main__":
    main()
