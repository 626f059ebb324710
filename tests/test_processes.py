"""Processes of one run that end, differ, or cannot share it: one message, no traceback, and what is kept goes on."""

from __future__ import annotations

import logging
import os
import socket
import tempfile
import threading
import time
from pathlib import Path

import forked
import pytest
import several_processes
import torch
from command import refused
from several_processes import batches_of_two_windows, command_on_a_tiny_llama, said, together
from tiny_runs import tiny_checkpoint

from calibration import speaking
from cli.main import COMMANDS


@pytest.fixture(autouse=True)
def short_batches(monkeypatch, tmp_path):
    batches_of_two_windows(monkeypatch)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


@pytest.fixture(scope="module")
def command(tmp_path_factory) -> list[str]:
    return command_on_a_tiny_llama(tmp_path_factory.mktemp("shared"))


def test_a_killed_process_ends_the_others_and_one_process_goes_on(command, tmp_path):
    words = [*command, "--method", "gptq", "--scheme", "w4a16-g32", "--samples", "200"]
    expected, _ = several_processes.whole_run(1, words, tmp_path)
    first, second, third = several_processes.start(3, words, tmp_path)
    while not list((tmp_path / "out.partial").glob("blocks/*.json")):
        assert forked.wait(first, 0) is None
        time.sleep(0.002)
    forked.kill(second)
    assert several_processes.wait([first, third], several_processes.PATIENCE) == [2, 2]
    told = said(tmp_path, 0, 2)
    assert "error: process 2 of 3 has ended" in told and "out.partial keeps what is finished" in told
    assert f"ptq {' '.join(words)} --resume" in told
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
    assert f"'{named}' differs between the processes" in said(tmp_path, 0, 1)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def fit_of(command: list[str], *more: str) -> list[str]:
    return ["fit", *command[1:], "--bpw", "4.25", "--schemes", "w3a16-g32,w4a16-g32", *more]


@pytest.mark.parametrize(("named", "theirs"), [("budget", ["--bpw", "4"]), ("schemes", ["--schemes", "w3a16-g32"])])
def test_fits_that_differ_are_refused(command, tmp_path, named, theirs):
    at = several_processes.free_port()
    words = [fit_of(command), fit_of(command, *theirs)]
    children = [several_processes.start_one(rank, 2, at, words[rank], tmp_path) for rank in range(2)]
    assert several_processes.wait(children, 120) == [2, 2]
    assert f"'{named}' differs between the processes" in said(tmp_path, 0, 1)
    assert not (tmp_path / "out").exists()


def test_a_killed_process_ends_a_fit(command, tmp_path):
    words = fit_of(command, "--samples", "200")
    first, second, third = several_processes.start(3, words, tmp_path)
    while "sensitivities ..." not in (tmp_path / "rank0.log").read_text():
        assert forked.wait(first, 0) is None
        time.sleep(0.002)
    forked.kill(second)
    assert several_processes.wait([first, third], several_processes.PATIENCE) == [2, 2]
    told = said(tmp_path, 0, 2)
    assert "error: process 2 of 3 has ended" in told and "nothing is left of it" in told
    assert not (tmp_path / "out").exists()


def test_a_port_that_is_taken_is_named(command, tmp_path, monkeypatch):
    monkeypatch.setattr("calibration.joining.TOGETHER", 2.0)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        at = int(taken.getsockname()[1])
        words = [*command, "--method", "gptq"]
        children = [several_processes.start_one(rank, 2, at, words, tmp_path) for rank in range(2)]
        assert several_processes.wait(children, 60) == [2, 2]
    error = said(tmp_path, 0, 1)
    assert f"no connection by 127.0.0.1:{at}" in error and "--master-port" in error


@pytest.mark.parametrize("store", ["of the first process", "of the launcher"])
def test_a_first_process_that_never_comes_is_not_waited_for(command, tmp_path, monkeypatch, store):
    monkeypatch.setattr("calibration.joining.TOGETHER", 2.0)
    at = several_processes.free_port()
    if store == "of the launcher":
        monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
        kept = torch.distributed.TCPStore("127.0.0.1", at, None, True, wait_for_workers=False)  # noqa: F841
    words = [*command, "--method", "gptq"]
    children = [several_processes.start_one(rank, 3, at, words, tmp_path) for rank in (1, 2)]
    assert several_processes.wait(children, 60) == [2, 2]
    error = said(tmp_path, 1, 2)
    assert "error: process 1 of 3 ended before the run, or did not come within 2 seconds" in error
    assert f"127.0.0.1:{at}" in error


