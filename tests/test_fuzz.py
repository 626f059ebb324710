"""Damaged input of every kind ends with exit code 0 or 2, no traceback, and nothing half made; see `fuzz.run`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from fuzz.run import fuzz, make_bases


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz") / "bases"
    folder.mkdir()
    make_bases(folder)
    return folder


@pytest.mark.parametrize("cases", [33, pytest.param(500, marks=pytest.mark.slow)])
def test_damaged_input(bases, cases):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a forked process has no others
    try:
        wrong = [end for end in fuzz(bases, cases, seed=1000 * cases, report=lambda end: None) if end.wrong]
    finally:
        torch.set_num_threads(threads)
    assert not wrong, "\n\n".join(f"seed {end.seed} [{end.kind}] {end.what}: {end.wrong}" for end in wrong)
