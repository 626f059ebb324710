"""The Triton kernels against the oracles of the others: in Triton's interpreter, and on a GPU where there is one."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from command import environment
from test_sparse_kernels import BF16, FP32, check_input, check_output, mask_for

from calibration.errors import ToolkitError
from sparsity.kernels.dispatch import refusals
from sparsity.kernels.gpu import TRITON
from sparsity.kernels.kernel import SparseQuery

TESTS = Path(__file__).parent


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
def test_products_in_the_interpreter():
    paths = os.pathsep.join([environment()["PYTHONPATH"], str(TESTS), os.environ.get("PYTHONPATH", "")])
    env = {**environment(), "TRITON_INTERPRET": "1", "PYTHONPATH": paths}
    command = [sys.executable, str(TESTS / "triton_checks.py")]
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    assert result.returncode == 0 and result.stdout == "all equal\n", result.stdout + result.stderr[-4000:]


def test_triton_says_why_it_does_not_run_here():
    assert "not on cpu" in refusals(SparseQuery("input", "float", FP32, "cpu"))["triton"]
    assert "not float64" in refusals(SparseQuery("input", "float", torch.float64, "cuda"))["triton"]
    if importlib.util.find_spec("triton") is None:
        assert refusals(SparseQuery("input", "int4", BF16, "cuda"))["triton"] == "Triton is not installed"


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
@pytest.mark.parametrize("tokens", [0, 9])
def test_numbers_of_tokens_that_the_kernel_does_not_take_are_refused(tokens):
    with pytest.raises(ToolkitError, match=f"{tokens} tokens at once, it takes 1 to 8"):
        TRITON.input_product(torch.zeros(tokens, 8), torch.zeros(8, 8), None, None)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_products_on_a_gpu(dtype, monkeypatch):
    monkeypatch.setattr("test_sparse_kernels.draw", _on_gpu)
    for density in (0.0, 0.5, 1.0):
        check_input(TRITON, 300, 257, 3, lambda v, d=density: mask_for(v, d), dtype, bias=True)
        check_output(TRITON, 300, 257, 3, lambda v, d=density: mask_for(v, d), dtype, bias=True)


def _on_gpu(*shape: int, dtype: torch.dtype = FP32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to("cuda", dtype)
