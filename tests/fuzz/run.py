"""Run seeded cases of damaged input, a forked process each: ``python -m fuzz.run --cases 10000 --seed 0`` (from
``tests/``). Every case must end with exit code 0 or 2 within ten seconds of processor time, without a traceback, with
nothing under the final name unless it succeeded, and as is known where it is known. Failures are printed with the seed
that repeats them (``--cases 1 --seed THAT``)."""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import gc
import os
import resource
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from unittest import mock

import torch
from command import products, run_ptq
from forked import kill, start, wait

from fuzz.cases import GPTQ, KINDS, Words, copy_bases, make_bases
from fuzz.mutations import DONE, REFUSED, Damage

SECONDS = 10  # of processor time
BLOCKED = 60.0  # seconds on the clock, for what waits and computes nothing
ROUNDS = 5  # times BLOCKED, for what computes on a machine that has other work
ROOM = 8 << 30  # bytes of addresses: more than any case needs
MEMORY = Path("/dev/shm")  # files of cases, where the system has it


@dataclass(frozen=True)
class Ended:
    """How a case ended; ``wrong`` says what must not have happened, or is empty."""

    kind: str
    seed: int
    what: str
    code: int
    wrong: str


Left = dict[str, bytes]


def limits() -> None:
    faulthandler.dump_traceback_later(BLOCKED - 5, repeat=True, file=2)  # where it waits
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 1))
    resource.setrlimit(resource.RLIMIT_AS, (ROOM, ROOM))


def run_forked(words: Words, place: Path) -> tuple[int, str]:
    """Exit code (negative: killed, for its processor time or because it waited) and everything printed, of
    ``ptq WORDS...`` in a forked process."""
    log = place / "log"
    child = start(list(words), place, log, before=limits)
    code, rounds, spent = None, 0, -1
    while code is None and rounds < ROUNDS and spent < (now := processor_time(child)):
        spent, rounds = now, rounds + 1
        code = wait(child, BLOCKED)
    if code is None:
        kill(child)
        code = -1
    return code, log.read_text(errors="replace") if log.exists() else ""


def processor_time(child: int) -> int:
    """Of a process, in ticks; 0 where the system does not say."""
    try:
        fields = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return int(fields[11]) + int(fields[12])


def left(place: Path, printed: str) -> Left:
    """What a case is compared by: the tensors under the final name, or the perplexity."""
    out = place / "out"
    if out.is_dir():
        return {name: data for name, data in products(out).items() if name.endswith(".safetensors")}
    return {"": next((line for line in printed.splitlines() if line.startswith("perplexity ")), "").encode()}


def judge(damage: Damage, code: int, printed: str, place: Path, expected: Left) -> str:
    """What is wrong with an ending, or an empty string."""
    if code < 0:
        return f"hang (signal {-code}): {printed[-2500:]}"
    if code not in (DONE, REFUSED):
        return f"exit code {code}: {printed[-1500:]}"
    if "Traceback" in printed:
        return f"traceback: {printed[-1500:]}"
    if code == REFUSED and "fix:" not in printed and "Usage:" not in printed:
        return f"refused without a way out: {printed[-500:]}"
    if code == REFUSED and (place / "out").exists():
        return "refused, with something under the final name"
    stray = [p.name for p in place.iterdir() if p.name.endswith((".tmp", ".ptq-lock", ".ptq-replaced"))]
    if stray:
        return f"left behind: {', '.join(stray)}"
    if damage.known is not None and code != damage.known:
        return f"exit code {code}, must be {damage.known}: {printed[-600:]}"
    if code == DONE and damage.same and left(place, printed) != expected:
        return f"exit code 0 with another result than undamaged files give: {printed[-300:]}"
    return ""


@contextlib.contextmanager
def in_folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None) as scratch:
        yield Path(scratch) / "place"


def undamaged(bases: Path) -> dict[Words, Left]:
    """Run the commands of all kinds on good files, here and not in a fork: all must succeed (else nothing would be
    shown by what they refuse), and what they import is there for all forks."""
    found: dict[Words, Left] = {}
    for kind, words in {(name == "committed", words): None for name, k in KINDS.items() for words in k.commands}:
        with in_folder() as place:
            copy_bases(bases, place, words, kind)
            with contextlib.chdir(place):
                result = run_ptq(*words)
            assert result.code == 0, (words, result.err)
            found[words] = left(place, result.out)
    gc.collect()
    gc.freeze()
    return found


def fuzz(bases: Path, cases: int, seed: int, report: Callable[[Ended], None]) -> list[Ended]:
    """Run so many cases over copies of ``bases`` and hand each one's ending to ``report``."""
    with mock.patch.dict(os.environ, {"XDG_CACHE_HOME": str(bases.parent / "cache")}):  # folders for GGUF files
        return _run(bases, cases, seed, report)


def _run(bases: Path, cases: int, seed: int, report: Callable[[Ended], None]) -> list[Ended]:
    interrupted(bases)
    expected = undamaged(bases)
    ended = []
    for number in range(seed, seed + cases):
        kind = list(KINDS)[number % len(KINDS)]
        with in_folder() as place:
            chosen = Random(number).choice(KINDS[kind].commands)  # as the case will choose: its files are copied
            copy_bases(bases, place, chosen, with_interrupted=kind == "committed")
            damage, words, _ = KINDS[kind].case(place, Random(number))
            code, printed = run_forked(words, place)
            wrong = judge(damage, code, printed, place, expected[chosen])
        ended.append(Ended(kind, number, f"{damage.what} ({' '.join(words)})", code, wrong))
        report(ended[-1])
    return ended


def interrupted(bases: Path) -> None:
    """Leave an interrupted run in ``bases``: one of its two blocks is committed."""
    import calibration.walk.finished

    shutil.rmtree(bases / "out.partial", ignore_errors=True)  # of an earlier round on the same files
    original, remaining = calibration.walk.finished.save_tensors, [1]

    def once(*args: object, **named: object) -> None:
        if not remaining[0]:
            raise SystemExit(3)
        remaining[0] -= 1
        original(*args, **named)  # type: ignore[arg-type]

    calibration.walk.finished.save_tensors = once  # type: ignore[assignment]
    try:
        with contextlib.chdir(bases):
            assert run_ptq(*GPTQ).code == 3
    finally:
        calibration.walk.finished.save_tensors = original


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--cases", type=int, default=1000)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--every", action="store_true", help="print how every case ended")
    chosen = options.parse_args()
    torch.set_num_threads(1)  # a forked process has no others
    with tempfile.TemporaryDirectory() as scratch:
        bases = Path(scratch) / "bases"
        bases.mkdir()
        make_bases(bases)

        def report(end: Ended) -> None:
            if end.wrong or chosen.every:
                print(f"seed {end.seed} [{end.kind}] {end.code} {end.what}: {end.wrong}", flush=True)

        ended = fuzz(bases, chosen.cases, chosen.seed, report)
    counts = Counter((e.kind, "wrong" if e.wrong else "ok" if e.code == 0 else "refused") for e in ended)
    for (kind, how), count in sorted(counts.items()):
        print(f"{kind:16} {how:8} {count}")
    spent = os.times()
    print(f"{len(ended)} cases from seed {chosen.seed}, {sum(bool(e.wrong) for e in ended)} wrong, "
          f"{spent.children_user + spent.children_system:.0f} s of processor time")  # fmt: skip
    sys.exit(any(e.wrong for e in ended))


if __name__ == "__main__":
    main()
