"""CATS (arXiv 2404.08763), TEAL (arXiv 2408.14690) and FATReLU (arXiv 2402.13516) against their own equations."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from safetensors.torch import load_file, save_file
from sparse_runs import TOKENS, make_sparse

from calibration.histogram import Histogram
from sparsity.masking import skipped_weights
from sparsity.methods import Cats, Chess, FatRelu, Teal, Wina
from sparsity.methods.teal import greedy_shares, shares_at
from sparsity.sites import prune

GENERATOR = torch.Generator().manual_seed(0)


def threshold(x: torch.Tensor, share: float) -> float:
    histogram = Histogram()
    histogram.update(x)
    return histogram.threshold(share)


@pytest.mark.parametrize("share", [0.3, 0.5, 0.7, 0.9])
def test_cats_reaches_its_share_on_the_calibration_text(share):
    for name, found in make_sparse(Cats(target=share)).reached().items():
        assert found == pytest.approx(share, abs=1e-3), name


def test_hard_shrink_is_the_mask():
    a, tau = torch.randn(1000), 0.6

    def one_sided(v: torch.Tensor) -> torch.Tensor:
        return torch.where(v > tau, v, 0.0)

    assert torch.equal(one_sided(a) - one_sided(-a), prune(a, torch.tensor([tau])))


@pytest.mark.parametrize("share", [0.25, 0.5, 0.9])
def test_thresholds_are_those_of_known_distributions(share):
    normal = torch.randn(400_000, generator=GENERATOR)
    expected = math.sqrt(2) * torch.erfinv(torch.tensor(share)).item()  # z of 0.5 + s/2
    assert threshold(normal, share) == pytest.approx(expected, rel=0.01)
    signs = torch.randint(0, 2, (400_000,), generator=GENERATOR) * 2 - 1
    laplace = 1.7 * torch.empty(400_000).exponential_(generator=GENERATOR) * signs
    assert threshold(laplace, share) == pytest.approx(-1.7 * math.log(1 - share), rel=0.01)


def test_teal_without_sparsity_is_dense():
    sparse = make_sparse(Teal(target=0.0))
    assert sparse.sites == () and torch.equal(sparse.logits(), sparse.logits(sites=()))


def test_greedy_removes_as_much_per_step_and_ends_at_the_target():
    numel = {"q": 100, "k": 25, "down": 350}
    sensitivity = {"q": 1.0, "k": 9.0, "down": 2.0}

    def error(shares):
        return sum(sensitivity[n] * numel[n] * s**2 for n, s in shares.items())

    rows = greedy_shares(numel, error, unit=0.05 * 350, target=0.5)
    removed = [row[0] for row in rows]
    steps = [b - a for a, b in pairwise(removed)]
    assert all(s == pytest.approx(0.05 * 350 / 475) for s in steps[:-1]) and removed[-1] == pytest.approx(0.5)
    uniform = [error(dict.fromkeys(numel, r)) for r in removed]
    better = sum(row[1] <= u * (1 + 1e-12) for row, u in zip(rows, uniform, strict=True))
    assert better >= 0.9 * len(rows) and rows[-1][1] < uniform[-1]
    assert rows[-1][2]["q"] > rows[-1][2]["down"] > rows[-1][2]["k"]


def test_lazy_trials_take_the_steps_of_the_full_search():
    """Errors that add up and grow ever faster, as squared errors do."""
    numel = {"q": 100, "k": 25, "v": 25, "up": 350, "down": 350}
    weight = {"q": 1.3, "k": 9.1, "v": 4.7, "up": 2.3, "down": 1.1}
    trials = 0

    def error(shares):
        nonlocal trials
        trials += 1
        return sum(weight[n] * numel[n] * s**2 for n, s in shares.items())

    lazy = greedy_shares(numel, error, unit=0.02 * 350, target=0.6)
    counted, shares, removed = trials, dict.fromkeys(numel, 0.0), 0.0
    while removed < 0.6 * 850 - 1e-9:
        amount = min(7.0, 0.6 * 850 - removed)
        options = {n: {**shares, n: min(1.0, shares[n] + amount / numel[n])} for n in numel if shares[n] < 1.0}
        best = min(options, key=lambda n: error(options[n]))
        removed += (options[best][best] - shares[best]) * numel[best]
        shares = options[best]
    assert lazy[-1][2] == pytest.approx(shares) and counted < 0.5 * 5 * len(lazy)


def test_greedy_never_prunes_more_than_everything():
    rows = greedy_shares({"a": 10, "b": 1000}, lambda s: s["b"], unit=500, target=0.6)
    assert rows[-1][2]["a"] == 1.0 and rows[-1][0] == pytest.approx(0.6)


def test_rows_on_the_way_are_the_searches_for_smaller_targets():
    numel, weight = {"q": 100, "k": 25, "down": 350}, {"q": 1.0, "k": 9.0, "down": 2.0}

    def error(shares):
        return sum(weight[n] * numel[n] * s**2 for n, s in shares.items())

    rows = greedy_shares(numel, error, unit=2.0, target=0.9)
    for target in (0.0, 0.25, 0.5, 0.731, 0.9):
        found = shares_at(rows, target)
        assert sum(numel[n] * s for n, s in found.items()) / 475 == pytest.approx(target)
        assert found == pytest.approx(greedy_shares(numel, error, unit=2.0, target=target)[-1][2], abs=2.0 / 25)


def test_a_step_is_a_share_of_the_weights_of_q(monkeypatch):
    """As published: q loses ``step`` of its weights at once, and every other linear as many weights."""
    units = []

    def search(numel, error, unit, target):
        units.append(unit)
        return greedy_shares(numel, error, 0.5 * max(numel.values()), target)

    monkeypatch.setattr("sparsity.methods.teal.greedy_shares", search)
    sparse = make_sparse(Teal(target=0.3, step=0.1))
    query = sparse.model(sites=())[0].get_submodule("model.layers.0.self_attn.q_proj").weight.numel()
    assert units == [0.1 * query] * 2


@pytest.mark.parametrize("step", [Teal, Wina])
@pytest.mark.parametrize("allocation", ["uniform", "greedy"])
def test_what_is_reached_is_what_was_asked_for(step, allocation):
    """Thresholds are those of inputs behind everything that is pruned: also in the last block, at 70 %."""
    coarse = {"step": 0.15} if allocation == "greedy" else {}
    sparse = make_sparse(step(target=0.7, allocation=allocation, **coarse))
    model = sparse.model(sites=())[0]
    for index in range(2):
        prefix = sparse.spec.prefix(index)
        sizes = {prefix + n: model.get_submodule(prefix + n).weight.numel() for n in sparse.spec.block(index).linears}
        reached = {n: s for n, s in sparse.reached(blocks=2).items() if n.startswith(prefix)}
        assert sum(skipped_weights(sparse.spec, sizes, reached).values()) / sum(sizes.values()) == pytest.approx(
            0.7, abs=0.01
        )


@pytest.mark.parametrize("step", [Cats, Chess])
def test_gates_too_are_calibrated_behind_pruned_blocks(step):
    """In a model whose first block makes most of what enters the second."""
    folder = make_sparse(Teal(target=0.0)).folder
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.down_proj.weight"] *= 100
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    sparse = make_sparse(step(target=0.7), folder=folder)
    threshold = sparse.site("layers.1.").threshold

    @torch.no_grad()
    def pruned(sites):
        model, seen = sparse.model(sites)[0], []
        model.get_submodule("model.layers.1.mlp.act_fn").register_forward_hook(lambda m, a, y: seen.append(y[:, 1:]))
        model(TOKENS.input_ids, use_cache=False)
        return float((seen[0].abs() <= threshold).float().mean())

    behind = tuple(site for site in sparse.sites if "layers.0." in site.name)
    assert pruned(behind) == pytest.approx(0.7, abs=1e-4) and abs(pruned(()) - 0.7) > 1e-3


def test_wina_counts_a_value_by_the_column_that_it_meets():
    """Its thresholds are one number over the norms of the columns; with equal columns they are TEAL's."""
    sparse = make_sparse(Wina(target=0.5, allocation="uniform"))
    site = sparse.site("layers.0.self_attn.k_proj")
    weight = sparse.model(sites=())[0].get_submodule(site.linear).weight
    scores = site.threshold * weight.norm(dim=0)
    assert site.threshold.shape == (weight.shape[1],) and torch.allclose(scores, scores[0].expand_as(scores))
    assert not torch.equal(site.threshold, sparse.site("layers.0.self_attn.q_proj").threshold)


