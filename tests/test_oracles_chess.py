"""CHESS against its own equations: He et al. 2024 (arXiv 2409.01366)."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from sparse_runs import TOKENS, kth_magnitude, make_sparse

from sparsity.methods import Cats, Chess, ChessWithAttention
from sparsity.sites import prune, small
from sparsity.thresholds import channel_thresholds

GENERATOR = torch.Generator().manual_seed(0)
D, M, T = 32, 96, 400
G = torch.randn(T, M, generator=GENERATOR, dtype=torch.float64)
SCALE = 3 * torch.rand(M, generator=GENERATOR, dtype=torch.float64)
U = torch.randn(T, M, generator=GENERATOR, dtype=torch.float64) * SCALE
DOWN = torch.randn(D, M, generator=GENERATOR, dtype=torch.float64)
A = U.abs().mean(0)


def chess_mask(share: float, importance: torch.Tensor = A) -> torch.Tensor:
    pooled = kth_magnitude(G * importance, share)
    return G.abs() * importance <= pooled


def cats_mask(share: float) -> torch.Tensor:
    return G.abs() <= kth_magnitude(G, share)


def test_no_sparsity_is_the_dense_network_bit_for_bit():
    threshold = channel_thresholds(0.0, A)
    assert torch.equal(threshold, torch.zeros(M)) and torch.equal(prune(G, threshold), G)
    sparse = make_sparse(Chess(target=0.0))
    assert sparse.sites == () and torch.equal(sparse.logits(), sparse.logits(sites=()))


def test_masking_is_gathering_rows():
    g, x = G[0].float(), torch.randn(D)
    up, down, threshold = torch.randn(M, D), DOWN.float(), torch.rand(M)
    masked = down @ (prune(g, threshold) * (up @ x))
    idx = prune(g, threshold).nonzero().flatten()
    gathered = sum(g[j] * (up[j] @ x) * down.T[j] for j in idx)
    assert torch.allclose(masked, gathered, rtol=1e-5, atol=1e-5 * masked.abs().max().item())


def test_the_threshold_per_channel_is_the_threshold_on_importance():
    pooled = kth_magnitude(G * A, 0.5)
    per_channel = G.abs() > pooled / A
    assert (per_channel != ~chess_mask(0.5)).double().mean() <= 1e-6
    ours = ~small(G, channel_thresholds(pooled, A))  # thresholds are kept in float32
    assert (ours != per_channel).double().mean() <= 1e-4


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5, 0.7])
def test_the_pool_is_pruned_exactly(share):
    assert chess_mask(share).sum() == int(G.numel() * share)
    means = chess_mask(share).double().mean(0)
    assert means.std() > 0.01 and means.mean().item() == pytest.approx(share, abs=1e-3)


def test_equal_importance_is_cats():
    constant = torch.full((M,), 0.37, dtype=torch.float64)
    assert torch.equal(chess_mask(0.5, constant), cats_mask(0.5))
    found = channel_thresholds(kth_magnitude(G * constant, 0.5), constant)
    assert torch.allclose(found, found[:1].expand(M)) and found[0].item() == pytest.approx(kth_magnitude(G, 0.5))


def test_scaling_a_channel_of_up_scales_its_threshold_back():
    factor = torch.ones(M, dtype=torch.float64)
    factor[5] = 8.0
    pooled, scaled = kth_magnitude(G * A, 0.5), kth_magnitude(G * A * factor, 0.5)
    ratio = channel_thresholds(scaled, A * factor) / channel_thresholds(pooled, A)
    assert ratio[5].item() == pytest.approx(scaled / pooled / 8.0, rel=1e-6)
    assert torch.allclose(ratio[:5], torch.tensor(scaled / pooled, dtype=torch.float32).expand(5))


def test_chess_prunes_less_energy_than_cats_and_the_true_product_least():
    energy = (G * U).square()
    masks = cats_mask(0.5), chess_mask(0.5)
    exact = (G * U).abs() <= kth_magnitude(G * U, 0.5)
    assert masks[0].sum() == masks[1].sum() == exact.sum()
    cats, chess, least = (float(energy[m].sum()) for m in (*masks, exact))
    assert least < chess < 0.6 * cats
    other = torch.rand(G.shape, generator=GENERATOR, dtype=torch.float64)
    random = other <= kth_magnitude(other, 0.5)
    assert least < float(energy[random].sum())


def test_a_dead_channel_is_always_pruned_and_never_nan():
    importance = A.clone()
    importance[3] = 0.0
    threshold = channel_thresholds(kth_magnitude(G * importance, 0.5), importance)
    assert torch.isfinite(threshold).all() and prune(G, threshold)[:, 3].abs().max() == 0


def gate_and_up(sparse):
    """G and U of block 0 on the calibration tokens, without position 0."""
    model, seen = sparse.model(sites=())[0], {}
    mlp = model.model.layers[0].mlp
    mlp.act_fn.register_forward_hook(lambda m, a, y: seen.update(g=y))
    mlp.up_proj.register_forward_hook(lambda m, a, y: seen.update(u=y))
    with torch.no_grad():
        model(TOKENS.input_ids, use_cache=False)
    return seen["g"][:, 1:].flatten(0, 1), seen["u"][:, 1:].flatten(0, 1), mlp.down_proj.weight


@pytest.mark.parametrize("settings", [{}, {"up_stat": "rms"}, {"down_norm": True}])
def test_the_pass_is_the_equation(settings):
    sparse = make_sparse(Chess(target=0.5, **settings))
    g, u, down = gate_and_up(sparse)
    a = u.square().mean(0).sqrt() if settings.get("up_stat") == "rms" else u.abs().mean(0)
    a = a * down.norm(dim=0) if settings.get("down_norm") else a
    expected = kth_magnitude(g * a, 0.5) / a
    assert torch.allclose(sparse.site("layers.0.mlp.gate_proj").threshold, expected, rtol=5e-3)
    reached = sparse.reached()
    assert reached["model.layers.0.mlp.gate_proj.output"] == pytest.approx(0.5, abs=1e-3)


def test_queries_and_outputs_are_pruned_and_keys_and_values_untouched():
    sparse = make_sparse(ChessWithAttention(target=0.5))
    linears = {site.linear.rpartition(".")[2] for site in sparse.sites}
    assert linears == {"q_proj", "o_proj", "gate_proj"}
    seen = {}
    for key, sites in (("dense", ()), ("sparse", sparse.sites)):
        model = sparse.model(sites)[0]
        for name in ("k_proj", "v_proj"):
            module = model.model.layers[0].self_attn.get_submodule(name)
            module.register_forward_hook(lambda m, a, y, place=(key, name): seen.update({place: y}))
        with torch.no_grad():
            model(TOKENS.input_ids, use_cache=False)
    for name in ("k_proj", "v_proj"):
        assert torch.equal(seen["dense", name], seen["sparse", name])


def test_chess_is_not_worse_than_cats_in_the_layer(tmp_path):
    """Channels of up with scales from 0 to 3, as the paper's argument needs."""
    chess = make_sparse(Chess(target=0.5))
    path = chess.folder / "model.safetensors"
    tensors = load_file(path)
    for name in [n for n in tensors if n.endswith("up_proj.weight")]:
        tensors[name] *= 3 * torch.rand(tensors[name].shape[0], 1, generator=GENERATOR)
    save_file(tensors, path, metadata={"format": "pt"})
    errors = {}
    for step in (Cats(target=0.5), Chess(target=0.5)):
        sparse = make_sparse(step, folder=chess.folder)
        first = tuple(s for s in sparse.sites if ".layers.0." in s.name)
        g, u, down = gate_and_up(sparse)
        pruned = prune(g, first[0].threshold)
        errors[step.name] = float((((g - pruned) * u) @ down.T).square().sum())
    assert errors["chess"] < 0.7 * errors["cats"]
