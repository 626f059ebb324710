"""Public functions that say beforehand what a command would take: `plan_time`, `plan_fit`, `plan_sparsify`,
`plan_analyze`. Nothing is written."""

from __future__ import annotations

from ptq.api.inputs import Display, display
from ptq.planning.duration import Duration, expected
from ptq.planning.job import Job
from ptq.run.one_block import measured_duration


def plan_time(job: Job, *, measure: bool = False, progress: Display | None = None) -> Duration:
    """How long `quantize` would take, in seconds by phase.

    Rates of this machine (matrix products in the dtype of the run, memory, disk) are measured once, in about a second;
    with processes that ``torchrun`` has started their number counts.

    Args:
        job: what `plan` returned.
        measure: run the first block for real, in a temporary folder, and scale from it.

    Raises:
        ToolkitError: as the run would, where a block is run.
    """
    return measured_duration(job, display(progress)) if measure else expected(job)
