"""How large and how fine a number may be that a user sets. The passes check what a setting means; here is only what no
run would ever end with, and what is no number at all."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from calibration.errors import Problem, ToolkitError

if TYPE_CHECKING:
    from calibration.walk.passes import Pass

MOST = 1_000_000  # samples, tokens, steps, epochs, points of a grid
LARGEST_SEED = 2**63 - 1  # of torch's generators
LARGEST_AMOUNT = 1e18  # parameters and tokens of a model are counted in numbers like 15e12
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
    """Whole numbers of the command line, from 0 on, by their names; ``seed`` among them, which is any of 64 bits.

    Raises:
        ToolkitError: one is negative or out of all proportion.
    """
    for name, value in options.items():
        low, high = (-LARGEST_SEED, LARGEST_SEED) if name == "seed" else (0, MOST)
        if value is not None and not low <= value <= high:
            raise _outside(name, value, f"{low}..{high}")


def check_amounts(most: float = COARSEST, **options: float | None) -> None:
    """Real numbers of the command line, from 0 on, by their names.

    Raises:
        ToolkitError: one is negative, not finite, or greater than ``most``.
    """
    for name, value in options.items():
        if value is not None and not 0 <= value <= most:  # nor is NaN
            raise _outside(name, value, f"0..{most:g}")


def check_numbers(options: Mapping[str, object]) -> None:
    """Every number among the options of a command, as far as it holds for all commands.

    Raises:
        ToolkitError: see `check_counts` and `check_amounts`.
    """
    for name, value in options.items():
        if isinstance(value, int) and not isinstance(value, bool):
            check_counts(**{name: value})
        elif isinstance(value, float):
            check_amounts(LARGEST_AMOUNT, **{name: value})


def _outside(name: str, value: float, bounds: str) -> ToolkitError:
    return ToolkitError(
        f"--{name.replace('_', '-')} {str(value)[:40]}: not within {bounds}",
        "use a number within these bounds, or leave the option out for its default",
    )
