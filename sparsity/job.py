"""From a checkpoint and a method to sites: plan, walk, and the files beside the weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from calibration.architectures import ArchitectureSpec
from calibration.bounds import setting_problems
from calibration.distributed import Processes
from calibration.errors import PlanError
from calibration.model.checkpoint import CheckpointReader, TensorSource
from calibration.model.opening import weights_fingerprint
from calibration.model.skeleton import Skeleton
from calibration.progress import Progress
from calibration.text.crops import TokenBatches
from calibration.walk.float_blocks import FloatBlocks
from calibration.walk.passes import Pass, PlanView
from calibration.walk.walk import Walk
from sparsity.budget import Choice
from sparsity.files import REACHED, SHARED, Sparsity, save_sparsity, sites_from
from sparsity.rules import settings_of


@dataclass(frozen=True)
class Base:
    """The model that is made sparse.

    Attributes:
        source: its tensors as float weights, whatever the checkpoint stores.
        config: of transformers.
    """

    source: TensorSource
    config: Any
    spec: ArchitectureSpec


def check_plan(step: Pass, spec: ArchitectureSpec, config: Any, tokens: int) -> None:
    """Refuse what settings, family and the number of calibration tokens rule out, where weights stay as they are.

    Raises:
        PlanError: every problem at once.
    """
    problems = list(setting_problems((step,))) or list(step.check(PlanView(None, spec, config, (step,), tokens)))
    if problems:
        raise PlanError(dict.fromkeys(problems))


def calibrate(
    base: Base,
    step: Pass,
    tokens: TokenBatches,
    folder: Path,
    *,
    dtype: torch.dtype,
    device: torch.device,
    batch_size: int,
    progress: Progress,
    processes: Processes | None = None,
) -> dict[str, torch.Tensor]:
    """Walk through the blocks with one pass, and return its thresholds by their names in the file, in the first of the
    processes; in the others nothing.

    Args:
        folder: where the walk may keep finished blocks.
        dtype, device: of forward passes.
        processes: that share the batches; the folder is there.
    """
    processes = processes or Processes()
    skeleton = Skeleton(base.config, base.spec, dtype, device)
    skeleton.check_complete(base.source.infos)
    walk = Walk(
        FloatBlocks(base.source, skeleton, (step,), batch_size=batch_size),
        encode=lambda segment: {},
        restore=lambda tensors, schemes, dtype: {},
        folder=folder,
        processes=processes,
    )
    walk.run(tokens, progress)
    return walk.finished.all_gates() if processes.first else {}


def write(
    folder: Path,
    steps: Sequence[Pass],
    gates: Mapping[str, torch.Tensor],
    calibration: Mapping[str, Any],
    model: Mapping[str, str],
    choice: Choice | None = None,
) -> Sparsity:
    """Put thresholds beside the weights in ``folder``, which become their base.

    Args:
        steps: the passes that made them.
        calibration: of the text, as in a run record.
        model: ``name`` and ``source`` of what is made sparse.
        choice: where a search chose the targets of one step.
    """
    with CheckpointReader(folder) as reader:
        base = weights_fingerprint(reader)
    settings: dict[str, Any] = {step.name: settings_of(step) for step in steps}
    target = max(s["target"] for s in settings.values())
    method = "+".join(settings)
    if choice is not None:
        target = sum(choice.targets) / len(choice.targets)
        found = {"budget": choice.budget, "targets": list(choice.targets), "perplexity_increase": choice.increase}
        settings["search"] = found
    sparsity = Sparsity(
        method=method,
        target=target,
        base=base,
        sites=sites_from(gates),
        settings=settings,
        calibration=dict(calibration),
        reached={n.removesuffix(REACHED): float(t) for n, t in gates.items() if n.endswith(REACHED)},
        shared=tuple(n.removesuffix(SHARED) for n in gates if n.endswith(SHARED)),
        model=dict(model),
    )
    save_sparsity(sparsity, folder)
    return sparsity
