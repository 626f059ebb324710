"""The oracles of rotation: Hadamard matrices and transforms against their definitions, and the pass on tiny models."""

from __future__ import annotations

import pytest
import torch
from test_exact_passes import logits_around
from test_exactness import load_whole, open_blocks
from test_oracles_awq import outputs, randn
from test_statistics import open_block
from tiny_models import save_tiny, tiny_model

from calibration.errors import ToolkitError
from calibration.walk.passes import check_order
from ptq.methods import Rotate, Rtn
from ptq.methods.rotate import fuse_gain, unscaled_bias
from ptq.numerics.hadamard import block_size, hadamard_matrix, hadamard_transform, odd_order
from ptq.numerics.rotation import make_rotation

torch.set_num_threads(1)
ORDERS = [1, 2, 4, 64, 12, 20, 28, 36, 44, 52, 60, 68, 76, 84, 100, 108, 140, 148, 156, 172, 344, 924]
DIMENSIONS = {  # of real models: the order of the factor with the odd part
    **{576: 36, 640: 20, 768: 12, 896: 28, 960: 60, 1152: 36, 1536: 12, 1600: 100, 2560: 20, 3072: 12, 3584: 28},
    **{4864: 76, 5120: 20, 5376: 84, 5632: 44, 6656: 52, 6912: 108, 8960: 140, 9728: 76, 11008: 172, 13824: 108},
    **{14336: 28, 17408: 68, 18944: 148, 21504: 84, 25600: 100, 29568: 924, 4096: 1, 80: 20, 96: 12, 112: 28},
}


@pytest.mark.parametrize("order", ORDERS)
def test_oracle_1_hadamard(order):
    """1. H H^T = nI in integers for every constructor order; entries only +-1."""
    h = hadamard_matrix(order)
    assert h.dtype == torch.int64 and h.shape == (order, order) and (h.abs() == 1).all()
    assert torch.equal(h @ h.T, order * torch.eye(order, dtype=torch.int64))


def test_oracle_1_dimensions():
    """1. Every dimension that real models have is covered but 13696 = 107 * 128, which falls apart into blocks."""
    assert {n: odd_order(n) for n in DIMENSIONS} == DIMENSIONS
    assert all(block_size(n) == n for n in DIMENSIONS)
    assert odd_order(13696) is None and block_size(13696) == 128
    assert [block_size(n) for n in (6, 9, 18, 428, 3 * 128)] == [2, 1, 2, 4, 384]


@pytest.mark.parametrize("n", [2, 8, 128, 4096])
def test_oracle_2_powers_of_two(n):
    """2. FWHT(FWHT(x)) = x (power of two), norms preserved to 1e-12."""
    x = randn(5, n)
    y = hadamard_transform(x, n)
    assert torch.allclose(hadamard_transform(y, n), x, rtol=0, atol=1e-12)
    assert torch.allclose(y.norm(dim=1), x.norm(dim=1), rtol=1e-12)


