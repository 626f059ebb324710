"""Sums in lanes, and runs of several processes: the same bytes whatever their number."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path

import forked
import pytest
import several_processes
import torch
from command import refused
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
from cli.main import COMMANDS

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


def together(size: int, words: list[str], place: Path) -> list[tuple[int | None, str]]:
    """Exit code and what it printed of every process."""
    codes = several_processes.wait(several_processes.start(size, words, place), 240)
    return [(code, (place / f"rank{rank}.log").read_text()) for rank, code in enumerate(codes)]


@pytest.fixture(autouse=True)
def batches_of_two_windows(monkeypatch):
    """So that a few short windows make enough batches for every lane; processes that are forked have it, too."""
    monkeypatch.setattr("ptq.planning.source.BATCH_TOKENS", 64)


@pytest.fixture(scope="module")
def command(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("shared")
    model = tiny_checkpoint("llama", folder / "model")
    text = text_file(folder)
    options = ["--samples", "36", "--seq-len", "32", "--dataset", str(text), "--out", "out"]
    return ["quantize", str(model), *options]


@pytest.mark.parametrize(
    ("method", "scheme"),
    [
        ("awq+gptq", "w4a16-g32"),
        pytest.param("rotate+gptq", "w4a4", marks=pytest.mark.slow),
        pytest.param("smoothquant", "w8a8", marks=pytest.mark.slow),
        pytest.param("gptaq+lorc", "w4a16-g32", marks=pytest.mark.slow),
    ],
)
def test_several_processes_write_the_bytes_of_one(command, tmp_path, method, scheme):
    found = {}
    for size in (1, 3):
        results = together(size, [*command, "--method", method, "--scheme", scheme], tmp_path)
        assert [code for code, _ in results] == [0] * size, results
        assert all(not text for _, text in results[1:]), "only the first process prints"
        found[size] = several_processes.digests(tmp_path / "out")
        (tmp_path / "out").rename(tmp_path / f"out-{size}")
    assert found[1] == found[3] and "report.json" in found[1]


def test_a_killed_process_ends_the_others_and_one_process_goes_on(command, tmp_path):
    words = [*command, "--method", "gptq", "--scheme", "w4a16-g32", "--samples", "200"]
    expected, _ = several_processes.whole_run(1, words, tmp_path)
    first, second = several_processes.start(2, words, tmp_path)
    while not list((tmp_path / "out.partial").glob("blocks/*.json")):
        assert forked.wait(first, 0) is None
        time.sleep(0.002)
    forked.kill(second)
    assert several_processes.wait([first], several_processes.PATIENCE) == [2]
    message = (tmp_path / "rank0.log").read_text()
    assert "another process of this run has ended" in message and "--resume" in message and "Traceback" not in message
    [(code, text)] = together(1, [*words, "--resume"], tmp_path)
    assert code == 0, text
    assert several_processes.digests(tmp_path / "out") == expected


@pytest.mark.parametrize(
    ("named", "theirs"),
    [
        ("calibration", ["--seed", "1"]),
        ("recipe", ["--scheme", "w3a16-g32"]),
        ("weights", ["MODEL"]),
        ("versions", []),
    ],
)
def test_processes_that_differ_are_refused(command, tmp_path, monkeypatch, named, theirs):
    words = [*command, "--method", "gptq"]
    other = [*words, *theirs]
    if theirs == ["MODEL"]:
        other = [words[0], str(tiny_checkpoint("llama", tmp_path / "other", seed=7)), *words[2:]]
    at = several_processes.free_port()
    first = several_processes.start_one(0, 2, at, words, tmp_path)
    if named == "versions":
        monkeypatch.setattr("ptq.run.identity.versions", lambda: {"torch": "1.0"})
    second = several_processes.start_one(1, 2, at, other, tmp_path)
    assert several_processes.wait([first, second], 120) == [2, 2]
    for rank in range(2):
        error = (tmp_path / f"rank{rank}.log").read_text()
        assert f"'{named}' differs between the processes" in error and "Traceback" not in error
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def test_a_port_that_is_taken_is_named(command, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        at = int(taken.getsockname()[1])
        child = several_processes.start_one(0, 2, at, [*command, "--method", "gptq"], tmp_path)
        assert several_processes.wait([child], 60) == [2]
    error = (tmp_path / "rank0.log").read_text()
    assert f"no connection by 127.0.0.1:{at}" in error and "--master-port" in error and "Traceback" not in error


def test_more_processes_than_windows_is_said(command, tmp_path):
    words = [*command, "--method", "gptq", "--samples", "4", "--scheme", "w4a16-g32"]
    results = together(3, words, tmp_path)
    assert [code for code, _ in results] == [0] * 3, results
    assert "3 processes, and work for 2" in results[0][1]


def launched(monkeypatch, rank: int = 0, size: int = 2) -> None:
    place = {"RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 1}
    for name, value in place.items():
        monkeypatch.setenv(name, str(value))


def test_what_cannot_be_shared_is_refused(command, tmp_path, monkeypatch):
    launched(monkeypatch)
    for name in sorted({*COMMANDS, "study"} - {"quantize"}):
        assert f"ptq {name}: started as 2 processes" in refused(name, "demo")
    assert "ptq eval: started as 2 processes" in refused("--verbose", "eval", "demo")
    assert "reads no calibration text" in refused(*command, "--method", "rtn", "--out", tmp_path / "out")
    longer = [*command, "--samples", "40"]
    assert "scap: looks at" in refused(*longer, "--method", "gptq+scap", "--target", "0.5", "--out", tmp_path / "out")
    assert os.listdir(tmp_path) == []
