"""The oracles of LoRC and its activation-aware successors, against the published formulas in float64."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from test_statistics import Q, new_context, open_block, scheme

from calibration.walk.statistics import Gram
from ptq.committed import encode_segment
from ptq.methods import METHODS, Gptq, Lorc, Rtn
from ptq.numerics.lowrank import factor_bits, factor_product, low_rank, quantize_factors
from ptq.numerics.objective import output_energy
from ptq.quantized import QuantizedTensor

torch.set_num_threads(1)
OUT, IN, M = 24, 32, 5


def problem(seed: int = 0, tokens: int = 400) -> tuple[torch.Tensor, torch.Tensor]:
    """An error E ``[24, 32]`` and correlated inputs X ``[tokens, 32]`` of uneven size."""
    generator = torch.Generator().manual_seed(seed)
    e = torch.randn(OUT, IN, generator=generator, dtype=torch.float64)
    mix = torch.randn(IN, IN, generator=generator, dtype=torch.float64)
    x = torch.randn(tokens, IN, generator=generator, dtype=torch.float64) @ mix
    return e, x * torch.randn(IN, generator=generator, dtype=torch.float64).exp()


def published(e: torch.Tensor, s: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """P_m Σ_m R_mᵀ S⁻¹ from the SVD of E S, and all singular values."""
    p, sigma, r = torch.linalg.svd(e @ s, full_matrices=False)
    return p[:, :rank] * sigma[:rank] @ r[:rank] @ torch.linalg.inv(s), sigma


def symmetric_root(g: torch.Tensor) -> torch.Tensor:
    values, vectors = torch.linalg.eigh(g)
    return vectors * values.clamp(min=0).sqrt() @ vectors.T


def product(factors: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return factors[0] @ factors[1]


def left_over(e: torch.Tensor, g: torch.Tensor | None, rank: int, by: torch.Tensor | None) -> float:
    """J in the norm of ``by`` of what remains after a correction that was chosen with ``g``."""
    rest = e - product(low_rank(e, rank, g)) if rank else e
    return float(output_energy(rest, torch.eye(IN, dtype=e.dtype) if by is None else by))


def test_plain_error_is_the_tail_of_the_spectrum():
    e, _ = problem()
    sigma = torch.linalg.svdvals(e)
    for rank in (1, 3, M, OUT - 1):
        assert left_over(e, None, rank, None) == pytest.approx(float(sigma[rank:].square().sum()), rel=1e-5)


def test_full_rank_is_exact_and_no_rank_is_not_lorc():
    e, x = problem()
    for g in (None, (x.T @ x).diagonal(), x.T @ x):
        assert (product(low_rank(e, OUT, g)) - e).abs().max() < 1e-10
        assert (product(low_rank(e.T.contiguous(), OUT, None)) - e.T).abs().max() < 1e-10


def test_factors_are_orthogonal():
    """The balanced split U √σ, √σ Vᵀ is ours with the strengths moved: Bᵀ B = 1 and A Aᵀ = diag(σ²)."""
    e = torch.diag(torch.arange(IN, 0, -1, dtype=torch.float64))[:OUT]  # a spectrum with gaps: vectors are unique
    b, a = low_rank(e, M, None)
    assert torch.allclose(b.T @ b, torch.eye(M, dtype=torch.float64), atol=1e-10)
    assert torch.allclose(a @ a.T, torch.diag(torch.linalg.svdvals(e)[:M] ** 2), atol=1e-2)


@pytest.mark.parametrize("weighting", ["none", "diagonal", "gram"])
def test_error_falls_with_the_rank(weighting):
    e, x = problem()
    g = {"none": None, "diagonal": (x.T @ x).diagonal(), "gram": x.T @ x}[weighting]
    norm = torch.diag(g) if g is not None and g.ndim == 1 else g
    errors = [left_over(e, g, rank, norm) for rank in range(OUT + 1)]
    assert all(after <= before * (1 + 1e-6) for before, after in pairwise(errors))
    assert errors[-1] <= 1e-12 * errors[0]


def test_identity_is_lorc_and_the_size_of_s_does_not_matter():
    e, x = problem()
    plain = product(low_rank(e, M, None))
    assert torch.allclose(product(low_rank(e, M, torch.eye(IN, dtype=e.dtype))), plain, atol=1e-6)
    assert torch.allclose(product(low_rank(e, M, torch.ones(IN, dtype=e.dtype))), plain, atol=1e-6)
    g = x.T @ x
    assert torch.allclose(product(low_rank(e, M, 7.3 * g)), product(low_rank(e, M, g)), atol=1e-5)


def test_gram_is_optimal_and_equals_qera_exact_and_eora():
    e, x = problem()
    g = x.T @ x
    root = symmetric_root(g)
    values, vectors = torch.linalg.eigh(g)
    exact, sigma = published(e, root, M)
    eora, _ = published(e, vectors * values.sqrt(), M)
    rms, _ = published(e, torch.diag(g.diagonal().sqrt()), M)
    l2qer, _ = published(e, torch.diag(x.abs().mean(0)), M)
    assert (exact - eora).abs().max() < 1e-8 * exact.abs().max()
    ours = left_over(e, g, M, g)
    assert ours == pytest.approx(float(sigma[M:].square().sum()), rel=1e-5)
    for other in (rms, l2qer, published(e, torch.eye(IN, dtype=e.dtype), M)[0], torch.zeros_like(e)):
        assert ours < float(output_energy(e - other, g))
    assert left_over(e, g.diagonal(), M, g) == pytest.approx(float(output_energy(e - rms, g)), rel=1e-3)


def test_a_gap_makes_the_product_itself_equal():
    """Where the spectrum has a gap behind rank m, not only the error but Ê is the published one."""
    e, x = problem()
    g = x.T @ x
    root = symmetric_root(g)
    p, sigma, r = torch.linalg.svd(e @ root, full_matrices=False)
    sigma[M:] *= 0.01
    e = p * sigma @ r @ torch.linalg.inv(root)
    exact, _ = published(e, root, M)
    assert torch.allclose(product(low_rank(e, M, g)), exact, atol=1e-8 * float(exact.abs().max()))


@pytest.mark.parametrize("tokens", [400, 12])
def test_dead_channels_stay_zero(tokens):
    """No garbage from a singular G: fewer tokens than inputs, and an input that is always 0."""
    e, x = problem(tokens=tokens)
    x[:, 3] = 0
    factors = low_rank(e, M, x.T @ x)
    assert (product(factors)[:, 3] == 0).all() and torch.isfinite(product(factors)).all()
    assert product(factors).abs().max() < 10 * e.abs().max()


def test_a_weight_on_the_grid_needs_no_correction():
    for bits in (8, 16):
        b, a, scale = quantize_factors(*low_rank(torch.zeros(OUT, IN), M, None), bits)
        assert torch.isfinite(scale).all() and (factor_product(b, a, scale) == 0).all()


def test_factor_precision():
    """8 bits per component change Ê by less than 2 %, 16 bits by less than 0.1 %; also where Ê is tiny."""
    generator = torch.Generator().manual_seed(1)
    b, a = torch.randn(64, 8, generator=generator), torch.randn(8, 96, generator=generator)
    for size in (1.0, 1e-12):
        for bits, most in ((8, 0.02), (16, 0.001)):
            stored = quantize_factors(b, size * a, bits)
            error = (factor_product(*stored) - size * b @ a).norm() / (size * b @ a).norm()
            assert error < most
            assert stored[0].dtype == stored[1].dtype == (torch.int8 if bits == 8 else torch.float16)
            assert 8 * sum(t.nbytes for t in stored) == factor_bits(64, 96, 8, bits)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize("weighting", ["gram", "none"])
def test_a_block_is_repaired(family, weighting, tmp_path):
    """Weight = codes + low rank, in the segment and in the file; the correction follows the original weight."""
    segment, states = open_block(family, tmp_path, scheme=scheme(2))
    segment.keep_originals = True
    before = {name: segment.weight(name).clone() for name in segment.schemes}
    context = new_context(segment, states, kinds=(Gram,), allow_unseen=True)
    Gptq().apply(segment, context)
    plain = {name: segment.errors[name]["output" if weighting == "gram" else "weight"] for name in segment.schemes}
    Lorc(rank=4, weighting=weighting).apply(segment, context)
    stored = encode_segment(segment)
    for name, w in before.items():
        assert torch.equal(segment.original(name), w)
        q = segment.quantized[name]
        whole = QuantizedTensor(q.codes, q.scale, q.zero, q.scheme, q.group_index, segment.parts[name])
        assert torch.equal(segment.weight(name), whole.dequantize())
        assert segment.errors[name]["output" if weighting == "gram" else "weight"] < plain[name]
        assert stored[segment.full_name(name) + ".lora_a"].shape == (4, w.shape[1])
        assert whole.bits_per_weight() > q.bits_per_weight()


def test_lorc_beats_the_plain_method(tmp_path):
    """Useful: the data-free one lowers the error of RTN's weights, the weighted one the output error of both."""
    for base in (Rtn(), Gptq()):
        errors = {}
        for weighting in ("gram", "diagonal", "none"):
            segment, states = open_block("llama", tmp_path / f"{base.name}-{weighting}", scheme=scheme(3))
            segment.keep_originals = True
            context = new_context(segment, states, kinds=(Gram,))
            base.apply(segment, context)
            plain = dict(segment.errors[Q])
            Lorc(rank=6, weighting=weighting).apply(segment, context)
            errors[weighting] = segment.errors[Q]
        assert errors["none"]["weight"] < plain["weight"]
        assert errors["gram"]["output"] < errors["diagonal"]["output"] < plain["output"]
        assert errors["gram"]["output"] < errors["none"]["output"]


def test_data_free_where_nothing_asks_for_data():
    assert Lorc(weighting="none").stream == "none" and Lorc(weighting="none").statistics == ()
    assert METHODS["lorc"]().stream == "either"
