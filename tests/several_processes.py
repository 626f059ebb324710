"""Runs of one model by several processes: the same bytes for every number of them, and after kill -9 of any of them.

    PYTHONPATH=..:. python several_processes.py bytes demo --methods awq+gptq,rotate+gptq --sizes 1,2,3,4
    PYTHONPATH=..:. python several_processes.py kills demo --methods awq+gptq --sizes 3 --points 10

In ``bytes`` the bytes on the wire are those of the loopback interface: run it where nothing else uses that, such as in
``unshare --net bash -c 'ip link set lo up; ...'``. In ``kills`` the points are spread over the time of a run; the
processes left must end within 30 seconds, and one process with ``--resume`` must end in the bytes of a run that nobody
killed. Ends with code 1 where one of that fails.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import socket
import sys
import tempfile
import time
from pathlib import Path

import forked
import torch

import ptq.run.pipeline  # noqa: F401  (what is imported here is there after a fork)

PATIENCE = 30.0  # seconds that the others have to end
LONG = 600.0  # seconds for a whole run


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


def kill_every_rank(method: str, size: int, points: int, words: list[str], place: Path) -> bool:
    """``points`` kills of every process, at moments spread over a run; a row for each."""
    words = [*words, "--method", method]
    expected, length = whole_run(size, words, place)
    print(f"{method}, {size} processes, {length:.1f} s")
    print("| rank | at | blocks | others ended | resumed |\n| ---: | ---: | ---: | --- | --- |")
    good = True
    for rank in range(size):
        for point in range(points):
            at = (point + 0.5) / points * length
            good &= one_kill(rank, at, size, words, place, expected)
    return good


def one_kill(rank: int, at: float, size: int, words: list[str], place: Path, expected: dict[str, str]) -> bool:
    """Kill one process ``at`` seconds after the start."""
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
    told = all(code == 0 or (code == 2 and "has ended" in text) for code, text in zip(codes, texts, strict=True))
    blocks = len(list((place / "out.partial" / "blocks").glob("block-*.json")))
    finished = (place / "out").exists()
    if not finished:
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
    options, rest = parser.parse_known_args()
    sizes, methods = [int(size) for size in options.sizes.split(",")], options.methods.split(",")
    words = ["quantize", options.model, "--out", "out", *rest]
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        if options.what == "bytes":
            good = compare_sizes(methods, sizes, words, place)
        else:
            results = [kill_every_rank(m, n, options.points, words, place) for m in methods for n in sizes]
            good = all(results)
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
