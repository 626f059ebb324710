"""How large and how fine a number may be that a user sets. The passes check what a setting means; here is only what no
run would ever end with, and what is no number at all."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

from calibration.errors import Problem, ToolkitError
from calibration.walk.passes import Pass

MOST = 1_000_000  # samples, tokens, steps, epochs, points of a grid
LARGEST_SEED = 2**63 - 1  # of torch's generators
FINEST, COARSEST = 1e-12, 1e6  # of float settings other than 0
FINEST_STEP = 1e-4  # of a search: 10 000 of them are enough


def setting_problems(passes: Sequence[Pass]) -> Iterable[Problem]:
    """Settings of passes that are not finite, or out of all proportion."""
    for step in passes:
        for field in dataclasses.fields(step):  # type: ignore[arg-type]
            value = getattr(step, field.name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                continue
            low, high = _range(field.name, isinstance(value, int))
            if value != 0 and not low <= abs(value) <= high:  # nor is NaN or infinity
                said = f"{str(value)[:40]} is not within {low:g}..{high:g}"
                yield Problem(f"{step.name}.{field.name}", said, f"use {field.default}")


def _range(name: str, integer: bool) -> tuple[float, float]:
    """The least (but for 0) and the most that the absolute value of a setting may be."""
    if integer:
        return 1, LARGEST_SEED if name == "seed" else MOST
    return FINEST_STEP if name == "step" else FINEST, COARSEST


def check_counts(**options: int | None) -> None:
    """Options of the command line by their names, ``seed`` among them.

    Raises:
        ToolkitError: one is out of all proportion.
    """
    for name, value in options.items():
        largest = LARGEST_SEED if name == "seed" else MOST
        if value is not None and not -largest <= value <= largest:
            raise ToolkitError(
                f"--{name.replace('_', '-')} {str(value)[:40]}: not within {-largest}..{largest}",
                "use a smaller number",
            )


def check_amounts(**options: float | None) -> None:
    """Options of the command line that are real numbers from 0 on, by their names.

    Raises:
        ToolkitError: one is negative, not finite, or out of all proportion.
    """
    for name, value in options.items():
        if value is not None and not 0 <= value <= COARSEST:  # nor is NaN
            raise ToolkitError(f"--{name.replace('_', '-')} {value}: not within 0..{COARSEST:g}", "use a smaller number")
