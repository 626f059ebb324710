"""Full disks, folders of other users and too little memory: one message, nothing under the final name, and the same
bytes once there is room. Disks are small file systems in memory where this process may mount some."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from command import done, environment, products, refused, text_file, tiny
from forked import start, wait
from little_memory import SECONDS, remove

import calibration.walk.walk

DATA = ["--dataset", "text.txt", "--seq-len", "16"]
SMALL = [*DATA, "--samples", "2"]
COMMANDS: dict[str, list[str]] = {
    "quantize": ["quantize", "model", "--method", "gptq", "--scheme", "w4a16-g32", *SMALL],
    "export": ["export", "quantized", "--format", "native"],
    "sparsify": ["sparsify", "model", "--method", "teal", "--target", "0.5", *DATA, "--samples", "64"],
    "analyze": ["analyze", "model", *SMALL],
    "prepare": ["prepare", "quantized", "--rank", "8", "--steps", "2", *DATA],
    "fit": ["fit", "model", "--bpw", "4.25", "--schemes", "w3a16-g32,w4a16-g32", *SMALL],
    "study": ["study", "sensitivity", "model", "--schemes", "w4a16-g32", "--windows", "1", *SMALL],
}
SHORT: dict[str, list[str]] = {
    "eval": ["eval", "model", *DATA],
    "sparsify": ["sparsify", "model", "--method", "scap", "--target", "0.5", *DATA, "--samples", "64"],
}
"""Commands of tests about memory."""
NOBODY = 65534
C_LIBRARY = 127  # its exit code where a new thread's own variables have no room


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("disks")
    text_file(folder / "text.txt")
    model = tiny(folder / "model")
    words = ["--method", "rtn", "--scheme", "w4a16-g32", "--format", "compressed-tensors"]
    done("quantize", model, *words, "--out", folder / "quantized")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a forked process has no others
    yield folder
    torch.set_num_threads(threads)


@contextlib.contextmanager
def small_disk(folder: Path, size: int) -> Iterator[None]:
    """A file system of ``size`` bytes at ``folder``; the test is skipped where none can be mounted."""
    folder.mkdir(exist_ok=True)
    words = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(words, capture_output=True, check=False).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)
        folder.rmdir()


def enlarge(folder: Path) -> None:
    subprocess.run(["mount", "-o", "remount,size=64m", str(folder)], check=True)


def endless_disk() -> None:
    """The check before the work sees a large disk: what is looked at is a disk that fills up while the run writes."""
    shutil.disk_usage = lambda path: shutil._ntuple_diskusage(1 << 50, 0, 1 << 50)  # type: ignore[attr-defined]


def run(place: Path, words: list[str], before: Callable[[], None] | None = None) -> tuple[int | None, str]:
    log = place / "log"
    code = wait(start(words, place, log, before), SECONDS)
    return code, log.read_text(errors="replace")


def left(out: Path) -> dict[str, bytes]:
    return {"": out.read_bytes()} if out.is_file() else products(out)


def refusal(code: int | None, printed: str, *parts: str) -> None:
    assert code == 2 and printed.count("error:") == 1 and "fix:" in printed and "Traceback" not in printed, printed
    assert any(part in printed for part in parts), printed


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n == "sparsify" else n for n in COMMANDS])
def test_a_disk_that_fills_up(place, name):
    """With room for a part of the files only; then with room for all, by --resume where it is offered."""
    disk = place / "disk"
    out = "disk/out.toml" if name == "fit" else "disk/out"
    words = [*COMMANDS[name], "--out", out]
    ballast = disk / "ballast"
    with small_disk(disk, 64 << 20):
        code, printed = run(place, words)
        assert code == 0, printed
        expected = left(place / out)
        whole = sum(len(data) + 4096 for data in expected.values())
    for share in {"fit": (0.0,), "quantize": (0.0, 0.6)}.get(name, (0.6,)):
        with small_disk(disk, 4096 + int(share * whole) // 4096 * 4096):
            ballast.write_bytes(bytes(4096))
            code, printed = run(place, words, endless_disk)
            ballast.unlink()
            refusal(code, printed, "the disk is full")
            assert not (place / out).exists()
            kept = sorted(p.name for p in disk.iterdir())
            assert kept == [] or (name == "quantize" and kept == ["out.partial"]), kept
            enlarge(disk)
            resumed = ["--resume"] if (disk / "out.partial" / "plan.json").exists() else []
            code, printed = run(place, [*words, *resumed])
            assert code == 0, printed
            assert left(place / out) == expected


@pytest.mark.parametrize("name", COMMANDS)
def test_a_folder_of_another_user(place, name):
    """As a user who may read everything and write nowhere."""
    if os.geteuid() != 0:
        pytest.skip("only root can become another user")
    for folder in (place, *place.parents):
        if folder.stat().st_uid == 0 and folder != Path("/") and folder.stat().st_mode & 0o005 != 0o005:
            folder.chmod(folder.stat().st_mode | 0o055)
    log = place / "log"
    log.touch()
    log.chmod(0o666)

    def leave() -> None:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)

    code, printed = run(place, [*COMMANDS[name], "--out", "kept"], leave)
    refusal(code, printed, "not writable", "Permission denied")
    assert not [path.name for path in place.iterdir() if "kept" in path.name]


@pytest.mark.parametrize("name", ["quantize", "export", "sparsify", "analyze", "fit", "eval"])
def test_too_little_memory(place, name):
    """Nearly no room for more: success or one message, and nothing half made: the same command then runs."""
    words = [*(SHORT.get(name) or COMMANDS[name]), *([] if name == "eval" else ["--out", "out"])]
    script = [sys.executable, str(Path(__file__).parent / "little_memory.py"), *words]
    variables = {**environment(), "MALLOC_ARENA_MAX": "1"}  # one heap: what is free in it can be taken
    ended = subprocess.run(script, cwd=place, env=variables, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    outcomes = json.loads(ended.stdout)
    for outcome in outcomes:
        code, printed, left = outcome["code"], outcome["printed"], outcome["left"]
        if code == 2:
            refusal(code, printed, "no memory is left")
            assert "out" not in left
            if name != "quantize":
                assert "starts anew" in printed and bool(left) == ("could not be removed" in printed), printed
        elif code == C_LIBRARY:
            assert "cannot allocate memory" in printed, printed
        else:
            assert code == 0 or (code is not None and code < 0), printed
    assert any(outcome["code"] for outcome in outcomes), outcomes  # which end it comes to is chance
    remove(place / "out")
    shutil.rmtree(place / "out.partial", ignore_errors=True)
    code, printed = run(place, words)
    assert code == 0, printed
    remove(place / "out")


def test_memory_that_ends_on_the_way(tmp_path, place, monkeypatch):
    """As torch says it, behind the first block: the message names the command that goes on."""
    monkeypatch.chdir(place)
    words = [*COMMANDS["quantize"], "--out", str(tmp_path / "out")]

    def none_left() -> None:
        raise RuntimeError(
            "[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried to"
        )

    monkeypatch.setattr(calibration.walk.walk, "return_freed", none_left)
    message = refused(*words)
    assert "no memory is left" in message and message.rstrip().endswith("--resume")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.partial"]
    monkeypatch.setattr(calibration.walk.walk, "return_freed", lambda: None)
    done(*words, "--resume")
