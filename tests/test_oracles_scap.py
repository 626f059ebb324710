"""SCAP against its own equations: Chua et al. 2024 (arXiv 2412.07174)."""

from __future__ import annotations

import pytest
import torch
from sparse_runs import TOKENS, kth_magnitude, make_sparse

from calibration.histogram import Histogram
from sparsity.methods import Scap, Teal
from sparsity.rules import Rule
from sparsity.sites import prune, small
from sparsity.thresholds import kernel_mode

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(500, 64, generator=GENERATOR)
W = torch.randn(32, 64, generator=GENERATOR)
B = torch.randn(32, generator=GENERATOR)


def pool(x: torch.Tensor) -> Histogram:
    histogram = Histogram()
    histogram.update(x)
    return histogram


@pytest.mark.parametrize("mu", [0.0, -0.17, 2.5])
def test_the_shift_changes_nothing_where_nothing_is_pruned(mu):
    z = X - mu
    dense = X @ W.T + B
    shifted = z @ W.T + (B + mu * W.sum(dim=1))
    assert torch.allclose(shifted, dense, rtol=1e-5, atol=1e-5 * dense.abs().max().item())


@pytest.mark.parametrize("family", ["opt", "gpt2"])
def test_the_fold_is_center_times_row_sums(family):
    """GPT-2's Conv1D stores W transposed; OPT with GELU has no gate."""
    changes = {"activation_function": "gelu"} if family == "opt" else {}
    sparse = make_sparse(Scap(target=0.5, centering="every"), family, **changes)
    centered = [site for site in sparse.sites if site.center is not None]
    assert centered
    model = sparse.model(sites=())[0]
    for site in centered:
        weight = model.get_submodule(site.linear).weight
        w = (weight.T if family == "gpt2" else weight).double()
        assert site.shift is not None
        assert torch.equal(site.shift, (site.center.double() * w.sum(dim=1)).float())


@pytest.mark.parametrize("share", [0.3, 0.5, 0.7])
@pytest.mark.parametrize("mu", [0.0, 0.3])
def test_the_share_of_the_calibration_tensor(share, mu):
    exact = kth_magnitude(X - mu, share)
    assert ((X - mu).abs() <= exact).float().mean().item() == pytest.approx(share, abs=1 / X.numel())
    streamed = pool(X).threshold(share, mu)
    assert ((X - mu).abs() <= streamed).float().mean().item() == pytest.approx(share, abs=1e-3)


def test_without_a_center_it_prunes_as_teal_does():
    scap = make_sparse(Scap(target=0.5, centering="none", linears="all"))
    teal = make_sparse(Teal(target=0.5, allocation="uniform"), folder=scap.folder)
    first = [s for s in scap.sites if ".layers.0.self_attn.q" in s.name]  # nothing is pruned before it
    (other,) = (s for s in teal.sites if s.name == first[0].name)
    assert torch.equal(first[0].threshold, other.threshold)
    assert {s.name for s in scap.sites} == {s.name for s in teal.sites}


def test_an_input_that_is_all_mode_costs_nothing():
    mu = torch.tensor([0.25])
    x = torch.full((5, 64), 0.25)
    pruned = prune(x, torch.tensor([0.0]), mu)
    assert small(x, torch.tensor([0.0]), mu).all() and torch.equal(pruned, x)
    folded = (pruned - mu) @ W.T + (B + mu * W.sum(dim=1))
    assert torch.allclose(folded, x @ W.T + B, atol=1e-5)


def test_shifts_of_input_and_center_cancel():
    x = torch.randn(1000, generator=GENERATOR).double()
    shifted = x + 4.0
    assert kth_magnitude(shifted - 4.0, 0.5) == pytest.approx(kth_magnitude(x, 0.5), abs=1e-12)
    mask = small(x, torch.tensor([0.5]), torch.tensor([0.0]))
    assert torch.equal(mask, small(shifted, torch.tensor([0.5]), torch.tensor([4.0])))
    assert pool(shifted).threshold(0.5, 4.0) == pytest.approx(pool(x).threshold(0.5), rel=0.02)


def test_centering_halves_the_error_on_a_shifted_peak():
    """Inputs peaked at -0.17 with a deviation of 0.1, as behind a GELU: less than half of the error in norm."""
    x = -0.17 + 0.1 * torch.randn(4000, 64, generator=GENERATOR)
    errors = {}
    for center in (0.0, kernel_mode(pool(x))):
        threshold = Rule("", "input", pool(x), center=center).threshold(0.5)
        errors[center] = float(((x - prune(x, threshold, torch.tensor([center]))) @ W.T).norm())
    uncentered, centered = errors.values()
    assert centered < 0.5 * uncentered


def test_more_is_a_superset():
    histogram, before = pool(X), torch.zeros_like(X, dtype=torch.bool)
    last = 0.0
    for share in (0.1, 0.3, 0.5, 0.7, 0.9):
        threshold = histogram.threshold(share)
        mask = small(X, torch.tensor([threshold]))
        assert threshold > last and (mask | before).equal(mask)
        before, last = mask, threshold


def test_masks_of_siblings_do_not_touch_each_other():
    """Gate and up read one tensor; each sees its own masked copy, and the other sees the tensor as it was."""
    sparse = make_sparse(Scap(targets="up_proj=0.8,gate_proj=0.2,down_proj=0.0"))
    up, gate = sparse.site("layers.0.mlp.up_proj"), sparse.site("layers.0.mlp.gate_proj")
    assert up.threshold > gate.threshold and not [s for s in sparse.sites if "down_proj" in s.name]
    seen = {}
    for name, sites in {"both": (up, gate), "gate": (gate,)}.items():
        model = sparse.model(sites)[0]
        module = model.model.layers[0].mlp.gate_proj
        module.register_forward_hook(lambda m, a, y, name=name: seen.update({name: y}))
        with torch.no_grad():
            model(TOKENS.input_ids, use_cache=False)
    assert torch.equal(seen["both"], seen["gate"])


def test_later_stages_and_blocks_see_the_pruning_before_them():
    """Sequential calibration reaches its target behind pruned stages, where a dense calibration misses it."""
    sparse = make_sparse(Scap(target=0.7))
    for name, share in sparse.reached(blocks=2).items():
        assert share == pytest.approx(0.7, abs=2e-3), name
    second = make_sparse(Scap(target=0.7), folder=sparse.folder)
    assert all(torch.equal(a.threshold, b.threshold) for a, b in zip(sparse.sites, second.sites, strict=True))


def test_centering_helps_a_network_without_a_gate():
    errors = {}
    for centering in ("none", "plain"):
        step = Scap(targets="fc2=0.5,*=0.0", centering=centering)
        sparse = make_sparse(step, "opt", activation_function="gelu")
        errors[centering] = float((sparse.logits() - sparse.logits(sites=())).norm())
    assert errors["plain"] < errors["none"]


def test_no_share_is_dense():
    sparse = make_sparse(Scap(target=0.0, centering="every"))
    assert sparse.sites == () and torch.equal(sparse.logits(), sparse.logits(sites=()))
