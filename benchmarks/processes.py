"""Wall time of one command by 1 process of 1 thread, 1 process of N threads and N processes of 1 thread each.

    python benchmarks/processes.py MODEL --dataset TEXT [--processes 2] [--method awq+gptq] [--repeats 2]
    python benchmarks/processes.py MODEL --dataset TEXT --command fit --bpw 3.25
    python benchmarks/processes.py MODEL --dataset TEXT --command "study sensitivity" --schemes w3a16

The three take turns, so that what else the machine does meets all of them; the fastest of each counts. Files of one
thread must be the same byte for byte, whatever the number of processes: ends with code 1 where they are not. Run it
where nobody else uses the machine. What else is on the command line goes to the command.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def run(words: list[str], processes: int, threads: int, out: Path) -> tuple[float, dict[str, object]]:
    """Seconds of a whole run and its ``timings.json``, if it has one; its files are in the folder ``out``."""
    shutil.rmtree(out, ignore_errors=True)
    target = out
    if words[0] == "fit":
        out.mkdir()
        target = out / "fit.toml"
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *(launcher if processes > 1 else ()), "-m", "cli.main", *words, "--out", str(target)]
    begun = time.monotonic()
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": str(threads)}, stdout=subprocess.DEVNULL)
    timings = out / "timings.json"
    return time.monotonic() - begun, json.loads(timings.read_text()) if timings.exists() else {}


def digest(folder: Path) -> str:
    """sha256 (first 16 hex digits) over the weights; over all files where there are none."""
    found = hashlib.sha256()
    for path in sorted(folder.rglob("*.safetensors")) or sorted(path for path in folder.rglob("*") if path.is_file()):
        found.update(path.read_bytes())
    return found.hexdigest()[:16]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--command", default="quantize", help="quantize, fit or study sensitivity")
    parser.add_argument("--method", default="awq+gptq", help="of quantize")
    parser.add_argument("--samples", default="16")
    parser.add_argument("--seq-len", default="512")
    parser.add_argument("--repeats", type=int, default=2)
    o, rest = parser.parse_known_args()
    words = [*o.command.split(), o.model, "--dataset", o.dataset, "--samples", o.samples, "--seq-len", o.seq_len]
    words += ["--method", o.method, *rest] if o.command == "quantize" else rest
    kinds = [(1, 1), (1, o.processes), (o.processes, 1)]
    best: dict[tuple[int, int], tuple[float, dict[str, object], str]] = {}
    with tempfile.TemporaryDirectory() as place:
        for _ in range(o.repeats):
            for kind in kinds:
                seconds, timings = run(words, *kind, Path(place) / "out")
                if kind not in best or seconds < best[kind][0]:
                    best[kind] = seconds, timings, digest(Path(place) / "out")
    print("| processes x threads | s | quantize, s | MB sent and received by the first | sha256 |")
    print("| --- | ---: | ---: | ---: | --- |")
    for (processes, threads), (seconds, timings, found) in best.items():
        more = ["", ""]
        if timings:
            stages, wire = timings["stages"], timings["wire_bytes"]
            assert isinstance(stages, dict) and isinstance(wire, int)
            more = [f"{stages['quantize']:.1f}", f"{wire / 1e6:.1f}"]
        print(f"| {processes} x {threads} | {seconds:.1f} | {more[0]} | {more[1]} | {found} |")
    sys.exit(0 if best[1, 1][2] == best[o.processes, 1][2] else 1)


if __name__ == "__main__":
    main()
