"""benchmarks/gpu.py, which no machine without a GPU can run: what it refuses, and its rehearsal."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from command import environment

from benchmarks.gpu import NAMES, kept, main

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu.py"


def refusal(capsys: pytest.CaptureFixture[str]) -> str:
    err = capsys.readouterr().err
    assert err.count("error:") == 1 and "fix:" in err
    return err


def test_without_a_gpu_it_refuses(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", [str(SCRIPT)])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2 and "no GPU here" in refusal(capsys)


def test_results_of_the_same_machine_are_kept_and_no_others(tmp_path, capsys):
    path, facts = tmp_path / "gpu.json", {"device": "a", "torch": "1", "ptq": "2"}
    assert kept(path, facts) == kept(None, facts) == {"machine": facts, "parts": {}}
    results = {"machine": facts, "parts": {"gram": [["a", 1.0, "s"]]}}
    path.write_text(json.dumps(results))
    assert kept(path, facts) == results
    for text in (json.dumps({**results, "machine": {**facts, "device": "b"}}), "[]", "{"):
        path.write_text(text)
        with pytest.raises(SystemExit) as end:
            kept(path, facts)
        assert end.value.code == 2 and "gpu.json" in refusal(capsys)
    with pytest.raises(SystemExit):
        kept(tmp_path / "missing" / "gpu.json", facts)
    assert "no such folder" in refusal(capsys)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
def test_the_rehearsal(tmp_path):
    """Every part runs on tiny shapes, and every kernel equals its reference in Triton's interpreter."""
    out = tmp_path / "gpu.json"
    command = [sys.executable, str(SCRIPT), "--interpret", "--json", str(out)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment(), cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr[-4000:]
    parts = json.loads(out.read_text())["parts"]
    assert tuple(parts) == NAMES and all(parts.values())
    assert {unit for _, _, unit in parts["check"]} == {"off"}
    assert all(f"| {name} | {what} |" in result.stdout for name, rows in parts.items() for what, _, _ in rows)
