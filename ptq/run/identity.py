"""What makes two runs the same run: every field here must agree before one goes on with the other's finished blocks."""

from __future__ import annotations

from typing import Any

import torch

from calibration.model.contents import small_digest
from calibration.text.crops import TokenBatches
from calibration.versions import versions
from ptq.planning.job import Job


def run_identity(job: Job, tokens: TokenBatches | None, weights: str) -> dict[str, Any]:
    """The identity of a quantization run, as JSON. A field that differs is named by ``--resume`` when it refuses.

    Args:
        weights: digest of every byte of the source's tensors, see `check_weights`.
    """
    return {
        "weights": weights,
        "files": small_digest(job.folder),
        "versions": versions(),
        "recipe": job.plan.recipe.to_json(),
        "format": job.plan.format.name,
        "calibration": tokens.source if tokens else {},
        "forward": f"{job.dtype} on {job.device.type}, {job.batch_size} sequences at a time",
        "threads": torch.get_num_threads(),
        "unseen_experts": job.options.unseen_experts,
        "token_weights": job.options.token_weights,
        "evaluate": job.options.evaluate,
        "outside": {linear.name: str(linear.scheme) for linear in job.plan.layout.outside},
        "eval_windows": job.options.eval_windows,
    }