def test_wina_costs_less_than_teal_where_columns_differ():
    """Usefulness: a third of the channels trade a factor of 30 between the norm and the columns that read it."""
    folder = make_sparse(Teal(target=0.0)).folder
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith("post_attention_layernorm.weight"):
            tensor[::3] /= 30
        elif name.endswith(("up_proj.weight", "gate_proj.weight")):
            tensor[:, ::3] *= 30
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    errors = {}
    for step in (Teal, Wina):
        sparse = make_sparse(step(target=0.4, allocation="uniform"), folder=folder)
        errors[step] = float((sparse.block_output(sparse.sites) - sparse.block_output(())).norm())
    assert errors[Wina] < 0.8 * errors[Teal], errors


def test_teal_spreads_its_budget_by_the_error_of_the_block():
    target = 0.6
    greedy = make_sparse(Teal(target=target, step=0.1))
    uniform = make_sparse(Teal(target=target, allocation="uniform"), folder=greedy.folder)
    model = greedy.model(sites=())[0]
    prefix = "model.layers.0."
    sizes = {prefix + n: model.get_submodule(prefix + n).weight.numel() for n in greedy.spec.block(0).linears}
    errors = {}
    for name, sparse in (("greedy", greedy), ("uniform", uniform)):
        everything = skipped_weights(sparse.spec, sizes, sparse.reached())
        assert sum(everything.values()) / sum(sizes.values()) == pytest.approx(target, abs=0.02)
        errors[name] = float((sparse.block_output(sparse.sites) - sparse.block_output(())).norm())
    assert errors["greedy"] < errors["uniform"]


