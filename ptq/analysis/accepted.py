"""Whether a recipe passes the plan of a model, from headers alone."""

from __future__ import annotations

import functools
from pathlib import Path

from calibration.errors import PlanError, ToolkitError
from ptq.analysis.advice import Refusal
from ptq.planning.job import Options, prepare


def refusal_of(folder: Path, options: Options) -> Refusal:
    """(method, scheme) -> why the plan of the model in ``folder`` refuses it, None where it accepts. Every recipe is
    planned once."""

    @functools.cache
    def refusal(method: str, scheme: str) -> str | None:
        try:
            prepare(folder, method=method, scheme=scheme, format="native", options=options).reader.close()
        except PlanError as error:
            return "; ".join(dict.fromkeys(problem.reason for problem in error.problems))
        except ToolkitError as error:
            return error.message
        return None

    return refusal
