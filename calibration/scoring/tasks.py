"""Zero-shot and few-shot tasks through EleutherAI's lm-evaluation-harness, in this process and on a model in memory.

Written against lm-eval 0.4.13. Scores depend on the harness version, the task versions and the seeds: all are kept.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calibration.errors import PlanError, Problem, ToolkitError, foreign, nearest

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


@dataclass(frozen=True)
class TaskOptions:
    """How tasks are asked.

    Attributes:
        num_fewshot: examples in the prompt; None: the task's own number.
        limit: only that many items per task, for trying things out.
        batch_size: sequences per forward pass.
        include_path: a folder with task files of one's own (the harness's YAML), beside those that it has.
        show_log: let through what the harness writes to stderr: bars, git's complaints, advice.

    Raises:
        ToolkitError: a number that makes no sense, no such folder.
    """

    num_fewshot: int | None = None
    limit: int | None = None
    batch_size: int = 8
    include_path: Path | None = None
    show_log: bool = False

    def __post_init__(self) -> None:
        least = {
            "--limit": (self.limit, 1),
            "--num-fewshot": (self.num_fewshot, 0),
            "--batch-size": (self.batch_size, 1),
        }
        for option, (value, smallest) in least.items():
            if value is not None and value < smallest:
                raise ToolkitError(f"{option} {value}: less than {smallest}", "give a larger number, or leave it out")
        if self.include_path is not None and not self.include_path.is_dir():
            raise ToolkitError(f"--include-path {self.include_path}: no such folder", "name a folder with task files")


def check_tasks(tasks: Sequence[str], options: TaskOptions) -> Any:
    """The harness's task manager, if it knows all of these names; no model is needed.

    Raises:
        ToolkitError: lm-eval is missing, or cannot read ``include_path``.
        PlanError: task names that it does not know, each with the nearest name.
    """
    with _stderr_away(not options.show_log):
        try:
            from lm_eval.tasks import TaskManager
        except ImportError as error:
            raise ToolkitError(f"tasks need lm-evaluation-harness ({error})", 'pip install "ptq[eval]"') from None
        path = None if options.include_path is None else str(options.include_path)
        with foreign(f"--include-path {path}", "name a folder with task files of lm-eval"):
            manager = TaskManager(include_path=path)
    check_task_names(tasks, manager.all_tasks)
    return manager


def lm_eval_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    max_length: int = 2048,
    options: TaskOptions | None = None,
) -> TaskRun:
    """Scores of a model in memory on named tasks, groups or tags of the harness.

    The harness seeds Python's, numpy's and torch's generators, and gives the tokenizer a padding token where it has
    none.

    Args:
        model: a transformers model, with its linears replaced or not.
        max_length: tokens; longer contexts are cut on the left.

    Raises:
        ToolkitError, PlanError: see `check_tasks`; or a task's data cannot be loaded.
    """
    options = options or TaskOptions()
    manager, names = check_tasks(tasks, options), list(dict.fromkeys(tasks))
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    try:
        with _stderr_away(not options.show_log):
            results = lm_eval.simple_evaluate(
                model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=options.batch_size, max_length=max_length),
                tasks=names,
                num_fewshot=options.num_fewshot,
                limit=options.limit,
                bootstrap_iters=0,
                log_samples=False,
                task_manager=manager,
                **SEEDS,
            )
    except OSError as error:  # what `datasets` raises when it finds neither the hub nor its cache
        raise ToolkitError(
            f"tasks {', '.join(names)}: data not available ({error})", "connect once so that the data sets are cached"
        ) from None
    return TaskRun(
        read_scores(results), harness=f"lm-eval {lm_eval.__version__}", seeds=dict(SEEDS), limit=options.limit
    )


@contextmanager
def _stderr_away(wanted: bool) -> Iterator[None]:
    """Nothing on file descriptor 2 meanwhile: the harness draws bars, and starts git, which complains there."""
    if not wanted:
        yield
        return
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        sys.stderr.flush()
        os.dup2(kept, 2)
        os.close(kept)


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
