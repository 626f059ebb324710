"""Runs of one model by several processes: the same bytes for every number of them, and after kill -9 of any of them.

    PYTHONPATH=..:. python several_processes.py bytes demo --methods awq+gptq,rotate+gptq --sizes 1,2,3,4
    PYTHONPATH=..:. python several_processes.py kills demo --methods awq+gptq --sizes 3 --points 10
    PYTHONPATH=..:. python several_processes.py kills demo --sizes 3 --points 4 --within 8 --fresh

``--command`` names another than ``quantize``. In ``bytes`` the bytes on the wire are those of the loopback interface:
run it where nothing else uses that, such as in ``unshare --net bash -c 'ip link set lo up; ...'``. In ``kills`` the
points are spread over the time of a run; the processes left must end within 30 seconds with one message, and one
process with ``--resume`` must end in the bytes of a run that nobody killed; with ``--overwrite`` the folder of an
earlier run is there, and must stay as it is until the new one is whole. Ends with code 1 where one of that fails.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import forked
import pytest
import torch
from tiny_runs import text_file, tiny_checkpoint

import ptq.planning.source
import ptq.run.pipeline

PATIENCE = 30.0  # seconds that the others have to end
LONG = 600.0  # seconds for a whole run
FRESH = False
"""Start every process anew, which takes seconds of imports, and not as a fork of this one."""


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def start(size: int, words: list[str], place: Path, logs: str = "rank") -> list[int]:
    """The processes of a run, as a launcher starts them, in the folder ``place``; each prints to a file there."""
    at = free_port()
    return [start_one(rank, size, at, words, place, logs) for rank in range(size)]


def start_one(rank: int, size: int, at: int, words: list[str], place: Path, logs: str = "rank") -> int:
    """One of them."""
    names = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": at}
    if FRESH:
        set_here = {**os.environ, **{name: str(value) for name, value in names.items()}, "OMP_NUM_THREADS": "1"}
        with open(place / f"{logs}{rank}.log", "w") as log:
            command = [sys.executable, "-m", "cli.main", *words]
            return subprocess.Popen(command, cwd=place, env=set_here, stdout=log, stderr=log).pid

    def launched() -> None:
        torch.set_num_threads(1)  # the pool of threads does not come along with a fork
        os.environ.update({name: str(value) for name, value in names.items()})

    return forked.start(words, place, place / f"{logs}{rank}.log", launched)


def wait(children: list[int], seconds: float = LONG) -> list[int | None]:
    """Their exit codes, None for those that still run at the end of the time; they are killed."""
    ends = time.monotonic() + seconds
    codes = [forked.wait(child, max(0.0, ends - time.monotonic())) for child in children]
    for child, code in zip(children, codes, strict=True):
        if code is None:
            forked.kill(child)
    return codes


def together(size: int, words: list[str], place: Path) -> list[tuple[int | None, str]]:
    """Exit code and what it printed of every process."""
    codes = wait(start(size, words, place), 240)
    return [(code, (place / f"rank{rank}.log").read_text()) for rank, code in enumerate(codes)]


def said(place: Path, *ranks: int) -> str:
    """What the processes of these numbers have printed, one error among it and no traceback."""
    text = "".join((place / f"rank{rank}.log").read_text() for rank in ranks)
    assert text.count("error: ") == 1 and "Traceback" not in text, text
    return text


def batches_of_two_windows(patch: pytest.MonkeyPatch) -> None:
    """So that a few short windows make enough batches for every lane; processes that are forked have it, too."""
    for module in ("ptq.planning.source", "ptq.analysis.observe"):
        patch.setattr(f"{module}.BATCH_TOKENS", 64)
    patch.setattr("ptq.evaluation.EVAL_TOKENS", 64)


def command_on_a_tiny_llama(folder: Path) -> list[str]:
    """Of 18 batches, where they are of two windows."""
    options = ["--samples", "36", "--seq-len", "32", "--dataset", str(text_file(folder)), "--out", "out"]
    return ["quantize", str(tiny_checkpoint("llama", folder / "model")), *options]


def digests(folder: Path) -> dict[str, str]:
    """sha256 of every file of a run but the record of times and memory."""
    files = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.name != "timings.json"]
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def on_the_wire() -> int:
    """Bytes that the loopback interface has carried."""
    line = next(line for line in Path("/proc/net/dev").read_text().splitlines() if line.strip().startswith("lo:"))
    return int(line.split()[1])


def whole_run(size: int, words: list[str], place: Path) -> tuple[dict[str, str], float]:
    """A run that nobody kills: its digests and seconds. Its folder is removed."""
    begun = time.monotonic()
    codes = wait(start(size, words, place))
    if codes != [0] * size:
        raise SystemExit(f"exit codes {codes}:\n" + "".join(p.read_text() for p in sorted(place.glob("rank*.log"))))
    found = digests(place / "out")
    shutil.rmtree(place / "out")
    return found, time.monotonic() - begun


def compare_sizes(methods: list[str], sizes: list[int], words: list[str], place: Path) -> bool:
    """A row per method and number of processes."""
    print(
        "| method | processes | files | sha256 of all | s | MB on the wire |\n| --- | ---: | ---: | --- | ---: | ---: |"
    )
    same = True
    for method in methods:
        first: dict[str, str] = {}
        for size in sizes:
            before = on_the_wire()
            found, seconds = whole_run(size, [*words, "--method", method], place)
            first = first or found
            same &= found == first
            total = hashlib.sha256(repr(sorted(found.items())).encode()).hexdigest()[:12]
            wire = (on_the_wire() - before) / 1e6
            note = "" if found == first else f" differs: {[n for n in first if found.get(n) != first[n]]}"
            print(f"| {method} | {size} | {len(found)} | {total}{note} | {seconds:.1f} | {wire:.2f} |", flush=True)
    return same


def kill_every_rank(
    method: str, size: int, points: int, words: list[str], place: Path, within: float | None, ranks: list[int] | None
) -> bool:
    """``points`` kills of every process, or of some, spread over a run, or over its first seconds; a row for each."""
    words = [*words, "--method", method]
    if "--overwrite" in words and not (place / "old").exists():
        wait(start(1, [*(word for word in words if word != "--overwrite"), "--seed", "7"], place))
        shutil.copytree(place / "out", place / "old")
    expected, length = whole_run(size, words, place)
    print(f"{method}, {size} processes, {length:.1f} s")
    print("| rank | at | blocks | others ended | resumed |\n| ---: | ---: | ---: | --- | --- |")
    good = True
    for rank in range(size) if ranks is None else ranks:
        for point in range(points):
            at = (point + 0.5) / points * (within or length)
            good &= one_kill(rank, at, size, words, place, expected)
    return good


def one_kill(rank: int, at: float, size: int, words: list[str], place: Path, expected: dict[str, str]) -> bool:
    """Kill one process ``at`` seconds after the start."""
    old = digests(place / "old")
    if old:
        shutil.copytree(place / "old", place / "out")
    children = start(size, words, place)
    time.sleep(at)
    early = forked.wait(children[rank], 0)
    if early is None:
        forked.kill(children[rank])
    killed = time.monotonic()
    others = [child for number, child in enumerate(children) if number != rank]
    codes = wait(others, PATIENCE)
    seconds = time.monotonic() - killed
    texts = [(place / f"rank{number}.log").read_text() for number in range(size) if number != rank]
    told = set(codes) <= {0, 2} and sum(text.count("error: ") for text in texts) == (2 in codes)
    told &= not any("Traceback" in text for text in texts)
    blocks = len(list((place / "out.partial" / "blocks").glob("block-*.json")))
    left = digests(place / "out")
    finished = bool(left) and left != old
    if not finished:
        told &= left == old
        partial = (place / "out.partial").exists()
        again = wait(start(1, [*words, *(["--resume"] if partial else [])], place, "again"))
        finished = again == [0]
    same = finished and digests(place / "out") == expected
    shutil.rmtree(place / "out", ignore_errors=True)
    shutil.rmtree(place / "out.partial", ignore_errors=True)
    ended = f"codes {codes} in {seconds:.1f} s{'' if told else ' WITHOUT THE MESSAGE: ' + ' '.join(texts)[-300:]}"
    note = " (had ended)" if early is not None else ""
    print(f"| {rank}{note} | {at:.1f} s | {blocks} | {ended} | {'same bytes' if same else 'DIFFERS'} |", flush=True)
    return told and same


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["bytes", "kills"])
    parser.add_argument("model")
    parser.add_argument("--methods", default="awq+gptq")
    parser.add_argument("--sizes", default="1,2,3,4")
    parser.add_argument("--points", type=int, default=10)
    parser.add_argument("--batch-tokens", type=int, help="fewer than a run has, so that short texts make many batches")
    parser.add_argument("--command", default="quantize", help="quantize or sparsify")
    parser.add_argument("--fresh", action="store_true", help="start processes anew; kills then meet their imports")
    parser.add_argument("--ranks", help="which to kill, counted from 0; all by default")
    parser.add_argument("--within", type=float, help="kill in the first seconds of a run")
    options, rest = parser.parse_known_args()
    ranks = [int(rank) for rank in options.ranks.split(",")] if options.ranks else None
    global FRESH
    FRESH = options.fresh
    sizes, methods = [int(size) for size in options.sizes.split(",")], options.methods.split(",")
    if options.batch_tokens:
        ptq.planning.source.BATCH_TOKENS = options.batch_tokens
    words = [options.command, options.model, "--out", "out", *rest]
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        if options.what == "bytes":
            good = compare_sizes(methods, sizes, words, place)
        else:
            kinds = [(method, size) for method in methods for size in sizes]
            results = [kill_every_rank(*kind, options.points, words, place, options.within, ranks) for kind in kinds]
            good = all(results)
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
