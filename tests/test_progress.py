"""The estimate of a run: what a stage announces is what it then advances by."""

from __future__ import annotations

import pytest
from tiny_runs import quantize, tiny_checkpoint

from calibration.progress import Silent


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
    ["rtn", "awq", "gptq", "awq+gptq", "smoothquant+gptq", "adadim+rtn", "fp4", "gptq+norm-tweak", "gptq+lorc"],
)
def test_stages_end_at_their_totals(tmp_path, method):
    model, progress = tiny_checkpoint("llama", tmp_path / "model"), Counted()
    scheme = "fp4-e2m1-g32" if method == "fp4" else "w4a16-g32"
    quantize(model, tmp_path / "out", method=method, scheme=scheme, progress=progress)
    assert {"blocks", "export", "verify"} <= set(progress.stages)
    assert {name: done for name, (_, done) in progress.stages.items()} == {
        name: total for name, (total, _) in progress.stages.items()
    }
