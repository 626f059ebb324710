"""PPL-p% sparsity: equal relative errors of all blocks, and the search for the largest."""

from __future__ import annotations

import pytest
import torch
from sparse_runs import make_profile

from sparsity.budget import GRID, choose, sites_within
from sparsity.methods import Cats, Scap, Teal
from sparsity.methods.teal import greedy_shares
from sparsity.thresholds import interpolate


@pytest.fixture(scope="module")
def cats():
    return make_profile(Cats())


def test_errors_grow_with_the_target(cats):
    profile, sparse = cats
    for index in range(2):
        errors = profile[f"{sparse.spec.prefix(index)}errors"]
        assert len(errors) == len(GRID) and errors[0] == 0.0 and bool((errors.diff() > 0).all())


def test_the_error_is_that_of_the_block(cats):
    profile, sparse = cats
    _, sites = sites_within(profile, sparse.spec, float(profile["model.layers.0.errors"][5]))
    first = tuple(s for s in sites if s.name.startswith("model.layers.0."))
    x, dense, pruned = (t[:, 1:].flatten(0, 1) for t in (sparse.block_input(), *map(sparse.block_output, ((), first))))
    error = ((pruned - dense).norm(dim=1) / (dense - x).norm(dim=1)).mean().item()
    assert error == pytest.approx(float(profile["model.layers.0.errors"][5]), rel=0.05)


def test_no_budget_prunes_nothing(cats):
    profile, sparse = cats
    assert sites_within(profile, sparse.spec, 0.0) == ((0.0, 0.0), ())
    assert choose(profile, sparse.spec, 0.0, lambda sites: float(len(sites))).sites == ()


@pytest.mark.parametrize(
    "step",
    [Cats(), pytest.param(Scap(centering="every"), marks=pytest.mark.slow), Teal(allocation="uniform")],
)
def test_a_larger_budget_prunes_more(step):
    profile, sparse = make_profile(step)
    before = dict[str, torch.Tensor]()
    for budget in (0.02, 0.05, 0.1, 0.2, 0.4):
        targets, sites = sites_within(profile, sparse.spec, budget)
        thresholds = {s.name: s.threshold for s in sites if s.center is None}
        assert all(bool((thresholds[n] >= t).all()) for n, t in before.items() if n in thresholds)
        assert all(0 < t <= 0.9 for t in targets)
        before = thresholds


def test_one_greedy_search_per_block_serves_all_targets(monkeypatch):
    searched = []

    def search(*args, **settings):
        searched.append(args)
        return greedy_shares(*args, **settings)

    monkeypatch.setattr("sparsity.methods.teal.greedy_shares", search)
    profile, _ = make_profile(Teal(step=0.5))
    assert len(searched) == 2 and all(f"{t:.2f}/" in "".join(profile) for t in GRID[1:])


def test_the_search_finds_the_budget_of_the_limit(cats):
    """With a loss that is a known function of the budget the bisection returns its inverse."""
    profile, sparse = cats
    errors = profile["model.layers.0.errors"].tolist()

    def increase(sites):
        """The interpolated error of block 0, read back from its threshold."""
        site = next((s for s in sites if ".layers.0." in s.name), None)
        if site is None:
            return 0.0
        grid = [0.0, *(float(profile[f"{t:.2f}/{site.name}.threshold"]) for t in GRID[1:])]
        i = next(i for i, t in enumerate(grid) if t >= float(site.threshold) * (1 - 1e-7))
        inside = (float(site.threshold) - grid[i - 1]) / (grid[i] - grid[i - 1])
        return errors[i - 1] + inside * (errors[i] - errors[i - 1])

    limit = 0.6 * errors[-1]
    found = choose(profile, sparse.spec, limit, increase, rounds=50)
    assert found.budget == pytest.approx(limit, rel=1e-5) and found.increase <= limit


def test_everything_is_taken_where_everything_is_allowed(cats):
    profile, sparse = cats
    asked = []
    found = choose(profile, sparse.spec, 1.0, lambda sites: asked.append(1) or 0.5)
    assert len(asked) == 1 and max(found.targets) == pytest.approx(0.9)


def test_interpolation_stays_below_a_budget_even_where_errors_fall():
    shares, errors = (0.0, 0.5, 0.8, 0.9), (0.0, 0.2, 0.1, 0.4)
    assert interpolate(0.1, shares, errors) == pytest.approx(0.25)
    assert interpolate(0.2, shares, errors) == pytest.approx(0.8)
    assert interpolate(0.3, shares, errors) == pytest.approx(0.85)
    assert interpolate(9.0, shares, errors) == 0.9 and interpolate(0.0, shares, errors) == 0.0
