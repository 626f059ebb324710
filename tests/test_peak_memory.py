"""Planned memory against the peak of a process of its own, on a model that is large enough to be seen."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from command import environment, process, tiny

from calibration import memory
from calibration.record import read_timings

WIDE = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 2, "vocab_size": 12288}
HEADS = {"num_attention_heads": 12, "num_key_value_heads": 4, "head_dim": 64, "max_position_embeddings": 512}
NOISE = 25e6  # bytes: what the allocator keeps, libraries that are read late, and 16 MB in which rates are measured


@pytest.mark.slow
@pytest.mark.parametrize("method", ["rtn", "awq+gptq", "rotate+gptq", "signround"])
def test_planned_memory_is_what_a_run_takes(tmp_path, method):
    """Within 15 per cent, and what a small model has of noise, of the highest peak of up to three runs."""
    tiny(tmp_path / "model", **WIDE, **HEADS)
    recipe = "".join(f'[[pass]]\nname = "{name}"\n' for name in method.split("+"))
    (tmp_path / "r.toml").write_text(recipe + ("epochs = 1\n" if method == "signround" else ""))
    ids = torch.randint(0, 256, (8, 256), generator=torch.Generator().manual_seed(0))
    from safetensors.torch import save_file

    save_file({"input_ids": ids}, tmp_path / "ids.safetensors")
    words = ["quantize", tmp_path / "model", "--recipe", tmp_path / "r.toml", "--scheme", "w4a16-g64"]
    words += ["--dataset", tmp_path / "ids.safetensors", "--samples", "8", "--seq-len", "256", "--format", "native"]
    taken = 0
    for run in range(3):  # how far reading, rounding and writing overlap, and with them the peak, is chance
        result = process(*words, "--out", tmp_path / f"out{run}", "--json", tmp_path / "plan.json")
        assert result.returncode == 0, result.stderr
        planned = json.loads((tmp_path / "plan.json").read_text())["peak_bytes"]
        timings = read_timings(tmp_path / f"out{run}")
        assert timings is not None
        taken = max(taken, timings.peak_rss_bytes - timings.base_rss_bytes)
        if abs(planned - taken) <= 0.15 * taken + NOISE:
            return
    pytest.fail(f"{planned / 1e6:.0f} MB planned, {taken / 1e6:.0f} MB taken")


APART = """
import torch
from calibration.memory import large_apart, rss_bytes
torch.ones(7_500_000)  # 30 MB, after which glibc keeps what is smaller
kept = []
def left():
    before = rss_bytes()
    large = torch.ones(5_000_000)
    kept.append(torch.ones(50_000))
    del large
    return rss_bytes() - before
with large_apart():
    print(max(left() for _ in range(3)))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_what_is_large_goes_back_at_once_although_something_small_lies_behind_it():
    words = [sys.executable, "-c", APART]
    result = subprocess.run(words, capture_output=True, text=True, check=True, env=environment())
    assert int(result.stdout) < 5e6


def test_limits_of_the_allocator_come_back(monkeypatch):
    """Forward passes of a walk take activations from freed memory; behind them, what is large lies apart again."""
    told: list[int] = []
    monkeypatch.setattr(memory, "_set_limit", told.append)
    with pytest.raises(KeyError), memory.large_apart():
        with memory.large_together():
            pass
        raise KeyError
    apart, grown = memory.APART_BYTES, memory.GROWN_BYTES
    assert told == [apart, grown, apart, grown]
    with memory.large_together():
        assert told[4:] == [], "outside of a walk it is as the C library has it"
