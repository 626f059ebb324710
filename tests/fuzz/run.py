"""Run seeded cases of damaged input, a forked process each: ``python -m fuzz.run --cases 10000 --seed 0`` (from
``tests/``). Every case must end with exit code 0 or 2 within the time limit, without a traceback, and with nothing
under the final name unless it succeeded. Failures are printed with the seed that repeats them."""

from __future__ import annotations

import argparse
import os
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from command import done, products
from forked import kill, start, wait

from fuzz.cases import KINDS, Case, copy_bases, make_bases

SECONDS = 10.0


@dataclass(frozen=True)
class Ended:
    """How a case ended; ``wrong`` says what must not have happened, or is empty."""

    kind: str
    seed: int
    what: str
    code: int
    wrong: str


def run_forked(words: list[str], place: Path, seconds: float = SECONDS) -> tuple[int, str]:
    """Exit code (-1: killed after ``seconds``) and everything printed, of ``ptq WORDS...`` in a forked process."""
    log = place / "log"
    child = start(words, place, log)
    code = wait(child, seconds)
    if code is None:
        kill(child)
        code = -1
    return code, log.read_text(errors="replace") if log.exists() else ""


def judge(case: Case, code: int, printed: str, place: Path, expected: dict[str, bytes] | None) -> str:
    """What is wrong with an ending, or an empty string."""
    if code == -1:
        return "hang"
    if code not in (0, 2):
        return f"exit code {code}: {printed[-1500:]}"
    if "Traceback" in printed:
        return f"traceback: {printed[-1500:]}"
    if code == 2 and "fix:" not in printed and "Usage:" not in printed:
        return f"refused without a way out: {printed[-500:]}"
    if code == 2 and (place / "out").exists():
        return "refused, with something under the final name"
    if case.known is not None and code != case.known:
        return f"exit code {code}, must be {case.known}"
    if code == 0 and expected is not None and products(place / "out") != expected:
        return "exit code 0 with other bytes than an undisturbed run"
    return ""


def fuzz(bases: Path, cases: int, seed: int, report: Callable[[Ended], None]) -> list[Ended]:
    """Run so many cases over copies of ``bases`` and hand each one's ending to ``report``."""
    expected = interrupted(bases)
    ended = []
    for number in range(seed, seed + cases):
        rng = random.Random(number)
        kind = list(KINDS)[number % len(KINDS)]
        with tempfile.TemporaryDirectory() as scratch:
            place = Path(scratch) / "place"
            copy_bases(bases, place, with_interrupted=kind == "committed")
            case = KINDS[kind](place, rng)
            code, printed = run_forked(case.words, place)
            wrong = judge(case, code, printed, place, expected if kind == "committed" else None)
        ended.append(Ended(kind, number, case.what, code, wrong))
        report(ended[-1])
    return ended


def interrupted(bases: Path) -> dict[str, bytes]:
    """Leave an interrupted run in ``bases``; the files that it would have written."""
    import calibration.walk.finished

    place = str(bases)
    before = os.getcwd()
    os.chdir(place)
    shutil.rmtree("out.partial", ignore_errors=True)  # of an earlier round on the same files
    try:
        words = ["quantize", "model", "--method", "gptq", "--scheme", "w4a16-g32", "--samples", "2", "--seq-len", "16"]
        words += ["--dataset", "text.txt", "--out", "out"]
        done(*words)
        expected = products(bases / "out")
        shutil.rmtree(bases / "out")
        original, left = calibration.walk.finished.save_tensors, [1]

        def once(*args: object, **named: object) -> None:
            if not left[0]:
                raise SystemExit(3)
            left[0] -= 1
            original(*args, **named)  # type: ignore[arg-type]

        calibration.walk.finished.save_tensors = once  # type: ignore[assignment]
        from command import run_ptq

        run_ptq(*words)
        calibration.walk.finished.save_tensors = original
    finally:
        os.chdir(before)
    return expected


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--cases", type=int, default=1000)
    options.add_argument("--seed", type=int, default=0)
    chosen = options.parse_args()
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        bases = Path(scratch) / "bases"
        bases.mkdir()
        make_bases(bases)

        def report(end: Ended) -> None:
            if end.wrong:
                print(f"seed {end.seed} [{end.kind}] {end.what}: {end.wrong}\n", flush=True)

        ended = fuzz(bases, chosen.cases, chosen.seed, report)
    counts = Counter((e.kind, "wrong" if e.wrong else "ok" if e.code == 0 else "refused") for e in ended)
    for (kind, how), count in sorted(counts.items()):
        print(f"{kind:12} {how:8} {count}")
    sys.exit(any(e.wrong for e in ended))


if __name__ == "__main__":
    main()
