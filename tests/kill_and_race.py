"""kill -9 at random points of every command, and two processes with one --out, as forks of one process.

    python kill_and_race.py --kills 200 --pairs 50 --seed 0      (from tests/, with PYTHONPATH=..:.)

A killed command is repeated, with ``--resume`` where it has one, and must end in the bytes of a run that nobody
disturbed. Of two processes one wins; what it leaves is whole and equal to a run alone. Ends with code 1 otherwise.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
import time
from itertools import combinations_with_replacement
from pathlib import Path

import torch
from command import done, products, text_file, tiny
from forked import kill, start, wait

DATA = ["--dataset", "text.txt", "--samples", "2", "--seq-len", "16"]
PLAIN = ["quantize", "model", "--scheme", "w4a16-g32", *DATA]
STUDY = ["--datasets", "text.txt", "--samples", "2", "--seq-len", "16", "--seeds", "2", "--eval", "text.txt"]
COMMANDS: dict[str, list[str]] = {
    "quantize rtn": [*PLAIN, "--method", "rtn"],
    "quantize awq+gptq": [*PLAIN, "--method", "awq+gptq"],
    "quantize signround": [*PLAIN, "--method", "signround"],
    "quantize rotate+gptq": [*PLAIN, "--method", "rotate+gptq"],
    "quantize rtn+lorc": [*PLAIN, "--method", "rtn+lorc"],
    "export": ["export", "quantized", "--format", "native"],
    "sparsify": [
        "sparsify",
        "model",
        "--method",
        "teal",
        "--target",
        "0.5",
        "--dataset",
        "text.txt",
        "--samples",
        "64",
        "--seq-len",
        "16",
    ],
    "prepare": ["prepare", "quantized", "--rank", "8", "--steps", "2", "--dataset", "text.txt", "--seq-len", "16"],
    "analyze": ["analyze", "model", *DATA],
    "fit": ["fit", "model", "--bpw", "4.25", "--schemes", "w3a16-g32,w4a16-g32", *DATA],
    "study calibration": ["study", "calibration", "model", "--scheme", "w4a16-g32", *STUDY],
    "study sensitivity": ["study", "sensitivity", "model", "--schemes", "w4a16", "--windows", "1", *DATA],
}
RESUMABLE = ("quantize", "study calibration")
MODES = ((), ("--overwrite",), ("--resume",))
SECONDS = 120.0


def make_files(place: Path) -> None:
    """A model, a quantized one and a text."""
    text_file(place / "text.txt")
    model = tiny(place / "model")
    words = ["quantize", model, "--method", "rtn", "--scheme", "w4a16-g32", "--format", "compressed-tensors"]
    done(*words, "--out", place / "quantized")


def output(name: str) -> str:
    return "out.toml" if name == "fit" else "out"


def alone(name: str, place: Path) -> tuple[dict[str, bytes], float]:
    """What a run that nobody disturbs leaves, and its seconds."""
    clean(place)
    begun = time.monotonic()
    code = wait(start([*COMMANDS[name], "--out", output(name)], place, place / "log"), SECONDS)
    seconds = time.monotonic() - begun
    if code != 0:
        raise RuntimeError(f"{name}: exit code {code}\n{(place / 'log').read_text()}")
    return left(place / output(name)), seconds


def left(out: Path) -> dict[str, bytes]:
    if out.is_file():
        return {out.name: out.read_bytes()}
    return products(out) if out.is_dir() else {}


def clean(place: Path) -> None:
    for path in [*place.glob("out*"), *place.glob(".out*")]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def killed(name: str, place: Path, after: float, expected: dict[str, bytes]) -> str:
    """Kill one run ``after`` seconds and repeat it; what is wrong then, or an empty string."""
    clean(place)
    words, log = [*COMMANDS[name], "--out", output(name)], place / "log"
    child = start(words, place, log)
    if wait(child, after) is None:
        kill(child)
    found = left(place / output(name))
    if found:
        return "" if found == expected else "killed, with other files under the final name"
    resumable = name.startswith(RESUMABLE) and (place / "out.partial" / "plan.json").exists()
    code = wait(start([*words, "--resume"] if resumable else words, place, log), SECONDS)
    if code == 2 and not name.startswith(RESUMABLE) and "--overwrite" in log.read_text():
        code = wait(start([*words, "--overwrite"], place, log), SECONDS)  # the way out that the message names
    if code != 0:
        return f"dead end: exit code {code}: {log.read_text()[-600:]}"
    found = left(place / output(name))
    differing = sorted(n for n in found.keys() | expected.keys() if found.get(n) != expected.get(n))
    if differing:
        return f"other bytes in {', '.join(differing)}"
    more = sorted(p.name for p in [*place.glob("out*"), *place.glob(".out*")] if p.name != output(name))
    return f"left over: {', '.join(more)}" if more else ""


def race(name: str, modes: tuple[tuple[str, ...], tuple[str, ...]], place: Path, delay: float,
         expected: dict[str, bytes]) -> str:  # fmt: skip
    """Two processes with one --out, the second ``delay`` seconds later; what is wrong, or an empty string."""
    clean(place)
    words = [*COMMANDS[name], "--out", "out"]
    if ("--resume",) in modes:  # something to resume
        child = start(words, place, place / "log")
        while not (place / "out.partial" / "plan.json").exists() and wait(child, 0.002) is None:
            pass
        kill(child)
    logs = [place / "log1", place / "log2"]
    first = start([*words, *modes[0]], place, logs[0])
    time.sleep(delay)
    second = start([*words, *modes[1]], place, logs[1])
    codes = [wait(first, SECONDS), wait(second, SECONDS)]
    printed = [log.read_text() for log in logs]
    if any(code not in (0, 2) for code in codes) or any("Traceback" in text for text in printed):
        return f"exit codes {codes}: {printed[0][-400:]} | {printed[1][-400:]}"
    if 0 not in codes:
        refused_alone = ("interrupted run is here", "holds no interrupted run")
        if all(any(part in text for part in (*refused_alone, "is writing there")) for text in printed):
            return "" if not left(place / "out") else "both refused, with files under the final name"
        return f"no winner: {printed[0][-400:]} | {printed[1][-400:]}"
    return "" if left(place / "out") == expected else "the winner's files differ from those of a run alone"


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--kills", type=int, default=200)
    options.add_argument("--pairs", type=int, default=50)
    options.add_argument("--seed", type=int, default=0)
    chosen = options.parse_args()
    torch.set_num_threads(1)  # a forked process has no others
    with tempfile.TemporaryDirectory() as scratch:
        make_files(Path(scratch))
        wrong = run(Path(scratch), chosen.kills, chosen.pairs, chosen.seed)
    print(f"{chosen.kills} kills and {chosen.pairs} pairs, {len(wrong)} wrong (seed {chosen.seed})")
    sys.exit(bool(wrong))


def run(place: Path, kills: int, pairs: int, seed: int) -> list[str]:
    """So many kills over all commands in turn, and pairs over all combinations of modes; what was wrong."""
    rng, wrong = random.Random(seed), []
    known = {name: alone(name, place) for name in COMMANDS if kills or name == "quantize rtn"}
    for number in range(kills):
        name = list(COMMANDS)[number % len(COMMANDS)]
        expected, seconds = known[name]
        after = rng.random() * seconds
        problem = killed(name, place, after, expected)
        if problem:
            wrong.append(f"kill {number} [{name}] after {after:.3f} of {seconds:.3f} s: {problem}")
            print(wrong[-1], flush=True)
    both = list(combinations_with_replacement(MODES, 2))
    expected, seconds = known["quantize rtn"]
    for number in range(pairs):
        modes, delay = both[number % len(both)], rng.choice((0.0, rng.random() * seconds))
        problem = race("quantize rtn", rng.choice((modes, modes[::-1])), place, delay, expected)
        if problem:
            wrong.append(f"pair {number} {modes} {delay:.3f} s apart: {problem}")
            print(wrong[-1], flush=True)
    return wrong


if __name__ == "__main__":
    main()
