"""The oracles of per-IC grouping and AdaDim: numerics in float64, then the pass on tiny models."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_statistics import DOWN, K, Q, new_context, open_block

from calibration.walk.statistics import Gram
from ptq.methods import AdaDim, AdaDimPublished, Gptq, Rtn
from ptq.methods.adadim import along, both_axes, column_energies
from ptq.methods.rtn import round_to_nearest
from ptq.numerics.gptq import gptq_round
from ptq.numerics.grids import grid_of
from ptq.numerics.integers import fake_quantize, grid_parameters
from ptq.numerics.objective import rounding_error
from ptq.quantized import QuantizedTensor
from ptq.scheme import QUANTIZERS, Grouping, QuantScheme, TensorQuant, parse_scheme

torch.set_num_threads(1)
N, G = 128, 32
KINDS = pytest.mark.parametrize("kind", QUANTIZERS)


def quant(axis: str, kind: str = "asym_minmax", bits: int = 3, size: int | None = G) -> TensorQuant:
    return TensorQuant(bits, Grouping("channel" if size is None else "group", size, axis), kind)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def correlated(tokens: int = 512, width: int = N, seed: int = 1) -> torch.Tensor:
    x = randn(tokens, width, seed=seed)
    return x @ randn(width, width, seed=seed + 1) / width**0.5 + 0.3 * x


def error(w: torch.Tensor, x: torch.Tensor, axis: str, kind: str = "asym_minmax") -> float:
    return float(rounding_error(w, x.T @ x, quant(axis, kind)))


@KINDS
def test_oracle_1_transposition(kind):
    """1. Q_ic(W) == Q_oc(W^T)^T bit-exactly; g = OC gives one scale per input channel; equal bpw to oc when g divides
    both."""
    w = randn(64, 96)
    for size in (32, None):
        across, down = quant("out", kind, size=size), quant("in", kind, size=size)
        assert torch.equal(fake_quantize(w, across), fake_quantize(w.T, down).T)
        q = round_to_nearest(w.float(), QuantScheme(across))
        assert q.scale.shape == across.grouping.scales((64, 96)) == ((96, 2) if size else (96, 1))
        assert torch.equal(q.dequantize(), fake_quantize(w.float(), across)) and q.codes.is_contiguous()
    assert parse_scheme("w3a16-icchannel-asym").bits_per_weight(64, 96) == 3 + 19 / 64
    for text in ("w3a16-{}32-asym", "w4a16-{}32-sym"):
        per_oc, per_ic = (parse_scheme(text.format(axis)) for axis in ("g", "ic"))
        assert per_oc.bits_per_weight(64, 96) == per_ic.bits_per_weight(64, 96)
        assert per_ic == along(per_oc, "out") and parse_scheme(str(per_ic)) == per_ic
        assert QuantScheme.from_json(per_ic.to_json()) == per_ic


def test_oracle_2_column_scale_invariance():
    """2. Q_ic(W diag(c)) diag(c)^-1 == Q_ic(W) for positive c (1e-6). Q_oc does not satisfy it."""
    w, c = randn(64, 96), randn(96, seed=3).exp()
    for axis, holds in (("out", True), ("in", False)):
        plain, scaled = (fake_quantize(v, quant(axis), exact_scale=True) for v in (w, w * c))
        assert torch.allclose(scaled / c, plain, rtol=1e-6, atol=1e-12) is holds


def test_oracle_4_fixtures_with_a_known_winner():
    """4. A column with small weights and large inputs, and lognormal column scales: ic wins by 10x; lognormal row
    scales: oc wins. Large inputs alone give ic no advantage."""
    w, x = randn(N, N), randn(512, N, seed=1)
    loud, c = x.clone(), randn(N, seed=2).exp()
    loud[:, 5] *= 100
    quiet = w.clone()
    quiet[:, 5] *= 0.1
    assert error(quiet, loud, "out") < error(quiet, loud, "in") / 10
    assert error(w * c, x / c, "out") < error(w * c, x / c, "in") / 10
    ratio = error(c[:, None] * w, x, "in") / error(c[:, None] * w, x, "out")
    assert 0.5 < ratio < 0.9
    assert error(w, loud, "out") > error(w, loud, "in") / 2


def test_oracle_5_outlier_isolation():
    """5. Adding 1000 to W[:, j] changes no other column of Q_ic(W), but changes other columns in Q_oc(W)."""
    w = randn(64, 96)
    shifted = w.clone()
    shifted[:, 7] += 1000
    others = torch.arange(96) != 7
    for axis, same in (("out", True), ("in", False)):
        before, after = (fake_quantize(v, quant(axis)) for v in (w, shifted))
        assert torch.equal(before[:, others], after[:, others]) is same


@pytest.mark.parametrize("order", ["natural", "activation", "group"])
@pytest.mark.parametrize("size", [16, None])
def test_oracle_6_diagonal_hessian(order, size):
    """6. GPTQ-ic with diagonal H == Q_ic(W) with quantizer A, exactly."""
    w, q = randn(32, 48), quant("out", size=size)
    h = torch.diag(randn(48, seed=4).square() + 0.1)
    r = gptq_round(w, h, q, order=order)
    assert torch.equal(restored(r, q), fake_quantize(w, q))


def restored(r, q: TensorQuant) -> torch.Tensor:
    zero = None if r.zero is None else r.zero.to(torch.uint8)
    return QuantizedTensor(r.codes, r.scale, zero, QuantScheme(q), r.group_index).dequantize(torch.float64)


@pytest.mark.parametrize("order", ["natural", "activation"])
@pytest.mark.parametrize("kind", ["asym_zero_in", "sym_gptq"])
def test_oracles_7_and_9_block_size_storage_and_loss(kind, order):
    """7. GPTQ-ic is invariant to block size (1, 32, 128) and needs no group index: storing (q, s, z) per column
    reproduces Q after un-permuting. 9. The loss identity holds unchanged for ic."""
    w, x, q = randn(64, 96), correlated(300, 96), quant("out", kind, size=16)
    h = x.T @ x
    found = [gptq_round(w, h, q, order=order, block_size=b) for b in (1, 32, 128)]
    for r in found:
        assert r.group_index is None and r.scale.shape == (96, 4)
        assert torch.equal(r.codes, found[0].codes) and torch.allclose(r.scale, found[0].scale, rtol=1e-10)
        d = restored(r, q) - w
        damped = h + 0.01 * h.diagonal().mean() * torch.eye(96, dtype=h.dtype)
        assert r.loss == pytest.approx(float(((d @ damped) * d).sum()), rel=1e-9)
    parts = [found[0].rows(a, b, q) for a, b in ((0, 16), (16, 64))]  # as stacked linears are taken apart
    joined = [QuantizedTensor(c, s, z, QuantScheme(q)).dequantize(torch.float64) for c, s, z in parts]
    assert torch.equal(torch.cat(joined), restored(found[0], q))


def test_oracle_8_feedback_helps():
    """8. GPTQ-ic layer loss < RTN-ic on correlated inputs (sum over rows); the same for whole columns."""
    for size in (16, None):
        w, x, q = randn(64, 96), correlated(300, 96), quant("out", size=size)
        h = x.T @ x
        d = restored(gptq_round(w, h, q, order="activation"), q) - w
        assert float(((d @ h) * d).sum()) < 0.7 * float(rounding_error(w, h, q))


def test_clipping_bounds_of_columns():
    """Bounds ``[in, G]`` act on groups of rows, in rounding to nearest, in GPTQ and in the error alike."""
    w, x, q = randn(64, 96), correlated(300, 96), quant("out", "sym_gptq", size=16)
    h, bounds = x.T @ x, 0.6 * randn(96, 4, seed=9).abs() + 0.5
    clipped = fake_quantize(w, q, bounds)
    assert clipped.abs().amax() < w.abs().amax()
    d = clipped - w
    assert float(rounding_error(w, h, q, grid_of(w, q, bounds))) == pytest.approx(float(((d @ h) * d).sum()), rel=1e-6)
    r = gptq_round(w, torch.diag(h.diagonal()), q, order="activation", grid=grid_of(w, q, bounds))
    assert torch.equal(restored(r, q), clipped)
    units = w.T.unflatten(-1, (-1, 16))
    assert torch.equal(r.scale, grid_parameters(units, q, bounds)[0])


@torch.no_grad()
def unbalanced(tmp_path, scheme="w3a16-g32-sym"):
    """A tiny Llama block: q, k, v read inputs of very different size, so they want ic."""
    changes = {"hidden_size": 64, "intermediate_size": 128}
    segment, states = open_block("llama", tmp_path, scheme=parse_scheme(scheme), changes=changes)
    c = torch.randn(64, generator=torch.Generator().manual_seed(2)).exp()
    for name in segment.spec.shared_input(Q).linears:
        segment.set_weight(name, segment.weight(name) * c)
    norm = segment.masters["input_layernorm.weight"]
    norm.div_(c)
    segment._touch("input_layernorm.weight", exact=True)
    return segment, states


@pytest.mark.parametrize("method", [AdaDim(), AdaDimPublished(batches=2), AdaDimPublished(batches=2, moving=False)])
def test_oracles_3_and_10_selection(tmp_path, method):
    """3. The chosen error is min(loss_oc, loss_ic), hence <= RTN's. 10. Selection is deterministic and leaves the
    weights of masters and module bit-identical, on CPU too."""
    segment, states = unbalanced(tmp_path)
    before = {n: t.clone() for n, t in segment.masters.items()}
    segment.sync()
    module = {n: t.clone() for n, t in segment.module.state_dict().items()}
    context = new_context(segment, states, kinds=(Gram,))
    method.apply(segment, context)
    assert context.forwards == 1 + method.forwards()
    for n, t in before.items():
        assert torch.equal(segment.masters[n], t)
    for n, t in segment.module.state_dict().items():
        assert torch.equal(t, module[n])
    assert all(segment.schemes[n].weights.grouping.axis == "out" for n in (Q, K))
    notes = {n: dict(segment.notes[n]) for n in segment.schemes}
    for name, scheme in segment.schemes.items():
        axis = scheme.weights.grouping.axis
        assert notes[name][f"adadim.{axis}"] == min(notes[name].values()) and len(notes[name]) == 2
        gram = context.statistic(name, Gram).matrix
        if isinstance(method, AdaDim) or name == DOWN:
            for side in ("in", "out"):
                counts = column_energies(segment, name)
                w, quantizer = segment.weight(name), along(scheme, side).weights
                expected = float(rounding_error(w, gram, quantizer, importance=counts))
                assert notes[name][f"adadim.{side}"] == pytest.approx(expected, rel=1e-5)
    again, states = unbalanced(tmp_path)
    method.apply(again, new_context(again, states, kinds=(Gram,)))
    assert again.schemes == segment.schemes and {n: dict(v) for n, v in again.notes.items()} == notes


@pytest.mark.parametrize("kind", ["linear", "value"])
@torch.no_grad()
def test_outputs_count_by_what_reads_them(tmp_path, kind):
    """Rows times powers of two, the columns that read them divided by those: the model and the error along the inputs
    stay, while groups along the outputs now mix large rows with small ones. Large rows alone must not decide."""
    plain, states = unbalanced(tmp_path)
    planted, same = unbalanced(tmp_path)
    group = next(g for g in planted.spec.balance if g.kind == kind)
    s = torch.ones(planted.weight(group.producer).shape[0])
    s[::8] = 2.0**-6
    planted.absorb(group, s)
    for segment, entering in ((plain, states), (planted, same)):
        AdaDim().apply(segment, new_context(segment, entering, kinds=(Gram,)))
    before, after = plain.notes[group.producer], planted.notes[group.producer]
    assert after["adadim.in"] == pytest.approx(before["adadim.in"], rel=1e-4)
    assert after["adadim.out"] > 5 * before["adadim.out"]
    assert planted.schemes[group.producer].weights.grouping.axis == "in"


@pytest.mark.parametrize("rounding", [Rtn(), Gptq()])
def test_the_better_axis_gives_the_smaller_error(tmp_path, rounding):
    """Usefulness: rtn-ada below rtn and gptq-ada below gptq, where inputs are unbalanced."""
    errors = []
    for passes in ([rounding], [AdaDim(), rounding]):
        segment, states = unbalanced(tmp_path)
        context = new_context(segment, states, kinds=(Gram,))
        for step in passes:
            step.apply(segment, context)
        errors.append({n: e["output"] for n, e in segment.errors.items()})
    assert errors[1][Q] < 0.6 * errors[0][Q] and errors[1][K] < 0.6 * errors[0][K]
    assert sum(errors[1].values()) < sum(errors[0].values())


def test_ineligible_and_clipped_linears(tmp_path):
    """Groups that do not divide the outputs leave one option; a chosen grid goes with its grouping."""
    scheme = parse_scheme("w3a16-g32-sym")
    assert both_axes(scheme, (48, 64)) == (scheme,)
    assert both_axes(along(scheme, "out"), (64, 48)) == (along(scheme, "out"),)
    assert both_axes(scheme, (32, 64)) == (scheme, along(scheme, "out"))
    segment, states = unbalanced(tmp_path)
    segment.grids = {n: grid_of(segment.weight(n), segment.schemes[n].weights) for n in (Q, K)}
    segment.schemes[K] = replace(segment.schemes[K], weights=TensorQuant(3, Grouping("group", 64), "sym_gptq"))
    segment.grids[K] = grid_of(segment.weight(K), segment.schemes[K].weights)
    AdaDim().apply(segment, new_context(segment, states, kinds=(Gram,)))
    assert Q not in segment.grids and K in segment.grids and "adadim.out" not in segment.notes.get(K, {})
