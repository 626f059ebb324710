"""How large and how fine a number may be that a user sets. The passes check what a setting means; here is only what no
run would ever end with, and what is no number at all."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence

from calibration.errors import Problem, ToolkitError
from calibration.walk.passes import Pass

MOST = 1_000_000  # samples, tokens, steps, epochs, points of a grid
LARGEST_SEED = 2**63 - 1  # of torch's generators
FINEST, COARSEST = 1e-12, 1e6  # of float settings other than 0
FINEST_STEP = 1e-4  # of a search: more than 10 000 of them


def setting_problems(passes: Sequence[Pass]) -> Iterable[Problem]:
    """Settings of passes that are not finite, or out of all proportion."""
    for step in passes:
        for field in dataclasses.fields(step):  # type: ignore[arg-type]
            value = getattr(step, field.name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                continue
            where, fix = f"{step.name}.{field.name}", f"use {field.default}"
            if isinstance(value, int):
                largest = LARGEST_SEED if field.name == "seed" else MOST
                if not -largest <= value <= largest:
                    yield Problem(where, f"{value:.3g} is not within {-largest}..{largest}", fix)
            elif not math.isfinite(value):
                yield Problem(where, f"{value} is not a finite number", fix)
            elif (
                value != 0 and not (finest := FINEST_STEP if field.name == "step" else FINEST) <= abs(value) <= COARSEST
            ):
                yield Problem(where, f"{value} is not within {finest:g}..{COARSEST:g}", fix)


def check_counts(**options: int | None) -> None:
    """Options of the command line by their names, ``seed`` among them.

    Raises:
        ToolkitError: one is out of all proportion.
    """
    for name, value in options.items():
        largest = LARGEST_SEED if name == "seed" else MOST
        if value is not None and not -largest <= value <= largest:
            raise ToolkitError(
                f"--{name.replace('_', '-')} {value}: not within {-largest}..{largest}", "use a smaller number"
            )
