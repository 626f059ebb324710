"""HQQ against its equations (Badri & Shaji 2023), a brute force, and the passes that round on what it chose."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from test_statistics import new_context, open_block, scheme
from tiny_runs import quantize, tiny_checkpoint

from calibration.errors import PlanError
from calibration.walk.statistics import Gram
from ptq.formats.registry import FORMATS
from ptq.methods import Gptq, Hqq, Rtn
from ptq.methods.rtn import round_to_nearest
from ptq.numerics.grids import Grid, grid_of, round_to_grid
from ptq.numerics.groups import split
from ptq.numerics.hqq import HalfQuadratic, half_quadratic, norm_errors, refit, shrink
from ptq.numerics.integers import round_scale
from ptq.runtime.linear import QuantLinear
from ptq.scheme import parse_scheme

SCHEMES = (
    "w4a16-g32-sym",
    "w3a16-g32-asym",
    "w2a16-g32-asym_minmax",
    "w3a16-ic32-sym_full",
    "w3a16-gchannel-asym",
    "w3a16-g32-asym_float",
)
UP = "mlp.up_proj"


def outlying(rows: int = 64, columns: int = 64, seed: int = 0) -> torch.Tensor:
    """Weights of the size of a language model's, some of them outliers."""
    generator = torch.Generator().manual_seed(seed)
    w = 0.05 * torch.randn(rows, columns, generator=generator)
    w[torch.rand(rows, columns, generator=generator) < 0.02] *= 5
    return w


def test_shrinkage():
    """Soft thresholding for p = 1; for p < 1 the published formula, which vanishes below beta^(-1 / (2 - p))."""
    x = torch.linspace(-2, 2, 401, dtype=torch.float64)
    soft = torch.sign(x) * (x.abs() - 0.25).clamp(min=0)
    assert torch.allclose(shrink(x, 4.0, 1.0), soft)
    found, threshold = shrink(x, 10.0, 0.7), 10 ** (-1 / 1.3)
    assert 0.16 < threshold < 0.18 and bool(((found == 0) == (x.abs() <= threshold)).all())
    assert float(shrink(torch.tensor(1.5), 10.0, 0.7)) == pytest.approx(1.5 - 1.5**-0.3 / 10)
    assert torch.equal(found, -found.flip(0))


@pytest.mark.parametrize("norm", [0.5, 1.0])
def test_shrinkage_minimizes_its_part_of_the_objective(norm):
    """beta/2 (e - x)^2 + |e|^p / p: exactly for p = 1, and nearly so for p < 1 where the error is large."""
    grid = torch.linspace(-4, 4, 80001, dtype=torch.float64)
    for x in (0.3, 2.0, -3.0) if norm == 1 else (2.0, -3.0):
        cost = grid.abs().pow(norm) / norm + 5 * (grid - x).square()
        best = grid[cost.argmin()]
        assert float(shrink(torch.tensor(x, dtype=torch.float64), 10.0, norm)) == pytest.approx(float(best), abs=2e-2)


@pytest.mark.parametrize("text", ["w3a16-g32-asym", "w3a16-g32-sym"])
def test_refit_is_the_least_squares_grid(text):
    """The zero points, then the steps, at which the derivatives of the squared distance vanish."""
    quant, w = parse_scheme(text).weights, outlying().double()
    units, grid = split(w, quant.grouping), grid_of(w, quant)
    shift = 4.0 if grid.zero is None else grid.zero.unsqueeze(-1)
    codes = ((units / grid.scale.unsqueeze(-1)).round() + shift).clamp(0, 7)
    scale, zero = refit(units, codes, grid.scale, grid.zero, quant, steps=True)
    z = torch.tensor(4.0).double() if zero is None else zero.unsqueeze(-1)
    assert (((codes - z) * (units - (codes - z) * scale.unsqueeze(-1))).sum(-1)).abs().max() < 1e-12
    if grid.zero is not None:
        assert ((units - (codes - z) * grid.scale.unsqueeze(-1)).sum(-1)).abs().max() < 1e-12
        kept, published = refit(units, codes, grid.scale, grid.zero, quant, steps=False)
        assert kept is grid.scale and torch.equal(published, zero)


