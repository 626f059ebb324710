"""One block of a run for real, to say how long all of them take."""

from __future__ import annotations

import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

from calibration.distributed import Processes
from calibration.model.skeleton import Skeleton
from calibration.progress import Part, Progress
from ptq.planning.duration import Duration, block_seconds, expected
from ptq.planning.job import Job
from ptq.run.sharing import walk_of


class _Clock(Part):
    """Notes when stages begin, and hands them on."""

    def __init__(self, progress: Progress) -> None:
        super().__init__(progress, "one block")
        self._begun: dict[str, tuple[float, float]] = {}

    def stage(self, name: str, total: int, done: int = 0) -> None:
        super().stage(name, total, done)
        self._begun[name] = time.perf_counter(), time.process_time()

    def since(self, name: str, one_thread: bool) -> float:
        """Seconds since a stage began; of one thread those of the processor, as rates are measured."""
        wall, processor = self._begun[name]
        return time.process_time() - processor if one_thread else time.perf_counter() - wall


def measured_duration(job: Job, progress: Progress) -> Duration:
    """Run the first block with the whole calibration set, in a temporary folder that goes again, and scale what all
    blocks are expected to take by what this one took over what it was expected to. One process runs it, also where
    several will share the work.

    Raises:
        ToolkitError: as the run would.
    """
    guess = expected(job)
    job.tell(progress)
    tokens = job.windows(progress) if job.plan.needs_data else None
    skeleton = Skeleton(job.plan.model_config(job.config), job.spec, job.dtype, job.device)
    skeleton.check_complete(job.reader.infos, job.plan.new_biases)
    clock = _Clock(progress)
    with tempfile.TemporaryDirectory(prefix="ptq-") as folder:
        walk_of(job, skeleton, Path(folder), Processes()).run(tokens, clock, stop=1)
        took = clock.since("blocks", one_thread=torch.get_num_threads() == 1 and job.device.type == "cpu")
    job.reader.close()
    foreseen = block_seconds(job, processes=1)[0]
    seconds = {**guess.seconds, "blocks": guess.seconds["blocks"] * took / foreseen}
    return replace(guess, seconds=seconds, measured=(took, foreseen))