def fatrelu(x: torch.Tensor, t: float) -> torch.Tensor:
    """As published: keeps x >= T."""
    return torch.where(x >= t, x, 0.0)


def test_fatrelu_is_a_threshold_behind_relu():
    x = torch.randn(10_000)
    assert torch.equal(fatrelu(x, 0.0), torch.relu(x))
    tau = torch.tensor([0.4])
    above = float(torch.nextafter(tau, torch.tensor(1.0)))  # |x| <= tau is x < T for the next number T
    pruned = prune(torch.relu(x), tau)
    assert torch.equal(pruned, fatrelu(x, above))
    assert not ((pruned > 0) & (pruned < above)).any()


def test_fatrelu_raises_relu_to_the_target_and_leaves_its_own_zeros():
    sparse = make_sparse(FatRelu(target=0.8), "opt")
    assert {s.linear.rpartition(".")[2] for s in sparse.sites} == {"fc2"}
    assert all(share == pytest.approx(0.8, abs=1e-3) for share in sparse.reached().values())
    natural = make_sparse(FatRelu(target=0.1), "opt")
    assert all(float(s.threshold) == 0.0 for s in natural.sites)
    assert all(share > 0.1 for share in natural.reached().values())
    assert torch.equal(natural.logits(), natural.logits(sites=()))


def test_fatrelu_prunes_the_gate_where_there_is_one():
    sparse = make_sparse(FatRelu(target=0.8), "llama", hidden_act="relu")
    assert {s.mode for s in sparse.sites} == {"output"}
    assert all(share == pytest.approx(0.8, abs=1e-3) for share in sparse.reached().values())


def test_a_prompt_is_bit_identical_to_dense():
    """Half-sequence mode: the first half is computed densely, in every block."""
    sparse = make_sparse(Teal(target=0.5, allocation="uniform"))
    dense, half = sparse.logits(sites=()), sparse.logits(dense=16)
    assert torch.equal(half[:, :16], dense[:, :16]) and not torch.equal(half[:, 16:], dense[:, 16:])
    everywhere = sparse.logits()
    assert torch.equal(everywhere[:, :1], dense[:, :1]) and not torch.equal(everywhere[:, 1:16], dense[:, 1:16])
