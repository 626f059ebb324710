"""The estimate of a run: what a stage announces is what it then advances by."""

from __future__ import annotations

import io

import pytest
from rich.console import Console
from tiny_runs import quantize, tiny_checkpoint

from calibration.progress import Silent
from cli.progress import TerminalProgress


class Counted(Silent):
    """Total and sum of the units per stage."""

    def __init__(self):
        self.stages: dict[str, list[int]] = {}

    def stage(self, name, total, done=0):
        self.stages[name] = [total, done]

    def advance(self, detail, units=1):
        self.stages[list(self.stages)[-1]][1] += units


@pytest.mark.parametrize(
    "method",
    ["rtn", "awq", "gptq", "awq+gptq", "smoothquant+gptq", "adadim+rtn", "fp4", "gptq+norm-tweak", "signround",
     "ranges+rtn"],
)  # fmt: skip
def test_stages_end_at_their_totals(tmp_path, method):
    model, progress = tiny_checkpoint("llama", tmp_path / "model"), Counted()
    scheme = {"fp4": "fp4-e2m1-g32", "ranges+rtn": "w8a8kvfp8-astatic-kvstatic"}.get(method, "w4a16-g32")
    quantize(model, tmp_path / "out", method=method, scheme=scheme, progress=progress)
    assert {"blocks", "export", "verify"} <= set(progress.stages)
    assert {name: done for name, (_, done) in progress.stages.items()} == {
        name: total for name, (total, _) in progress.stages.items()
    }


@pytest.mark.parametrize(
    ("columns", "memory", "detail", "bar"),
    [(40, False, False, False), (60, True, False, False), (80, True, True, False), (120, True, True, True)],
)
def test_percentage_and_times_survive_on_narrow_terminals(columns, memory, detail, bar):
    console = Console(file=io.StringIO(), force_terminal=True, width=columns, color_system=None, legacy_windows=False)
    with TerminalProgress(console) as progress:
        progress.stage("check weights", 4)
        progress.advance("block 1/2 mlp.down_proj")
    assert progress._bars is not None
    with console.capture() as captured:
        console.print(progress._bars.get_renderable())
    [line] = captured.get().splitlines()
    assert "check weights" in line and " 25%" in line and "0:00:00" in line and "-:--:--" in line
    assert (" GB" in line, "block 1/2" in line, "\u2501" in line) == (memory, detail, bar), line
    assert len(line) <= columns


def test_a_run_shows_that_it_tokenizes(tmp_path):
    model, progress = tiny_checkpoint("llama", tmp_path / "model"), Counted()
    quantize(model, tmp_path / "out", method="gptq", progress=progress)
    assert list(progress.stages)[:2] == ["tokenize", "check weights"]
