"""The Triton programs are programs for a GPU, also where there is none."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
from command import environment


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
def test_every_program_compiles(tmp_path):
    env = {k: v for k, v in environment().items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, str(Path(__file__).parent / "triton_compile.py")]
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    assert result.returncode == 0 and result.stdout == "all compiled\n", result.stdout + result.stderr[-4000:]
