"""The oracles of round-to-nearest, in float64 against scalar code, with exact scales and with stored ones.

Oracles about the pure grid use ``exact_scale=True``. Where a scale rounded for storage (8 significant bits, relative
error e <= 2^-9) weakens one of them, the test says by how much.
"""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch

from ptq.numerics.bitstream import pack, unpack
from ptq.numerics.integers import dequantize, fake_quantize, grid_parameters, quantize, round_scale
from ptq.scheme import QUANTIZERS, Grouping, QuantScheme, TensorQuant, parse_scheme

torch.set_num_threads(1)
A, B, C, D, E, SIGNED = QUANTIZERS
BITS = [2, 3, 4, 8]
WHOLE = Grouping("channel")
EXACT = pytest.mark.parametrize("exact", [True, False], ids=["exact", "stored"])


tensor = partial(torch.tensor, dtype=torch.float64)


def weights(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def stored(s: float) -> float:
    """8 significant bits, then a multiple of 2^-24 where float16 is subnormal; at least 2^-24."""
    mantissa, exponent = math.frexp(s)
    s = math.ldexp(round(mantissa * 256), exponent - 8)
    return max(round(s * 2**24) / 2**24 if s < 2**-14 else s, 2**-24)


def slow_unit(row: list[float], bits: int, kind: str, exact: bool) -> list[float]:
    """One unit, one scalar at a time, straight from the formulas; Python's round also takes ties to even."""
    n, half, mn, mx = 2**bits - 1, 2 ** (bits - 1), min(row), max(row)
    a = max(abs(v) for v in row)
    keep = (lambda s: s) if exact else stored
    if kind in (A, B):
        if kind == B:
            mn, mx = min(mn, 0.0), max(mx, 0.0)
            mn, mx = (-1.0, 1.0) if mn == mx == 0 else (mn, mx)
        s = keep(max(mx - mn, 1e-5 if kind == A else 0.0) / n)
        z = min(max(-round(mn / s), 0), n)
        return [(min(max(round(v / s) + z, 0), n) - z) * s for v in row]
    if kind == E:
        s, low, high = keep(2 * (a or 1.0) / n), -half, half - 1
    elif kind == SIGNED:
        s, low, high = keep((a or 1.0) / half) * (-1 if mx > -mn else 1), -half, half - 1
    else:
        s, low, high = keep(max(a, 1e-5) / (half - 1)), -half if kind == C else 1 - half, half - 1
    return [min(max(round(v / s), low), high) * s for v in row]


def steps(w: torch.Tensor, quant: TensorQuant, exact: bool) -> torch.Tensor:
    """The step of every weight."""
    units = w.unflatten(-1, (-1, quant.grouping.width(w.shape[-1])))
    return grid_parameters(units, quant, exact_scale=exact)[0].unsqueeze(-1).expand_as(units).flatten(-2)


@EXACT
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("kind", QUANTIZERS)
def test_every_quantizer_against_scalar_code(kind, bits, exact):
    """The table of `ptq.numerics.integers`; the units include all-positive, all-negative, zero and tiny ones."""
    w = weights(16, 24) * torch.logspace(-3, 2, 16, dtype=torch.float64)[:, None]
    w[0], w[1], w[2] = w[0].abs() + 1, -w[1].abs() - 1, 0
    w[3] *= 1e-9
    expected = tensor([slow_unit(r[i : i + 8].tolist(), bits, kind, exact) for r in w for i in (0, 8, 16)])
    found = fake_quantize(w, TensorQuant(bits, Grouping("group", 8), kind), exact_scale=exact)
    assert torch.equal(found, expected.view(16, 24))


def test_stored_scales_are_exact_in_both_half_precisions():
    """Step 3 of the algorithm: scales are rounded before codes, to what bf16 and fp16 both hold, nearest first."""
    s = torch.logspace(-9, 6, 500, dtype=torch.float64)
    r = round_scale(s)
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(r.to(dtype).double(), r)
    assert r.min() == 2**-24 and r.max() == 65280
    inside = (s > 2**-14) & (s < 65280)
    assert ((r - s).abs() <= s * 2**-8)[inside].all()
    assert torch.equal(r[inside], tensor([stored(float(v)) for v in s[inside]]))


@EXACT
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("kind", QUANTIZERS)
def test_oracle_1_error_is_at_most_half_a_step(kind, bits, exact):
    """1. |w - Q(w)| <= s/2 * (1+1e-6) for A whenever mn <= 0 <= mx, for B always, for C/D always; for E except units'
    positive max, for signed steps except where the side away from the largest weight ends. Stored scales: ends of the
    range may also lack N e steps."""
    w = weights(64, 16, seed=bits)
    if kind != A:
        w[:8] = w[:8].abs() + 0.5
        w[8:16] = -w[8:16].abs() - 0.5
    quant = TensorQuant(bits, WHOLE, kind)
    s = steps(w, quant, exact)
    error = (w - fake_quantize(w, quant, exact_scale=exact)).abs()
    allowed = s.abs() * (0.5 + (0 if exact else quant.levels * 2**-8 / (1 - 2**-8))) * (1 + 1e-6)
    inside = w / s < 2 ** (bits - 1) - 1 if kind in (E, SIGNED) else torch.ones_like(w, dtype=torch.bool)
    assert (error <= allowed)[inside].all()
    if kind == E and exact:  # +a lies half a step above the top code
        top = w == w.abs().amax(dim=1, keepdim=True)
        assert top.any() and torch.allclose(error[top], s[top] / 2, rtol=1e-9)


@EXACT
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("kind", [A, B, C, D, SIGNED])
def test_oracle_2_idempotence(kind, bits, exact):
    """2. Q(Q(W)) == Q(W) (1e-6 rel) for A and B (units spanning 0), C, D. E is NOT idempotent in general. Stored
    scales: for every unit that uses both end codes (rounding the scale up may leave the top code unused)."""
    w = weights(200, 16, seed=bits)
    quant = TensorQuant(bits, WHOLE, kind)
    once = fake_quantize(w, quant, exact_scale=exact)
    twice = fake_quantize(once, quant, exact_scale=exact)
    rows = torch.ones(len(w), dtype=torch.bool)
    if not exact:
        s, z = grid_parameters(w, quant)
        codes = quantize(w, s[:, None], None if z is None else z[:, None], quant)
        top = 2 ** (bits - 1) if kind == SIGNED else quant.levels - 2 ** (bits - 1)
        ends = (codes - 2 ** (bits - 1)).abs().amax(1) == top if z is None else codes.aminmax(dim=1).max == quant.levels
        rows = ends if z is None else ends & (codes.amin(1) == 0)
        assert rows.sum() > 50
    assert torch.allclose(twice[rows], once[rows], rtol=1e-6, atol=0)
    assert not torch.allclose(once, w, rtol=1e-3)


def test_the_largest_weight_is_the_lowest_level_of_a_signed_grid():
    """Exactly, where the scale is exact; and no level but those is beyond it."""
    w = weights(200, 16)
    found = fake_quantize(w, TensorQuant(2, WHOLE, SIGNED), exact_scale=True)
    top = w.abs() == w.abs().amax(1, keepdim=True)
    assert (
        torch.allclose(found[top], w[top], rtol=1e-12) and (found.abs() <= w.abs().amax(1, keepdim=True) + 1e-12).all()
    )
    signs = steps(w, TensorQuant(2, WHOLE, SIGNED), True)[top].sign()
    assert torch.equal(signs, -w[top].sign()) and 50 < (signs < 0).sum() < 150
    positive = fake_quantize(w, TensorQuant(2, WHOLE, E), exact_scale=True)
    assert (found - w).square().sum() < 0.9 * (positive - w).square().sum()


def test_oracle_2_sym_gptq_is_not_idempotent():
    """2. E is NOT idempotent in general."""
    w = tensor([[1.0, 0.3, -0.2, 0.1]])
    quant = TensorQuant(4, WHOLE, E)
    once = fake_quantize(w, quant, exact_scale=True)
    assert not torch.allclose(fake_quantize(once, quant, exact_scale=True), once, rtol=1e-3)


@EXACT
@pytest.mark.parametrize("grouping", [WHOLE, Grouping("group", 8)], ids=str)
@pytest.mark.parametrize("kind", QUANTIZERS)
def test_oracle_3_row_scaling(kind, grouping, exact):
    """3. Q(c*W)/c == Q(W) for any positive per-row c (exact for powers of two) as long as no floor is active. Holds
    for per-group and per-row, not for per-tensor."""
    w, quant = weights(12, 32), TensorQuant(4, grouping, kind)
    q = fake_quantize(w, quant, exact_scale=exact)
    c = 2.0 ** torch.arange(-5, 7, dtype=torch.float64)[:, None]
    assert torch.equal(fake_quantize(c * w, quant, exact_scale=exact) / c, q)
    if exact:
        c = weights(12, 1, seed=1).exp()
        codes = w / steps(w, quant, True)
        ties = (codes - codes.floor() - 0.5).abs() < 1e-9  # the ends of every unit of E
        assert kind == E or not ties.any()
        scaled = fake_quantize(c * w, quant, exact_scale=True) / c
        assert torch.allclose(scaled[~ties], q[~ties], rtol=1e-12, atol=0)
        per_tensor = [slow_unit(m.flatten().tolist(), 4, kind, True) for m in (w, c * w)]
        one, scaled = (tensor(p).view_as(w) for p in per_tensor)
        assert not torch.allclose(scaled / c, one, rtol=1e-3)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("kind", [A, C, D, SIGNED])
def test_oracle_4_odd_symmetry(kind, bits):
    """4. Q(-W) == -Q(W) for A, C, D and signed steps (ties aside). With stored scales still for all but A."""
    w, quant = weights(100, 16, seed=bits), TensorQuant(bits, WHOLE, kind)
    for exact in (True, False) if kind != A else (True,):
        q, mirrored = (fake_quantize(v, quant, exact_scale=exact) for v in (w, -w))
        assert torch.equal(mirrored, -q)


@EXACT
@pytest.mark.parametrize("kind", QUANTIZERS)
def test_oracle_5_groupings_agree(kind, exact):
    """5. per-group with g=IC == per-row; per-row with OC=1 == per-tensor; per-IC(W) == per-OC(W^T)^T."""
    w = weights(6, 32)
    row, group = TensorQuant(3, WHOLE, kind), TensorQuant(3, Grouping("group", 32), kind)
    by_row = fake_quantize(w, row, exact_scale=exact)
    assert torch.equal(fake_quantize(w, group, exact_scale=exact), by_row)
    per_tensor = tensor(slow_unit(w[0].tolist(), 3, kind, exact))
    assert torch.equal(fake_quantize(w[:1], row, exact_scale=exact)[0], per_tensor)
    per_ic = torch.stack([tensor(slow_unit(c.tolist(), 3, kind, exact)) for c in w.T], 1)
    assert torch.equal(fake_quantize(w.T, row, exact_scale=exact).T, per_ic)


@EXACT
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("kind", [A, B])
def test_oracle_6_a_matrix_on_the_grid_is_unchanged(kind, bits, exact):
    """6. A matrix already on the grid (integers 0..N minus z, times s, with both end codes present in each unit) is
    unchanged."""
    n, generator = 2**bits - 1, torch.Generator().manual_seed(bits)
    codes = torch.randint(0, n + 1, (20, 16), generator=generator).double()
    codes[:, 0], codes[:, 1] = 0, n
    z = torch.randint(0, n + 1, (20, 1), generator=generator).double()
    s = weights(20, 1, seed=9).exp()
    s = s if exact else round_scale(s)
    w = (codes - z) * s
    found = fake_quantize(w, TensorQuant(bits, WHOLE, kind), exact_scale=exact)
    assert torch.allclose(found, w, rtol=1e-14, atol=0) if exact else torch.equal(found, w)


@EXACT
def test_oracle_7_constant_positive_group(exact):
    """7. Constant positive group: A returns ~1e-5 (documenting the defect), B returns the constant exactly (to the
    scale's own precision where it is stored)."""
    w, precision = torch.full((1, 8), 0.3, dtype=torch.float64), 1e-15 if exact else 2**-8
    a, b = (fake_quantize(w, TensorQuant(4, WHOLE, kind), exact_scale=exact) for kind in (A, B))
    assert torch.allclose(a, torch.full_like(w, 1e-5), rtol=precision if exact else 0.1, atol=0)
    assert torch.allclose(b, w, rtol=precision, atol=0)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("kind", QUANTIZERS)
def test_oracle_8_codes(kind, bits):
    """8. Codes are integers within [lo, hi]; number of distinct values per unit <= 2^b; packing round-trips
    bit-exactly. Also where a clipping bound leaves weights outside the range."""
    w, quant = weights(8, 700) * 3, TensorQuant(bits, WHOLE, kind)
    for clip in (None, w.abs().amax(1) / 2):
        s, z = grid_parameters(w, quant, clip)
        shift = None if z is None else z[:, None]
        codes = quantize(w, s[:, None], shift, quant)
        assert torch.equal(codes, codes.round())
        assert codes.min() >= (1 if kind == D else 0) and codes.max() <= 2**bits - 1
        assert clip is None or codes.max() == 2**bits - 1  # weights beyond the bound take the end code
        assert all(row.unique().numel() <= 2**bits for row in dequantize(codes, s[:, None], shift, quant))
        small = codes.to(torch.uint8)
        assert torch.equal(unpack(pack(small, bits), bits, 700), small)


def test_oracle_8_clipping_bounds_the_range():
    """A clipping bound acts on ranges as clamping the weights does."""
    w, clip = weights(8, 64), weights(8, seed=3).abs() + 0.1
    for kind in QUANTIZERS:
        quant = TensorQuant(4, WHOLE, kind)
        expected = grid_parameters(w.clamp(-clip[:, None], clip[:, None]), quant)
        found = grid_parameters(w, quant, clip)
        assert torch.equal(found[0], expected[0])
        assert (found[1] is None) == quant.symmetric
        assert found[1] is None or torch.equal(found[1], expected[1])


@pytest.mark.parametrize(
    ("text", "width", "expected"),
    [
        ("w4a16-g128-asym", 4096, 4 + 20 / 128),
        ("w4a16-g128-sym", 4096, 4 + 16 / 128),
        ("w4a16-g64-asym", 4096, 4.3125),
        ("w4a16-g32-asym", 4096, 4.625),
        ("w3a16-g128-asym", 4096, 3.1484375),
        ("w2a16-g64-asym", 4096, 2.28125),
        ("w4a16-gchannel-asym", 4096, 4 + 20 / 4096),
    ],
)
def test_oracle_9_bits_per_weight(text, width, expected):
    """9. bpw table reproduced to 1e-12 (its row with fp16 zero points is not on offer), and +32/OC for an index."""
    scheme = parse_scheme(text)
    assert abs(scheme.bits_per_weight(1024, width) - expected) <= 1e-12
    assert abs(scheme.bits_per_weight(1024, width, reordered=True) - expected - 32 / 1024) <= 1e-12


def test_oracle_10_tokens_do_not_mix():
    """10. Per-token: permuting tokens permutes outputs; multiplying one token by 10 leaves every other token's codes
    unchanged."""
    x, quant = weights(9, 32), QuantScheme(TensorQuant(8, WHOLE, D)).weights
    q = fake_quantize(x, quant)
    perm = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    assert torch.equal(fake_quantize(x[perm], quant), q[perm])
    louder = x.clone()
    louder[4] *= 10
    others = torch.arange(9) != 4
    changed = fake_quantize(louder, quant)
    assert torch.equal(changed[others], q[others]) and not torch.equal(changed[4], q[4])
