"""Sums in lanes, and runs of several processes: the same bytes whatever their number."""

from __future__ import annotations

import hashlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from command import environment, refused
from tiny_runs import text_file, tiny_checkpoint

from calibration.distributed import LANES, Processes, lanes_of
from calibration.walk import lanes
from calibration.walk.statistics import (
    AbsMax,
    CrossGram,
    EqualBins,
    Extremes,
    Gram,
    Mean,
    Midpoints,
    Sample,
    TokenMaxima,
)

KINDS = (Gram, Mean, AbsMax, Sample, EqualBins, Extremes, Midpoints, TokenMaxima)


@pytest.mark.parametrize("batches", [1, 3, 7, 8, 9, 64, 100])
def test_lanes_hold_every_batch_once(batches):
    found = lanes_of(batches)
    assert [i for lane in found for i in lane] == list(range(batches))
    assert len(found) == min(LANES, batches) and all(found)
    assert max(map(len, found)) - min(map(len, found)) <= 1


@pytest.mark.parametrize("kind", KINDS)
def test_lanes_add_up_to_one_sum_over_all_batches(kind):
    batches = [torch.randn(9, 4, generator=torch.Generator().manual_seed(i)) * 2.0**i for i in range(11)]
    whole = kind(4, torch.device("cpu"))
    for x in batches:
        whole.update(x)

    def run(lane, fresh):
        for i in lane:
            fresh["x"].update(batches[i])

    total = lanes.sum_of_lanes(lanes_of(11), Processes(), lambda: {"x": kind(4, torch.device("cpu"))}, run)["x"]
    assert total.tokens == whole.tokens == 99 and total.finite()
    for name, value in vars(whole).items():
        found = getattr(total, name)
        if isinstance(value, list):
            value, found = torch.cat(value), torch.cat(found)
        torch.testing.assert_close(found, value, rtol=1e-5, atol=1e-6)


def test_cross_grams_add_up():
    one, two = (CrossGram(3, torch.device("cpu")) for _ in range(2))
    x = torch.eye(3)
    one.update_pair(x, 2 * x)
    two.update_pair(x, 4 * x)
    lanes.merge(one, two)
    assert torch.equal(one.matrix, 4 * torch.eye(3)) and one.tokens == 6


def test_a_statistic_that_does_not_add_up_is_not_added():
    with pytest.raises(TypeError, match="object"):
        lanes.merge(object(), object())


def port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def start(rank: int, size: int, at: int, *words: str | Path) -> subprocess.Popen[str]:
    """One of the processes of a run, as a launcher starts it."""
    place = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": at}
    return subprocess.Popen(
        [sys.executable, "-m", "cli.main", *map(str, words)],
        env={**environment(), **{name: str(value) for name, value in place.items()}, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def together(size: int, *words: str | Path) -> list[tuple[int, str, str]]:
    """Exit code, stdout and stderr of every process."""
    at = port()
    processes = [start(rank, size, at, *words) for rank in range(size)]
    texts = [process.communicate(timeout=240) for process in processes]
    return [(process.returncode, *text) for process, text in zip(processes, texts, strict=True)]


def digests(folder: Path) -> dict[str, str]:
    files = [p for p in folder.iterdir() if p.name != "timings.json"]
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@pytest.fixture(scope="module")
def command(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("shared")
    model = tiny_checkpoint("llama", folder / "model")
    text = text_file(folder)
    options = ["--samples", "12", "--seq-len", "32", "--dataset", str(text), "--scheme", "w4a16-g32"]
    return ["quantize", str(model), *options]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["awq+gptq", "rotate+gptq"])
def test_two_processes_write_the_bytes_of_one(command, tmp_path, method):
    found = {}
    for size in (1, 2):
        out = tmp_path / "out"
        results = together(size, *command, "--method", method, "--out", out)
        assert [code for code, *_ in results] == [0] * size, results
        found[size] = digests(out)
        assert all(not text for _, text, _ in results[1:]), "only the first process prints"
        out.rename(tmp_path / f"out-{size}")
    assert found[1] == found[2]


@pytest.mark.slow
def test_a_killed_process_ends_the_others_and_one_process_goes_on(command, tmp_path):
    out, whole = tmp_path / "out", tmp_path / "whole"
    words = [*command, "--method", "gptq", "--samples", "200"]
    at = port()
    first, second = (start(rank, 2, at, *words, "--out", out) for rank in range(2))
    while not list((tmp_path / "out.partial").glob("blocks/*.json")):
        assert first.poll() is None
        time.sleep(0.01)
    second.send_signal(signal.SIGKILL)
    killed = time.monotonic()
    _, message = first.communicate(timeout=60)
    second.communicate()
    assert time.monotonic() - killed < 30
    if first.returncode == 0:
        pytest.skip("the run had finished")
    assert "another process of this run has ended" in message and "--resume" in message
    for target, extra in ((out, ["--resume"]), (whole, [])):
        [(code, _, error)] = together(1, *words, "--out", target, *extra)
        assert code == 0, error
    assert digests(out) == digests(whole)


@pytest.mark.slow
def test_processes_that_differ_are_refused(command, tmp_path):
    at = port()
    processes = [
        start(rank, 2, at, *command, "--method", "gptq", "--seed", str(rank), "--out", tmp_path / "out")
        for rank in range(2)
    ]
    for process in processes:
        _, error = process.communicate(timeout=120)
        assert process.returncode == 2 and "differs between the processes" in error and "Traceback" not in error
        assert "'calibration'" in error
    assert not (tmp_path / "out").exists()


def launched(monkeypatch, rank: int = 0, size: int = 2) -> None:
    place = {"RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 1}
    for name, value in place.items():
        monkeypatch.setenv(name, str(value))


def test_what_cannot_be_shared_is_refused(command, tmp_path, monkeypatch):
    launched(monkeypatch)
    assert "ptq eval: started as 2 processes" in refused("eval", "demo")
    assert "reads no calibration text" in refused(*command, "--method", "rtn", "--out", tmp_path / "out")
    longer = [*command, "--samples", "40"]
    assert "scap: looks at" in refused(*longer, "--method", "gptq+scap", "--target", "0.5", "--out", tmp_path / "out")
    assert os.listdir(tmp_path) == []
