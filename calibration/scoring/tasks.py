"""Zero-shot and few-shot tasks through EleutherAI's lm-evaluation-harness, in this process and on a model in memory.

Written against lm-eval 0.4.13. Scores depend on the harness version, the task versions and the seeds: all are kept.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from calibration.errors import PlanError, Problem, ToolkitError, nearest

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# The harness's own defaults, passed explicitly so that a change of them changes nothing here.
SEEDS = {"random_seed": 0, "numpy_random_seed": 1234, "torch_random_seed": 1234, "fewshot_random_seed": 1234}
# Means over items that are right or wrong, whose standard error follows from the mean.
PROPORTIONS = ("acc", "acc_norm", "acc_bytes", "exact_match")


@dataclass(frozen=True)
class TaskScore:
    """One metric of one task or group of tasks.

    Attributes:
        filter: how answers were read out of the output (``none`` for likelihood tasks).
        standard_error: sqrt(a (1 - a) / n) for proportions of a single task, else None.
        samples: items scored; None for a group. shots, version: as the harness reports them.
    """

    task: str
    metric: str
    filter: str
    value: float
    standard_error: float | None
    samples: int | None
    shots: int | None
    version: str


@dataclass(frozen=True)
class TaskRun:
    """All scores of one call and what they depend on."""

    scores: tuple[TaskScore, ...]
    harness: str
    seeds: dict[str, int]
    limit: int | None


def lm_eval_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    batch_size: int = 8,
    max_length: int = 2048,
    num_fewshot: int | None = None,
    limit: int | None = None,
) -> TaskRun:
    """Scores of a model in memory on named tasks, groups or tags of the harness.

    The harness seeds Python's, numpy's and torch's generators, and gives the tokenizer a padding token where it has
    none.

    Args:
        model: a transformers model, with its linears replaced or not.
        max_length: tokens; longer contexts are cut on the left.
        num_fewshot: examples in the prompt; None: the task's own number.
        limit: only that many items per task, for trying things out.

    Raises:
        ToolkitError: lm-eval is missing, or a task's data cannot be loaded.
        PlanError: task names the harness does not know, each with the nearest name.
    """
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ToolkitError(f"tasks need lm-evaluation-harness ({error})", 'pip install "ptq[eval]"') from None

    manager = TaskManager()
    names = list(dict.fromkeys(tasks))
    check_task_names(names, manager.all_tasks)
    try:
        results = lm_eval.simple_evaluate(
            model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, max_length=max_length),
            tasks=names,
            num_fewshot=num_fewshot,
            limit=limit,
            bootstrap_iters=0,
            log_samples=False,
            task_manager=manager,
            **SEEDS,
        )
    except OSError as error:  # what `datasets` raises when it finds neither the hub nor its cache
        raise ToolkitError(
            f"tasks {', '.join(names)}: data not available ({error})", "connect once so that the data sets are cached"
        ) from None
    return TaskRun(read_scores(results), harness=f"lm-eval {lm_eval.__version__}", seeds=dict(SEEDS), limit=limit)


def check_task_names(names: Sequence[str], known: Sequence[str]) -> None:
    """Refuse names the harness does not know, all at once.

    Raises:
        ToolkitError: no names. PlanError: unknown ones.
    """
    if not names:
        raise ToolkitError("--tasks: no task named", "name one or more, e.g. piqa,arc_easy")
    unknown = [name for name in names if name not in known]
    if unknown:
        raise PlanError(
            Problem(f"--tasks {name}", "unknown task", f"{nearest(name, known)}list them with `lm_eval ls tasks`")
            for name in unknown
        )


def read_scores(results: Mapping[str, Any]) -> tuple[TaskScore, ...]:
    """The numbers in what `lm_eval.simple_evaluate` returns; keys there are ``metric,filter``."""
    scores: list[TaskScore] = []
    for task, metrics in sorted(results["results"].items()):
        counts = results["n-samples"].get(task)
        samples = None if counts is None else int(counts["effective"])
        for key, value in sorted(metrics.items()):
            metric, comma, how = key.partition(",")
            if not comma or metric.endswith("_stderr") or isinstance(value, str):
                continue
            proportion = samples is not None and metric in PROPORTIONS
            scores.append(
                TaskScore(
                    task=task,
                    metric=metric,
                    filter=how,
                    value=float(value),
                    standard_error=math.sqrt(value * (1 - value) / samples) if proportion and samples else None,
                    samples=samples,
                    shots=results["n-shot"].get(task),
                    version=str(results["versions"].get(task)),
                )
            )
    return tuple(scores)