@pytest.mark.parametrize("text", SCHEMES)
def test_no_group_gets_worse_and_more_iterations_never_hurt(text):
    """In the p-norm, group by group; rounding to nearest is beaten on the whole. Grids are as files hold them."""
    quant, w = parse_scheme(text).weights, outlying()
    start, units = grid_of(w, quant), split(w, quant.grouping)
    before = norm_errors(units, start, quant, 0.7)
    for iterations in (0, 1, 5, 20):
        settings = HalfQuadratic(iterations=iterations, steps=not quant.float_zeros)
        grid = half_quadratic(w, quant, start, settings)
        errors = norm_errors(units, grid, quant, 0.7)
        assert bool((errors <= before).all())
        before = errors
        assert torch.equal(grid.scale, round_scale(grid.scale)) and grid.scale.shape == start.scale.shape
        if grid.zero is not None:
            stored = grid.zero.half().float() if quant.float_zeros else grid.zero.round()
            assert torch.equal(grid.zero, stored.clamp(0, quant.levels))
            assert not quant.float_zeros or torch.equal(grid.scale, start.scale)
    assert float(before.sum()) < 0.985 * float(norm_errors(units, start, quant, 0.7).sum())
    assert torch.equal(half_quadratic(w, quant, start, HalfQuadratic(iterations=0)).scale, start.scale)


def test_towards_the_brute_force():
    """All zero points and a fine sweep of steps for a few groups: a descent from the ranges gets a good part of the way
    where outliers have stretched them, and nothing is below the sweep."""
    quant, w = parse_scheme("w2a16-gchannel-asym").weights, outlying(8, 32)
    start, units = grid_of(w, quant), split(w, quant.grouping)
    best = torch.full((8, 1), torch.inf)
    for share, zero in itertools.product(torch.linspace(0.3, 1.2, 181), range(4)):
        grid = Grid(round_scale(start.scale * share), torch.full_like(start.scale, zero))
        best = torch.minimum(best, norm_errors(units, grid, quant, 0.7))
    plain = float(norm_errors(units, start, quant, 0.7).sum())
    grid = half_quadratic(w, quant, start, HalfQuadratic(steps=True))
    found = float(norm_errors(units, grid, quant, 0.7).sum())
    assert float(best.sum()) <= found + 1e-6 and plain - found > 0.4 * (plain - float(best.sum()))


def test_integer_zero_points_do_not_move():
    """Which is why the pass refuses them without refitted steps: the published optimum lies within half a level."""
    w = outlying()
    for bits in (3, 4):
        quant = parse_scheme(f"w{bits}a16-g32-asym").weights
        start = grid_of(w, quant)
        found = half_quadratic(w, quant, start, HalfQuadratic())
        assert torch.equal(found.scale, start.scale) and (found.zero != start.zero).float().mean() < 0.01


def test_chunks_of_rows_change_nothing(monkeypatch):
    for text in SCHEMES:
        quant, w = parse_scheme(text).weights, outlying()
        whole = half_quadratic(w, quant, grid_of(w, quant), HalfQuadratic(iterations=1, steps=True))
        monkeypatch.setattr("ptq.numerics.objective.ROW_BYTES", 1)
        parts = half_quadratic(w, quant, grid_of(w, quant), HalfQuadratic(iterations=1, steps=True))
        monkeypatch.undo()
        assert torch.equal(whole.scale, parts.scale)