def test_what_an_earlier_run_has_said_silences_no_later_one(monkeypatch):
    launched(monkeypatch)
    assert [speaking.first_to_speak() for _ in range(2)] == [True, False]
    monkeypatch.setattr(speaking, "STARTED", time.time())  # the same command again
    assert [speaking.first_to_speak() for _ in range(2)] == [True, False]


def test_a_process_that_ends_before_all_are_there_is_named(command, tmp_path, monkeypatch):
    monkeypatch.setattr("calibration.joining.TOGETHER", 2.0)
    words, at = [*command, "--method", "gptq"], several_processes.free_port()
    first, third = (several_processes.start_one(rank, 3, at, words, tmp_path) for rank in (0, 2))
    assert several_processes.wait([first, third], 60) == [2, 2]
    assert "error: process 2 of 3 ended before the run, or did not come within 2 seconds" in said(tmp_path, 0, 2)
    assert not (tmp_path / "out.partial").exists()


def test_the_first_process_is_missed_by_all(command, tmp_path):
    words = [*command, "--method", "gptq", "--scheme", "w4a16-g32", "--samples", "200"]
    first, second, third = several_processes.start(3, words, tmp_path)
    while not list((tmp_path / "out.partial").glob("blocks/*.json")):
        assert forked.wait(first, 0) is None
        time.sleep(0.002)
    forked.kill(first)
    assert several_processes.wait([second, third], several_processes.PATIENCE) == [2, 2]
    told = said(tmp_path, 1, 2)
    assert "error: process 1 of 3 has ended" in told and "--resume" in told


def test_an_error_of_one_process_ends_all_and_is_told_once(command, tmp_path):
    words, at = [*command, "--method", "gptq"], several_processes.free_port()
    other = [*words, "--dataset", "nowhere.txt"]
    children = [several_processes.start_one(rank, 2, at, w, tmp_path) for rank, w in enumerate((words, other))]
    assert several_processes.wait(children, 60) == [2, 2]
    assert "nowhere.txt" in said(tmp_path, 0, 1)


def test_gpus_that_are_not_there_are_told_once(command, tmp_path):
    results = together(3, [*command, "--method", "gptq", "--device", "cuda"], tmp_path)
    if not torch.cuda.is_available():
        assert [code for code, _ in results] == [2] * 3
        assert "this machine has no such GPU" in said(tmp_path, 0, 1, 2)


def test_a_process_stuck_in_a_library_ends_without_it(tmp_path, monkeypatch):
    """The thread that works never comes back to Python: it waits for a lock that nobody lets go of."""
    stuck = threading.Lock()
    stuck.acquire()

    def hang(job: object) -> None:
        logging.getLogger().handlers.clear()  # those of pytest
        Path(f"stuck-{os.environ['RANK']}").touch()
        stuck.acquire()

    monkeypatch.setattr("calibration.presence.STUCK", 0.5)
    monkeypatch.setattr("ptq.api.running.check_shared", hang)
    words = ["quantize", "demo", "--method", "gptq", "--out", "out"]
    first, second = several_processes.start(2, words, tmp_path)
    while len(list(tmp_path.glob("stuck-*"))) < 2:
        assert forked.wait(first, 0) is None
        time.sleep(0.02)
    forked.kill(second)
    assert several_processes.wait([first], several_processes.PATIENCE) == [2]
    assert "error: process 2 of 2 has ended" in said(tmp_path, 0)


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
    for name in sorted({*COMMANDS} - {"quantize", "sparsify", "analyze", "eval", "fit"}):
        assert f"ptq {name}: started as 2 processes" in refused(name, "demo")
    assert "ptq study calibration: started as 2 processes" in refused("--verbose", "study", "calibration", "demo")
    assert "--tasks piqa: the harness runs in one process" in refused("eval", "demo", "--tasks", "piqa")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["quantize", "--method", "rtn"], "reads no calibration text"),
        pytest.param(["quantize", "--method", "signround"], "signround: looks at", marks=pytest.mark.slow),
        pytest.param(["analyze", "--try"], "--try: not shared", marks=pytest.mark.slow),
        pytest.param(
            ["sparsify", "--method", "scap", "--max-ppl-increase", "1%"],
            "--max-ppl-increase: scap is searched for",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_runs_that_cannot_be_shared_are_refused(command, tmp_path, words, message):
    results = together(2, [words[0], *command[1:], *words[1:]], tmp_path)
    assert [code for code, _ in results] == [2, 2] and message in said(tmp_path, 0, 1)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()
