"""The Triton program of GPTQ's column loop against the loop in torch: in Triton's interpreter, and on a GPU."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from command import environment

from ptq.numerics import column_loop
from ptq.numerics.column_loop import Grids
from ptq.numerics.grids import codes_of, grid_of, levels
from ptq.scheme import Grouping, TensorQuant

TESTS = Path(__file__).parent
TRITON = importlib.util.find_spec("triton") is not None
COLUMNS, OUT = 24, 6


@pytest.mark.slow
@pytest.mark.skipif(not TRITON, reason="needs Triton")
def test_the_program_in_the_interpreter():
    """Codes, errors and loss are the same bytes as those of `plain`."""
    env = {**environment(), "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(TESTS / "gptq_triton_checks.py")]
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    assert result.returncode == 0 and result.stdout == "all equal\n", result.stdout + result.stderr[-4000:]


def plain(
    wt: torch.Tensor, u: torch.Tensor, p: torch.Tensor | None, grids: Grids, start: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`column_loop._visit` with one rounding per operation on every processor; torch's ``addr_`` fuses two of them in
    some elements, which others depends on the machine."""
    w, codes, errors = wt.clone(), torch.empty_like(wt, dtype=torch.uint8), torch.empty_like(wt)
    for i in range(len(w)):
        s, z = grids.column(start + i, w[i:])
        level = levels(w[i], s, z, grids.quant)
        codes[i] = codes_of(level, z, grids.quant)
        errors[i] = (w[i] - level * s) * (1 / u[i, i])
        w[i + 1 :] -= u[i, i + 1 :, None] * errors[i]
        if p is not None:
            w[i + 1 :] += p[i, i + 1 :, None] * w[i]
    return codes, errors, w


def grids_of(grouping: Grouping, kind: str, fixed: bool = True) -> Grids:
    w, quant = torch.randn(OUT, COLUMNS, generator=torch.Generator().manual_seed(0)), TensorQuant(4, grouping, kind)
    grid = grid_of(w, quant)
    across = (lambda t: t) if grouping.axis == "out" else (lambda t: t.T.contiguous())
    groups = [i // 8 for i in reversed(range(COLUMNS))]
    return Grids(quant, across(grid.scale), None if grid.zero is None else across(grid.zero), groups, fixed, None)


@pytest.mark.parametrize("grouping", [Grouping("group", 8), Grouping("group", 3, "out")], ids=str)
@pytest.mark.parametrize("kind", ["sym_signed", "asym_zero_in"])
def test_given_grids_are_those_of_one_column_after_another(grouping, kind):
    grids, w = grids_of(grouping, kind), torch.zeros(COLUMNS, OUT)
    step, zero = grids.given(5, 20, OUT)
    for i in range(15):
        own = grids.column(5 + i, w[5 + i :])
        assert torch.equal(step[i], own[0])
        assert (zero is None and own[1] is None) or torch.equal(zero[i], own[1])


@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize("kind", ["sym_signed", "asym_zero_in"])
def test_the_loop_in_torch_but_for_fused_operations(kind, cross):
    """In float64, where no code hangs on the last digit of a number of this seed."""
    grids, generator = grids_of(Grouping("group", 8), kind), torch.Generator().manual_seed(2)
    w, u, p = (torch.randn(COLUMNS, n, generator=generator).double() for n in (OUT, COLUMNS, COLUMNS))
    u, p = u.triu() * 0.1 + torch.eye(COLUMNS), (p * 0.1).triu(1) if cross else None
    grids.scale, grids.zero = grids.scale.double(), None if grids.zero is None else grids.zero.double()
    found, expected = column_loop._visit(w, u, p, grids, 0), plain(w, u, p, grids, 0)
    assert torch.equal(found[0], expected[0])
    for one, other in zip(found[1:], expected[1:], strict=True):
        torch.testing.assert_close(one, other)


def test_what_the_program_takes(monkeypatch):
    """Only float32 weights with given grids, on a GPU; nothing changes on CPUs."""
    grids, w = grids_of(Grouping("group", 8), "sym_signed"), torch.zeros(COLUMNS, OUT)
    assert not column_loop._one_program(w, grids, 128)
    assert column_loop._runs_triton(torch.device("cuda")) is TRITON
    monkeypatch.setattr(column_loop, "_runs_triton", lambda device: True)
    assert column_loop._one_program(w, grids, 256)
    assert not column_loop._one_program(w, grids, 257) and not column_loop._one_program(w.double(), grids, 128)
    assert not column_loop._one_program(w, grids_of(Grouping("group", 8), "sym_signed", fixed=False), 128)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available() or not TRITON, reason="needs a CUDA device and Triton")
@pytest.mark.parametrize("kind", ["sym_signed", "asym_zero_in"])
def test_a_block_on_a_gpu_has_the_codes_of_the_cpu(kind):
    """Inside a block every operation is rounded alike."""
    grids, generator = grids_of(Grouping("group", 8), kind), torch.Generator().manual_seed(1)
    w, u = torch.randn(COLUMNS, OUT, generator=generator), torch.randn(COLUMNS, COLUMNS, generator=generator)
    u = u.triu().mul_(0.1) + torch.eye(COLUMNS)
    expected = plain(w, u, None, grids, 0)
    moved = Grids(
        grids.quant,
        grids.scale.cuda(),
        None if grids.zero is None else grids.zero.cuda(),
        grids.group_of,
        True,
        None,
    )
    assert column_loop._one_program(w.cuda(), moved, 128)
    found = column_loop._visit_in_triton(w.cuda(), u.cuda(), None, moved, 0)
    assert torch.equal(found[0].cpu(), expected[0]) and torch.equal(found[1].cpu(), expected[1])
