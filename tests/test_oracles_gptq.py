"""The oracles of GPTQ, in float64 against the naive method: explicit inverse, one elimination step per column.

Scales are rounded to their storage precision here as in every run: the oracles hold on whatever grid is used.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from test_statistics import DOWN, K, Q, V, new_context, open_block, scheme
from test_statistics import OUT as O_PROJ

from calibration.walk.statistics import Gram
from ptq.methods.gptq import Gptq
from ptq.methods.rtn import round_to_nearest
from ptq.numerics.gptq import Rounded, column_order, gptq_round, inverse_factor
from ptq.numerics.grids import grid_of
from ptq.numerics.integers import fake_quantize, grid_parameters, quantize, round_scale
from ptq.scheme import Grouping, QuantScheme, TensorQuant

torch.set_num_threads(1)
OUT, IN, G = 6, 48, 8
EYE = torch.eye(IN, dtype=torch.float64)
ROW, GROUP = Grouping("channel"), Grouping("group", G)
ORDERS = ["natural", "activation", "group"]
CASES = [  # grouping, order, static groups
    *[(ROW, order, False) for order in ORDERS],
    *[(GROUP, order, static) for order in ORDERS for static in (False, True)],
]
EVERY_CASE = pytest.mark.parametrize(
    ("grouping", "order", "static"), CASES, ids=[f"{g}-{o}-{'static' if s else 'dynamic'}" for g, o, s in CASES]
)


def problem(seed: int = 0, tokens: int = 100) -> tuple[torch.Tensor, torch.Tensor]:
    """W ``[6, 48]`` and the Gram matrix of correlated inputs of uneven size."""
    randn = partial(torch.randn, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    w, x = randn(OUT, IN), randn(tokens, IN) @ (EYE + 1.5 * randn(IN, IN) / IN**0.5)
    x *= randn(IN).exp()
    return w, x.T @ x


def values(r: Rounded, quant: TensorQuant) -> torch.Tensor:
    """Q in float64 from codes, scales and zeros."""
    index = torch.arange(r.codes.shape[1]) // quant.grouping.width(r.codes.shape[1])
    index = index if r.group_index is None else r.group_index.long()
    zero = 2 ** (quant.bits - 1) if r.zero is None else r.zero[:, index]
    return (r.codes.double() - zero) * r.scale[:, index]


def slow_order(diagonal: list[float], order: str, width: int) -> list[int]:
    falling = sorted(range(len(diagonal)), key=lambda j: -diagonal[j])  # Python's sort keeps ties in order
    if order == "natural":
        return list(range(len(diagonal)))
    if order == "activation":
        return falling
    groups = list(dict.fromkeys(j // width for j in falling))  # by their largest entry
    return [j for group in groups for j in falling if j // width == group]


def naive(w, h, quant, damping=0.01, order="natural", static=False, clip=None, grids=None, ridge=None, stale=0):
    """Algorithm 1 without its tricks; columns stay where they are, whatever the order they are visited in.

    Args:
        grids: (scale, zero) per column instead of those of ``quant``; ridge: lambda itself instead of ``damping``.
        stale: take the grids of dynamic groups from the weights as they were at the last multiple of so many columns.

    Returns:
        Q, the loss, the scale of every column.
    """
    dead = h.diagonal() == 0
    h, original, width = h + torch.diag(dead.double()), w, quant.grouping.width(w.shape[1])
    w = w.clone() * ~dead
    ridge = damping * h.diagonal().mean() if ridge is None else ridge
    inverse = torch.linalg.inv(h + ridge * torch.eye(len(h), dtype=h.dtype))
    visits = slow_order(h.diagonal().tolist(), order, width)
    fixed = static or width == w.shape[1]
    runs = order == "activation" and not fixed  # groups are runs of visited columns
    q, scales, loss, seen = torch.zeros_like(w), torch.zeros_like(w), 0.0, {}
    for position, j in enumerate(visits):
        if stale and position % stale == 0:
            before = w.clone()
        group = position // width if runs else j // width
        if group not in seen:
            members = visits[position : position + width] if runs else range(group * width, group * width + width)
            source = original if fixed else before if stale else w
            bound = None if clip is None or runs else clip[:, group]
            seen[group] = grid_parameters(source[:, list(members)], quant, bound)
        s, z = seen[group] if grids is None else (grids[0][:, j], grids[1][:, j])
        shift = 2 ** (quant.bits - 1) if z is None else z
        q[:, j], scales[:, j] = (quantize(w[:, j], s, z, quant) - shift) * s, s
        error = (w[:, j] - q[:, j]) / inverse[j, j]
        w -= torch.outer(error, inverse[j])
        loss += float((error**2 * inverse[j, j]).sum())
        inverse = inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return q, loss, scales


@EVERY_CASE
@pytest.mark.parametrize("kind", ["asym_minmax", "asym_zero_in", "sym_full", "sym_restricted", "sym_gptq"])
def test_oracle_8_equals_the_naive_method(kind, grouping, order, static):
    """8. Equivalence with the naive method (explicit inverse, Gaussian elimination of one row/column per step) to 1e-8
    fp64. On its own grids and on grids that were chosen (here within clipping bounds), which no update changes; inputs
    are not modified."""
    quant = TensorQuant(3, grouping, kind)
    for seed in (0, 1):
        w, h = problem(seed)
        copies = w.clone(), h.clone()
        bounds = 0.6 * w.abs().unflatten(1, (-1, quant.grouping.width(IN))).amax(2)
        for clip in (None, bounds):
            grid, fixed = None if clip is None else grid_of(w, quant, clip), static or clip is not None
            r = gptq_round(w, h, quant, order=order, static_groups=static, block_size=16, grid=grid)
            q, loss, scales = naive(w, h, quant, order=order, static=fixed, clip=clip)
            assert torch.allclose(values(r, quant), q, rtol=0, atol=1e-8)
            assert r.loss == pytest.approx(loss, rel=1e-8)
            assert r.scale.unique().equal(scales.unique()) and r.scale.shape == (OUT, grouping.count(IN))
            assert (r.group_index is not None) == (order == "activation" and grouping == GROUP and not fixed)
            assert grid is None or torch.equal(r.scale, grid.scale)
        assert torch.equal(w, copies[0]) and torch.equal(h, copies[1])


@EVERY_CASE
def test_oracle_1_diagonal_hessian_is_rtn(grouping, order, static):
    """1. Diagonal H (incl. identity): GPTQ output == RTN with the same grids, exactly."""
    w, h = problem()
    scheme = QuantScheme(TensorQuant(4, grouping, "asym_zero_in"))
    rtn = round_to_nearest(w, scheme)
    for diagonal in (torch.ones(IN, dtype=torch.float64), h.diagonal()):
        r = gptq_round(w, torch.diag(diagonal), scheme.weights, order=order, static_groups=static)
        if r.group_index is None:
            assert torch.equal(r.codes, rtn.codes) and torch.equal(r.scale.float(), rtn.scale)
            assert torch.equal(r.zero.to(torch.uint8), rtn.zero)
        else:  # the same grids are those of runs of reordered columns
            perm = torch.tensor(slow_order(diagonal.tolist(), order, G))
            assert torch.equal(values(r, scheme.weights)[:, perm], fake_quantize(w[:, perm], scheme.weights))


@EVERY_CASE
def test_oracle_2_block_size_invariance(grouping, order, static):
    """2. Block size invariance: B in {1, 7, 32, IC} give the same Q (fixed or static grids, or groups with fresh
    params), <= 1e-10 fp64."""
    (w, h), quant = problem(), TensorQuant(3, grouping, "sym_gptq")
    one, *others = (
        gptq_round(w, h, quant, order=order, static_groups=static, block_size=b) for b in (1, 7, 32, IN, 128)
    )
    for other in others:
        assert (values(other, quant) - values(one, quant)).abs().max() <= 1e-10
        assert other.loss == pytest.approx(one.loss, rel=1e-10)


@EVERY_CASE
def test_oracle_3_multiples_of_the_hessian(grouping, order, static):
    """3. H -> c*H leaves Q unchanged."""
    (w, h), quant = problem(), TensorQuant(3, grouping, "asym_zero_in")
    one, *others = (
        gptq_round(w, c * h, quant, order=order, static_groups=static) for c in (1.0, 2.0**-20, 2.0**20, 3.7)
    )
    assert all(torch.equal(values(other, quant), values(one, quant)) for other in others)


@EVERY_CASE
def test_oracle_4_loss_identity(grouping, order, static):
    """4. Loss identity: sum e^2 == tr(dW (H+lambda I) dW^T), rel 1e-9 in fp64, for every ordering."""
    (w, h), quant = problem(), TensorQuant(3, grouping, "sym_gptq")
    r = gptq_round(w, h, quant, order=order, static_groups=static, damping=0.05, block_size=16)
    d = w - values(r, quant)
    damped = h + 0.05 * h.diagonal().mean() * EYE
    assert r.loss == pytest.approx(float(torch.trace(d @ damped @ d.T)), rel=1e-9)


@EVERY_CASE
def test_oracle_5_beats_rounding_to_nearest(grouping, order, static):
    """5. Correlated inputs: tr(dW H dW^T) for GPTQ < RTN summed over rows (typically 2x or more at 3 bits)."""
    quant, found, rtn = TensorQuant(3, grouping, "asym_zero_in"), 0.0, 0.0
    for seed in range(4):
        w, h = problem(seed)
        d = values(gptq_round(w, h, quant, order=order, static_groups=static), quant) - w
        n = fake_quantize(w, quant) - w
        found, rtn = found + float(((d @ h) * d).sum()), rtn + float(((n @ h) * n).sum())
    assert found < 0.8 * rtn


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("grouping", [ROW, GROUP], ids=str)
def test_oracle_6_weights_on_the_grid_stay(grouping, order):
    """6. W already on its fixed grid: Q == W, loss 0."""
    _, h = problem()
    generator, n_groups = torch.Generator().manual_seed(0), grouping.count(IN)
    codes = torch.randint(0, 16, (OUT, n_groups, IN // n_groups), generator=generator).double()
    codes[..., 0], codes[..., 1] = 0, 15
    s = round_scale(torch.rand(OUT, n_groups, 1, generator=generator, dtype=torch.float64) + 0.1)
    w = ((codes - 6) * s).flatten(1)
    quant = TensorQuant(4, grouping, "asym_zero_in")
    r = gptq_round(w, h, quant, order=order, static_groups=True)
    assert torch.equal(values(r, quant), w) and r.loss == 0


def test_oracle_7_permuting_columns():
    """7. Ungrouped: permuting input columns of W and H together permutes Q accordingly when act-order is on and
    diag(H) has no ties. (In natural order it does not.)"""
    (w, h), quant = problem(), TensorQuant(3, ROW, "sym_gptq")
    perm = torch.randperm(IN, generator=torch.Generator().manual_seed(1))

    def both(order):
        q = values(gptq_round(w, h, quant, order=order), quant)
        return q[:, perm], values(gptq_round(w[:, perm], h[perm][:, perm], quant, order=order), quant)

    assert torch.allclose(*both("activation"), rtol=0, atol=1e-12)
    assert not torch.allclose(*both("natural"), rtol=1e-3)


def test_oracle_9_groups_inside_a_block_see_fresh_weights():
    """9. Dynamic groups: (B=128, fresh params) == (B=g); (B=128, stale params) differs."""
    (w, h), quant = problem(), TensorQuant(3, GROUP, "asym_zero_in")
    large, small = (values(gptq_round(w, h, quant, block_size=b), quant) for b in (128, G))
    assert torch.equal(large, small)
    assert torch.allclose(naive(w, h, quant, stale=G)[0], small, rtol=0, atol=1e-8)
    assert not torch.allclose(naive(w, h, quant, stale=128)[0], large, rtol=1e-3)


@EVERY_CASE
@pytest.mark.parametrize("kind", ["asym_minmax", "asym_zero_in", "sym_gptq"])
def test_oracle_10_dead_column(kind, grouping, order, static):
    """10. Dead column: result finite, that column of Q is exactly 0, and the other columns equal those obtained by
    deleting the column while keeping the same grids and the same lambda (the dead entry, set to 1, does enter mean(diag
    H))."""
    (w, h), quant, dead = problem(), TensorQuant(3, grouping, kind), 13
    w[:, dead] = 5  # would widen the grid of its group where grids are fixed
    h[dead], h[:, dead] = 0, 0
    r = gptq_round(w, h, quant, order=order, static_groups=static)
    q = values(r, quant)
    assert torch.isfinite(q).all() and (q[:, dead] == 0).all()
    index = torch.arange(IN) // grouping.width(IN) if r.group_index is None else r.group_index.long()
    zero = torch.full_like(r.scale, 4) if r.zero is None else r.zero
    left = torch.arange(IN) != dead
    filled = h.diagonal() + ~left
    ridge = 0.01 * filled.mean()
    visits = [j for j in slow_order(filled.tolist(), order, grouping.width(IN)) if j != dead]
    shorter = torch.tensor([j - (j > dead) for j in visits])  # the order of the columns that are left
    w_left, h_left = w[:, left][:, shorter], h[left][:, left][shorter][:, shorter]
    grids = r.scale[:, index][:, left][:, shorter], zero[:, index][:, left][:, shorter]
    expected, loss, _ = naive(w_left, h_left, TensorQuant(3, ROW, kind), grids=grids, ridge=ridge)
    assert torch.allclose(q[:, left][:, shorter], expected, rtol=0, atol=1e-8)
    assert r.loss == pytest.approx(loss, rel=1e-8)


def test_factor_of_the_inverse():
    """U is upper triangular and U^T U = (H + d I)^-1; a singular H gets more damping, and says how much."""
    _, h = problem()
    u, damping = inverse_factor(h, 0.01)
    assert damping == 0.01 and torch.equal(u, u.triu()) and (u.diagonal() > 0).all()
    damped = h + 0.01 * h.diagonal().mean() * EYE
    assert torch.allclose(u.T @ u @ damped, EYE, rtol=0, atol=1e-10)
    order, diagonal = torch.randperm(len(h), generator=torch.Generator().manual_seed(0)), 2 * h.diagonal()
    other = h.clone()
    other.diagonal().copy_(diagonal)
    expected = inverse_factor(other[order][:, order], 0.01)[0]
    assert torch.equal(inverse_factor(h, 0.01, order, diagonal)[0], expected)
    _, damping = inverse_factor(torch.ones(4, 4) - 0.01 * torch.eye(4), 1e-4)  # smallest eigenvalue -0.01
    assert 0.01 < damping <= 0.1


@pytest.mark.parametrize("order", ORDERS)
def test_column_orders_are_permutations_with_stable_ties(order):
    diagonal = torch.tensor([1.0, 3, 3, 2, 9, 1, 1, 9])
    found = column_order(diagonal, order, 4)
    expected = {"natural": range(8), "activation": [4, 7, 1, 2, 3, 0, 5, 6], "group": [4, 7, 5, 6, 1, 2, 3, 0]}
    assert found.tolist() == list(expected[order]) == slow_order(diagonal.tolist(), order, 4)


@pytest.mark.parametrize("settings", [{}, {"damping": 0.0}, {"damping": 1.0}, {"block_size": 0}], ids=str)
def test_settings_are_checked(settings):
    assert [p.subject for p in Gptq(**settings).check(None)] == [f"gptq.{name}" for name in settings]


@torch.no_grad()
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("order", ORDERS)
def test_linears_that_share_an_input_are_rounded_as_if_alone(order, static, tmp_path):
    """q/k/v are stacked, with a scheme of its own for k and a chosen grid for v alone: each equals its own loop. Where
    files need a column index, the grid that was chosen has one as well."""
    segment, states = open_block("llama", tmp_path, scheme=scheme(3))
    segment.schemes[K] = scheme(4)
    start = {n: segment.weight(n).clone() for n in (Q, K, V)}
    chosen = grid_of(start[V], segment.schemes[V].weights, 0.7 * start[V].unflatten(1, (-1, 16)).abs().amax(2))
    segment.grids[V] = chosen
    context = new_context(segment, states, kinds=(Gram,))
    gram = context.statistic(Q, Gram).matrix
    Gptq(order=order, static_groups=static, damping=0.02).apply(segment, context)
    for n, w in start.items():
        quant = segment.schemes[n].weights
        grid = chosen if n == V else None
        alone = gptq_round(w, gram, quant, damping=0.02, order=order, static_groups=static, grid=grid)
        q = segment.quantized[n]
        assert torch.equal(q.codes, alone.codes) and torch.equal(q.scale, alone.scale)
        assert (q.group_index is not None) == (order == "activation" and not static)
        assert torch.allclose(segment.weight(n).double(), values(alone, quant), rtol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("sequential", [False, True])
def test_true_sequential_sees_rounded_stages(sequential, tmp_path):
    """Each stage's Gram is that of the block whose earlier stages are rounded, or else of the float block."""
    segment, states = open_block("llama", tmp_path, scheme=scheme(3))
    context, names = new_context(segment, states, kinds=(Gram,)), (Q, O_PROJ, "mlp.up_proj", DOWN)
    before = {n: new_context(segment, states).statistic(n, Gram).matrix for n in names}
    Gptq(true_sequential=sequential).apply(segment, context)
    after = {n: new_context(segment, states).statistic(n, Gram).matrix for n in names}
    for n in names:
        used = context.statistic(n, Gram).matrix
        assert torch.equal(used, after[n] if sequential else before[n])
        assert torch.equal(before[n], after[n]) == (n == Q)
