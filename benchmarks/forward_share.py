"""How much of a run's processor time is forward passes with their Gram matrices, and how much is everything else.

    python benchmarks/forward_share.py MODEL --samples 128 --seq-len 2048 --blocks 2

The first blocks only: all cost the same. Forward passes count with everything that is gathered while they run, which
no method that calibrates can do without. The text is random tokens, or ``--dataset``.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

from calibration.distributed import Processes
from calibration.model.skeleton import Skeleton
from calibration.progress import Silent
from calibration.walk.states import HiddenStates
from ptq.planning.job import Options, prepare
from ptq.run.sharing import walk_of


class Clock:
    """Processor seconds inside a function."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def around(self, work: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            before = time.process_time()
            try:
                return work(*args, **kwargs)
            finally:
                self.seconds += time.process_time() - before

        return timed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--method", default="awq+gptq")
    parser.add_argument("--scheme", default="w4a16-g64-sym")
    parser.add_argument("--dataset", default="random")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--blocks", type=int, default=2)
    args = parser.parse_args()
    options = Options(dataset=args.dataset, samples=args.samples, seq_len=args.seq_len, dtype=args.dtype)
    job = prepare(args.model, method=args.method, scheme=args.scheme, options=options)
    tokens = job.windows(Silent())
    skeleton = Skeleton(job.plan.model_config(job.config), job.spec, job.dtype, job.device)
    clock, whole = Clock(), Clock()
    with TemporaryDirectory() as folder:
        walk = walk_of(job, skeleton, Path(folder), Processes())
        with mock.patch.object(HiddenStates, "run", clock.around(HiddenStates.run)):
            whole.around(walk.run)(tokens, Silent(), args.blocks)
    print("| text | blocks | forward passes with statistics | all | ratio |\n| --- | ---: | ---: | ---: | ---: |")
    row = (f"{args.samples} x {args.seq_len}", args.blocks, f"{clock.seconds:.1f}", f"{whole.seconds:.1f}")
    print("|", " | ".join(map(str, row)), f"| {whole.seconds / clock.seconds:.2f} |")


if __name__ == "__main__":
    main()
