"""kill -9 at random points of `ptq quantize`, resume, and compare every file with an uninterrupted run.

    python benchmarks/kill_resume.py ../shared/models/wikillama --dataset wiki.train.raw --method awq+gptq --points 5

The points are drawn from a seed and spread over the run: one in each of as many equal parts of its duration, counted
from the moment when the output folder appears, so that they fall into quantizing, exporting, verifying and reporting.
Ends with code 1 where any file but timings.json differs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

POLL = 0.005  # seconds


def main() -> None:
    options = arguments()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        work = Path(name)
        begun = time.monotonic()
        whole = work / "whole"
        start, length = uninterrupted(command(options, whole), whole)
        expected = digests(whole)
        print(f"uninterrupted: {time.monotonic() - begun:.1f} s, {len(expected)} files to compare")
        print(f"| {'killed after':>12} | {'stage':14} | {'blocks':>6} | {'resumed in':>10} | result")
        print(f"| {'-' * 11}: | {'-' * 14} | {'-' * 5}: | {'-' * 9}: | ------")
        generator = random.Random(options.seed)
        results = []
        for point in range(options.points):
            delay = (point + generator.random()) / options.points * length
            results.append(one_point(options, work / "out", delay, expected))
            shutil.rmtree(work / "out", ignore_errors=True)
            shutil.rmtree(work / "out.partial", ignore_errors=True)
    print(f"{sum(results)} of {len(results)} byte-identical (seed {options.seed}, start-up {start:.1f} s not counted)")
    sys.exit(0 if all(results) else 1)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="kill -9 at random points, resume, compare bytes")
    parser.add_argument("model", help="local folder, hub id or demo")
    parser.add_argument("--dataset", default=None)
    parser.add_argument("--method", default="awq+gptq")
    parser.add_argument("--scheme", default="w4a16-g128-sym")
    parser.add_argument("--points", type=int, default=5)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--eval", default=None, help="also evaluate at the end of every run, on this text")
    parser.add_argument("--seed", type=int, default=0, help="of the points")
    parser.add_argument("--folder", type=Path, default=None, help="where to work; default: the system's temporary one")
    return parser.parse_args()


def command(options: argparse.Namespace, out: Path) -> list[str]:
    """The command line of one run."""
    words = [sys.executable, "-m", "cli.main", "quantize", options.model, "--method", options.method]
    words += ["--scheme", options.scheme, "--samples", str(options.samples), "--seq-len", str(options.seq_len)]
    words += ["--dataset", options.dataset] if options.dataset else []
    words += ["--eval", options.eval] if options.eval else []
    return [*words, "--out", str(out)]


def environment() -> dict[str, str]:
    """This repository's packages, whatever the working directory."""
    return {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])}


def spawn(words: list[str], log: Path) -> subprocess.Popen[bytes]:
    """A run in the background; its output goes to a file."""
    with log.open("wb") as file:
        return subprocess.Popen(words, stdout=file, stderr=subprocess.STDOUT, env=environment())


def wait_for_folder(run: subprocess.Popen[bytes], out: Path) -> None:
    """Until the run has begun to write, or has ended."""
    partial = out.with_name(out.name + ".partial")
    while not partial.exists() and not out.exists() and run.poll() is None:
        time.sleep(POLL)


def uninterrupted(words: list[str], out: Path) -> tuple[float, float]:
    """Seconds until the run begins to write, and from there to the finished folder."""
    log = out.with_name("whole.log")
    begun = time.monotonic()
    run = spawn(words, log)
    wait_for_folder(run, out)
    start = time.monotonic() - begun
    while not out.exists() and run.poll() is None:
        time.sleep(POLL)
    length = time.monotonic() - begun - start
    if run.wait() != 0:
        sys.exit(f"the uninterrupted run failed:\n{log.read_text()}")
    return start, length


def one_point(options: argparse.Namespace, out: Path, delay: float, expected: dict[str, str]) -> bool:
    """Kill one run ``delay`` seconds after it began to write, resume it, compare; prints a row of the table."""
    log = out.with_name("run.log")
    words = command(options, out)
    run = spawn(words, log)
    wait_for_folder(run, out)
    time.sleep(delay)
    run.send_signal(signal.SIGKILL)
    run.wait()
    stage, blocks = where(out, log)
    begun = time.monotonic()
    if not out.exists():
        resumed = spawn([*words, "--resume"], log)
        if resumed.wait() != 0:
            print(f"| {delay:10.1f} s | {stage:14} | {blocks:>6} | {'':>10} | --resume failed: {log.read_text()}")
            return False
    seconds = time.monotonic() - begun
    found = digests(out)
    differing = sorted(n for n in found.keys() | expected.keys() if found.get(n) != expected.get(n))
    result = "identical" if not differing else f"differs: {', '.join(differing)}"
    print(f"| {delay:10.1f} s | {stage:14} | {blocks:>6} | {seconds:8.1f} s | {result}", flush=True)
    return not differing


def where(out: Path, log: Path) -> tuple[str, int]:
    """The stage that the killed run was in, from its output, and the blocks that it had committed."""
    if out.exists():
        return "finished", 0
    lines = [line[:-4] for line in log.read_text(errors="replace").splitlines() if line.endswith(" ...")]
    blocks = out.with_name(out.name + ".partial") / "blocks"
    return (lines[-1] if lines else "start"), len(list(blocks.glob("block-*.safetensors")))


def digests(folder: Path) -> dict[str, str]:
    """sha256 of every file below ``folder`` but the record of times and memory."""
    names = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != "timings.json")
    found = {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in names}
    assert "report.json" in found and json.loads((folder / "report.json").read_text()), folder
    return found


if __name__ == "__main__":
    main()
