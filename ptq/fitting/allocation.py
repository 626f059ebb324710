"""One option per unit at the least total loss under a budget: a multiple-choice knapsack, solved exactly."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

import numpy as np

from calibration.errors import ToolkitError

Matrix = Sequence[Sequence[float]]


def check_solver() -> None:
    """Refuse early where the integer program could not be solved.

    Raises:
        ToolkitError: scipy is not installed.
    """
    if importlib.util.find_spec("scipy") is None:
        raise ToolkitError("a fit solves an integer program: scipy is not installed", "pip install 'ptq[fit]'")


def allocate(costs: Matrix, losses: Matrix, budget: float) -> list[int] | None:
    """The option of every unit that minimizes the sum of losses with a sum of costs of at most ``budget``.

    Args:
        costs, losses: by unit and option; units may have different numbers of options.

    Returns:
        An option per unit, or None where even the cheapest ones are over the budget.
    """
    # imported here: it takes a second, and nothing else in the package needs it
    check_solver()
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    if sum(min(unit) for unit in costs) > budget:
        return None
    kept = [_undominated(c, v) for c, v in zip(costs, losses, strict=True)]
    c = np.array([costs[u][o] for u, options in enumerate(kept) for o in options], dtype=float)
    v = np.array([losses[u][o] for u, options in enumerate(kept) for o in options], dtype=float)
    unit_of = np.repeat(np.arange(len(kept)), [len(options) for options in kept])
    one_each = csr_array((np.ones(len(c)), (unit_of, np.arange(len(c)))), shape=(len(kept), len(c)))
    solution = milp(
        v / max(float(v.max()), 1e-300),  # tolerances of the solver are absolute
        integrality=np.ones(len(c)),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(one_each, 1, 1),
            LinearConstraint((c / c.max())[None], -np.inf, budget / c.max()),
        ],
        options={"mip_rel_gap": 0.0},
    )
    assert solution.success, solution.message
    chosen = [options[int(np.argmax(solution.x[unit_of == u]))] for u, options in enumerate(kept)]
    return chosen


def _undominated(costs: Sequence[float], losses: Sequence[float]) -> list[int]:
    """Options that no cheaper or equal one beats or equals, by cost."""
    found: list[int] = []
    for option in sorted(range(len(costs)), key=lambda o: (costs[o], losses[o])):
        if not found or losses[option] < losses[found[-1]]:
            found.append(option)
    return found