@torch.no_grad()
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("kind", ["asym_zero_in", "asym_float", "sym_gptq"])
def test_rounding_keeps_the_chosen_grid(kind, static, tmp_path):
    """RTN and GPTQ round on it to the last bit of scale and zero point, stacked q, k, v included; it goes with the
    weight: a grid of an edited weight is forgotten."""
    planned = scheme(3, kind=kind)
    for rounding in (Rtn(), Gptq(static_groups=static, order="natural")):
        segment, states = open_block("llama", tmp_path / f"{rounding.name}{static}", scheme=planned)
        context = new_context(segment, states, kinds=(Gram,))
        Hqq(steps=True).apply(segment, context)
        chosen, weights = dict(segment.grids), {n: segment.weight(n).clone() for n in segment.schemes}
        assert set(chosen) == set(segment.schemes) and segment.edits == 0
        segment.set_weight(UP, segment.weight(UP) * 2)
        assert UP not in segment.grids and len(segment.grids) == len(chosen) - 1
        rounding.apply(segment, context)
        assert not segment.grids
        for name, grid in chosen.items():
            q = segment.quantized[name]
            same = torch.equal(q.scale, grid.scale) and (grid.zero is None or torch.equal(q.zero.float(), grid.zero))
            assert same == (name != UP)
            if rounding.name == "rtn" and name != UP:
                expected, codes = round_to_grid(weights[name], planned.weights, grid)
                assert torch.equal(q.codes, codes) and torch.equal(segment.weight(name), expected)


def test_float_zero_points_survive_the_file(tmp_path):
    """hqq needs no calibration data and writes float16 zero points; what runs is what was rounded, bit for bit."""
    model = tiny_checkpoint("llama", tmp_path / "model")
    record = quantize(model, tmp_path / "out", method="hqq", scheme="w4a16-g32-asym_float")
    assert not record.calibration
    quantize(model, tmp_path / "joined", method="awq+hqq+gptq", scheme="w3a16-g32-asym_float")
    for out in ("out", "joined"):
        config = json.loads((tmp_path / out / "config.json").read_text())["quantization_config"]
        assert config["quant_method"] == "ptq"
        assert {entry["quantizer"] for entry in config["layers"].values()} == {"asym_float"}
    scheme_ = parse_scheme("w3a16-g32-asym_float")
    w = outlying()
    q = round_to_nearest(w, scheme_, half_quadratic(w, scheme_.weights, grid_of(w, scheme_.weights), HalfQuadratic()))
    tensors = FORMATS["native"].encode(q, torch.float32)
    again = FORMATS["native"].decode(tensors, scheme_, q.shape)
    assert tensors["zero"].dtype == torch.float16 and torch.equal(again.zero, q.zero)
    assert torch.equal(again.dequantize(), q.dequantize()) and torch.equal(again.codes, q.codes)
    layer = QuantLinear(q, dtype=torch.float32, device=torch.device("cpu"))
    x = outlying(3, 64, seed=4)
    assert torch.allclose(layer(x), x @ q.dequantize().T, atol=1e-6)


def test_refusals(tmp_path):
    """What hqq cannot choose, and formats that do not hold what it chose, are refused before anything runs."""
    model = tiny_checkpoint("llama", tmp_path / "model")
    cases = {
        "fp4-e2m1-g32": "hqq chooses grids of integer codes",
        "w4a16-g32-sym": "hqq would change nothing",
        "w4a16-g32-asym": "hqq would change nothing",
    }
    for text, reason in cases.items():
        with pytest.raises(PlanError, match=reason):
            quantize(model, tmp_path / "bad", method="hqq", scheme=text)
    for name in ("awq", "gptq", "compressed-tensors"):
        with pytest.raises(PlanError, match="has float zero points"):
            quantize(model, tmp_path / "bad", method="hqq", scheme="w4a16-g32-asym_float", format=name)
    with pytest.raises(PlanError, match="adaquant learns integer zero points"):
        quantize(model, tmp_path / "bad", method="hqq+adaquant", scheme="w4a16-g32-asym_float")


@pytest.mark.parametrize("settings", [{"norm": 0.0}, {"beta": 0.0}, {"growth": 0.9}, {"iterations": -1}], ids=str)
def test_settings_are_checked(settings):
    from test_scheme_recipe import EMPTY

    assert [p.subject for p in Hqq(**settings).check(EMPTY)] == [f"hqq.{name}" for name in settings]