@pytest.mark.parametrize(
    ("n", "block"), [(12, 12), (96, 96), (384, 384), (80, 80), (40, 40), (5632, 5632), (384, 128), (36, 2)]
)
def test_oracle_2_the_transform_is_the_kronecker_product(n, block):
    """2. K x 2^m equals the dense Kronecker product; in blocks, the block-diagonal one. Products are unchanged."""
    order = odd_order(block)
    dense = torch.kron(hadamard_matrix(order), hadamard_matrix(block // order)).double() / block**0.5
    x = randn(3, n)
    expected = (x.view(3, n // block, block) @ dense.T).view(3, n)
    assert torch.allclose(hadamard_transform(x, block), expected, rtol=0, atol=1e-12)
    w = randn(4, n, seed=1)
    turned = hadamard_transform(x, block) @ hadamard_transform(w, block).T
    assert torch.allclose(turned, x @ w.T, rtol=1e-10, atol=1e-10)
    half = hadamard_transform(x.bfloat16(), block)
    assert half.dtype == torch.bfloat16 and (half.double() - expected).abs().max() < 0.02 * expected.abs().max()


@pytest.mark.parametrize("kind", ["hadamard", "orthogonal"])
@pytest.mark.parametrize("keep_mean", [False, True])
@pytest.mark.parametrize("n", [18, 64, 96])
def test_rotations_are_orthogonal(n, keep_mean, kind):
    q = make_rotation(n, kind, 3, keep_mean)(torch.eye(n, dtype=torch.float64))
    assert torch.allclose(q @ q.T, torch.eye(n, dtype=torch.float64), atol=1e-12)
    ones = torch.ones(n, dtype=torch.float64)
    assert torch.allclose(ones @ q, ones, atol=1e-12) == keep_mean
    assert not torch.allclose(make_rotation(n, kind, 4, keep_mean)(ones.roll(1) * 0 + randn(n)), randn(n) @ q)
    assert torch.allclose(make_rotation(n, kind, 3, keep_mean)(randn(2, 5, n)), randn(2, 5, n) @ q, atol=1e-12)


@torch.no_grad()
def test_oracle_4_layernorm_needs_the_mean_in_place(tmp_path, monkeypatch):
    """4. (Without conversion.) Every stream keeps its mean, and a Q that moves the mean breaks a LayerNorm model."""
    reference, after, blocks, segments = logits_around("gpt2", Rotate(), torch.float64, tmp_path / "a")
    assert (after - reference).abs().max() <= 1e-6 * reference.abs().max()
    fresh = open_blocks(tmp_path / "a", torch.float64)
    for segment, before in zip(segments, load_whole(fresh), strict=True):
        for name in segment.spec.writes:
            means = segment.weight(name).mean(0), before.weight(name).mean(0)  # R2 and R4 turned their inputs too
            assert torch.allclose(means[0].norm(), means[1].norm(), rtol=1e-9)
            assert torch.allclose(segment.masters[f"{name}.bias"].mean(), before.masters[f"{name}.bias"].mean())
    table = "transformer.wte.weight"
    assert torch.allclose(blocks.outside.tensor(table).mean(1), fresh.reader.tensor(table).mean(1), atol=1e-12)
    monkeypatch.setattr(Rotate, "_stream_rotation", lambda self, a, size: make_rotation(size, self.kind, self.seed))
    reference, after, *_ = logits_around("gpt2", Rotate(), torch.float64, tmp_path / "b")
    assert (after - reference).abs().max() > 1e-2 * reference.abs().max()


@torch.no_grad()
def test_oracle_5_centring_is_no_invariance_of_rmsnorm():
    """5. Mean-centring an RMSNorm model's embedding changes logits (the published code does it)."""
    model = tiny_model("llama")
    ids = torch.arange(20)[None]
    before = model(ids).logits
    table = model.model.embed_tokens.weight
    table.sub_(table.mean(dim=1, keepdim=True))
    assert (model(ids).logits - before).abs().max() > 1e-3 * before.abs().max()


@torch.no_grad()
@pytest.mark.parametrize("family", ["gemma2", "gemma3", "llama", "falcon-40b", "opt", "mixtral"])
def test_oracle_6_fusing_a_gain(family, tmp_path):
    """6. Gemma: after fusion w==0; with other gains the block differs. Elsewhere w==1; a bias goes where it fits."""
    segment, states = open_block(family, tmp_path)
    expected = outputs(segment, states)
    for group in segment.spec.balance:
        if group.kind == "norm":
            fuse_gain(segment, group)
            neutral = 0.0 if family.startswith("gemma") else 1.0
            assert (segment.masters[f"{group.producer}.weight"] == neutral).all()
    assert (outputs(segment, states) - expected).abs().max() <= 1e-5 * expected.abs().max()
    if family == "opt":
        assert (segment.masters["final_layer_norm.bias"] == 0).all()
    if family == "falcon-40b":
        assert (segment.masters["ln_mlp.bias"] != 0).any()
    name = f"{segment.spec.balance[0].producer}.weight"
    segment.replace(name, (torch.arange(64) % 2).float() + 0.5 * (not family.startswith("gemma")))
    assert (outputs(segment, states) - expected).abs().max() > 1e-3 * expected.abs().max()


@pytest.mark.parametrize("family", ["gemma2", "gemma3", "opt-post-norm", "bloom"])
def test_oracle_6_families_with_norms_on_the_stream_are_refused(family, tmp_path):
    """6. Gemma2/3 with R1 raises; so do OPT-350m and BLOOM. What still works is said, and is accepted."""
    spec = open_blocks(save_tiny(family, tmp_path), torch.float32).skeleton.spec
    (problem,) = Rotate().refusals(spec)
    assert "cannot be rotated exactly" in problem.reason and "residual = false" in problem.fix
    assert not list(Rotate(residual=False).refusals(spec))


def test_a_bias_without_a_gain_cannot_move():
    gain, beta = torch.tensor([2.0, 0.0, 0.0]), torch.tensor([1.0, 0.0, 3.0])
    with pytest.raises(ToolkitError, match="1 channels have a bias but gain 0"):
        unscaled_bias(beta, gain, "norm")
    assert torch.equal(unscaled_bias(torch.tensor([1.0, 0.0, 0.0]), gain, "norm"), torch.tensor([0.5, 0.0, 0.0]))


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2", "qwen2"])
def test_oracle_7_values_and_output_turn_together(family, tmp_path, monkeypatch):
    """7. R2 keeps the block with grouped heads and biases; with other rotations on the side of o it breaks."""
    segment, states = open_block(family, tmp_path)
    expected = outputs(segment, states)
    step = Rotate(residual=False, online=False)
    (group,) = (g for g in segment.spec.balance if g.kind == "value")
    step._turn_values(segment, group)
    assert (outputs(segment, states) - expected).abs().max() <= 1e-5 * expected.abs().max()
    heads, o = group.heads, segment.weight(group.consumers[0])
    by_head = o.reshape(o.shape[0], heads.query, heads.width)
    other = make_rotation(heads.width, "orthogonal", 9)(by_head).reshape(o.shape)
    segment.set_weight(group.consumers[0], other)
    assert (outputs(segment, states) - expected).abs().max() > 1e-2 * expected.abs().max()


def test_oracle_9_a_spike_is_spread():
    """9. Spike test: x = c e_i has max |xQ| = |c|/sqrt(d) for any Hadamard Q."""
    for n in (64, 96, 384, 5632):
        x = torch.zeros(3, n, dtype=torch.float64)
        x[torch.arange(3), torch.tensor([0, 7, n - 1])] = torch.tensor([5.0, -1000.0, 2.0]).double()
        expected = x.abs().amax(1) / n**0.5
        assert torch.allclose(make_rotation(n, "hadamard", 0)(x).abs().amax(1), expected, rtol=1e-10)
        assert torch.allclose(hadamard_transform(x, n).abs().amax(1), expected, rtol=1e-10)


def test_oracle_10_twice_is_refused():
    """10. Applying the pass twice raises: its online transforms would no longer fit."""
    (problem,) = check_order((Rotate(), Rotate(seed=1), Rtn()))
    assert "basis twice" in problem.reason
