"""What AdaDim, the FP4 search and the sensitivity sweep of ``ptq fit`` cost, against one pass of GPTQ.

    python benchmarks/search_speed.py demo
    python benchmarks/search_speed.py MODEL --dataset train.txt --seq-len 512 --repeats 3

Processor seconds of this process (waiting for others does not count), the least of several repeats. A search counts
without the forward pass that gathers its statistics, which it shares with whatever follows; the sweep counts whole,
with the forward passes of its probes.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import ClassVar
from unittest import mock

import torch

from calibration.progress import Silent
from calibration.walk.context import Context
from calibration.walk.passes import Pass, Phase, Stream
from calibration.walk.segment import Segment
from calibration.walk.statistics import Gram, Statistic
from ptq.fitting.job import prepare_fit
from ptq.planning.job import Options, prepare
from ptq.run.pipeline import run
from ptq.sparse.methods import METHODS


@dataclass(frozen=True)
class Gather(Pass):
    """Statistics and nothing else."""

    name: ClassVar[str] = "gather"
    summary: ClassVar[str] = "gathers statistics"
    phases: ClassVar[tuple[Phase, ...]] = (Phase.CHOOSE,)
    stream: ClassVar[Stream] = "either"
    statistics: ClassVar[tuple[type[Statistic], ...]] = (Gram,)

    def apply(self, segment: Segment, context: Context) -> None:
        for linear in segment.schemes:
            context.statistic(linear, Gram)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--dataset")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--scheme", default="w3a16-g128")
    parser.add_argument("--repeats", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(1)
    options = Options(dataset=args.dataset, samples=args.samples, seq_len=args.seq_len)

    def seconds(work: Callable[[], object]) -> float:
        best = float("inf")
        for _ in range(args.repeats):
            begin = time.process_time()
            work()
            best = min(best, time.process_time() - begin)
        return best

    def quantized(method: str, scheme: str) -> float:
        def work() -> None:
            with mock.patch.dict(METHODS, {"gather": Gather}):
                job = prepare(args.model, method=method, scheme=scheme, format="native", options=options)
            with TemporaryDirectory() as folder:
                run(job, Path(folder) / "out")

        return seconds(work)

    quantized("gather+rtn", args.scheme)  # imports and first calls
    rtn, gather = quantized("rtn", args.scheme), quantized("gather+rtn", args.scheme)
    floats = "fp4-e2m1-g128"
    costs = {
        "AdaDim": quantized("adadim+rtn", args.scheme) - gather,
        "FP4 search (three formats)": quantized("fp4+rtn", floats) - quantized("gather+rtn", floats),
        "sensitivity sweep (18 integer schemes, MXFP4, NVFP4)": seconds(
            lambda: prepare_fit(args.model, options=options).measure(Silent())
        ),
    }
    gptq = quantized("gptq", args.scheme) - rtn
    print(f"GPTQ pass, {args.scheme}: {gptq:.2f} s (its own forward passes counted; reading and writing not)\n")
    print("| search | seconds | share of the GPTQ pass |\n| --- | ---: | ---: |")
    for name, cost in {**costs, "together": sum(costs.values())}.items():
        print(f"| {name} | {cost:.2f} | {cost / gptq:.2f} |")


if __name__ == "__main__":
    main()
