"""SignRound: one weight against the published equations, gradients against autograd, and whole runs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from command import done, refused
from safetensors.torch import save_file
from test_cli import codes
from tiny_runs import text_file, tiny_checkpoint

from calibration.record import read_record
from ptq.methods.rtn import round_to_nearest
from ptq.numerics import signround, signround_super
from ptq.numerics.gptq import gptq_round
from ptq.numerics.grids import grid_of
from ptq.numerics.integers import round_scale
from ptq.numerics.signround import Learned, relative_loss
from ptq.numerics.signround_super import LearnedSuper
from ptq.numerics.superblock_gptq import gptq_round_super
from ptq.numerics.superblocks import to_half
from ptq.quantized import QuantizedTensor
from ptq.runtime.load import load_model
from ptq.scheme import parse_scheme

torch.set_num_threads(1)
GRIDS = ["w3a16-g32-sym", "w2a16-g32-sym", "w4a16-g32-asym", "w3a16-gchannel-asym", "w3a16-ic32-sym"]


def weight(rows: int = 32, columns: int = 64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(rows, columns, generator=generator)
    w[::5, ::7] *= 4
    return w


def learned(text: str, w: torch.Tensor, clip: torch.Tensor | None = None) -> Learned:
    scheme = parse_scheme(text)
    q = round_to_nearest(w, scheme, grid_of(w, scheme.weights, clip))
    return Learned.start(w, q.codes, q.scale, q.zero, scheme.weights)


@pytest.mark.parametrize("text", GRIDS)
def test_the_start_is_rounding_to_nearest(text):
    """Before the first step codes, scales and weights are those of the start, bit for bit."""
    w, scheme = weight(), parse_scheme(text)
    q, state = round_to_nearest(w, scheme), learned(text, w)
    assert torch.equal(state.codes(), q.codes) and torch.equal(state.grid()[0].float(), q.scale)
    assert torch.equal(state.weight(), q.dequantize())


def test_lines_are_handled_a_few_at_a_time(monkeypatch):
    """Which changes nothing."""
    w = weight()
    g = torch.randn(w.shape, generator=torch.Generator().manual_seed(3))
    whole, parts = learned("w3a16-g32-asym", w), learned("w3a16-g32-asym", w)
    whole.descend(g, 0.1, 0.1)
    monkeypatch.setattr(signround, "CHUNK", 300)
    parts.descend(g, 0.1, 0.1)
    assert torch.equal(whole.weight(), parts.weight()) and torch.equal(whole.codes(), parts.codes())


def test_any_rounding_is_a_start():
    """Codes that GPTQ moved away from the nearest level are kept until a step moves them."""
    w, quant = weight(), parse_scheme("w3a16-g32-sym").weights
    x = torch.randn(200, 64, generator=torch.Generator().manual_seed(1)).cumsum(1)
    result = gptq_round(w, x.T @ x, quant, static_groups=True, order="activation")
    assert not torch.equal(result.codes, round_to_nearest(w, parse_scheme("w3a16-g32-sym")).codes)
    state = Learned.start(w, result.codes, result.scale, result.zero, quant)
    assert torch.equal(state.codes(), result.codes)


def test_published_equations():
    """W~ = s (clamp(round(W/s + V) + z, 0, N) - z) with V in [-1/2, 1/2], s from the range times its factor."""
    w = weight()
    state = learned("w3a16-g32-sym", w)
    v = torch.rand(state.offset.shape, generator=torch.Generator().manual_seed(2)) - 0.5
    state.offset.copy_(v)
    state.high.fill_(-0.1)
    units = w.unflatten(1, (-1, 32))
    largest = units.gather(2, units.abs().argmax(2, keepdim=True)).squeeze(2)
    s = round_scale(-largest / 4).mul(torch.exp(torch.tensor(-0.1)))
    s = round_scale(s).unsqueeze(-1)
    expected = s * ((units / s + v).round().add(4).clamp(0, 7) - 4)
    assert (state.weight() - expected.flatten(1)).abs().max() <= float(s.abs().max()) * 1.001  # ties of float32 only
    assert (state.weight() == expected.flatten(1)).float().mean() > 0.999


@pytest.mark.parametrize("text", ["w3a16-g32-sym", "w3a16-g32-asym"])
def test_a_step_follows_the_signs_of_straight_through_gradients(text):
    """Against autograd on the same formula with rounding as the identity."""
    w = weight()
    full = w.unflatten(1, (-1, 32)).abs().amax(2)
    state = learned(text, w, 0.6 * full)  # many weights lie outside
    g = torch.randn(w.shape, generator=torch.Generator().manual_seed(3))
    v, high, low = (t.clone().requires_grad_() for t in (state.offset, state.high, state.low))

    def through(value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        return like + (value - like).detach()

    n = state.quant.levels
    if state.zero is None:
        s, z = state.scale * high.exp(), torch.full_like(high, 2 ** (state.quant.bits - 1))
    else:
        a, b = -state.zero * state.scale * low.exp(), (n - state.zero) * state.scale * high.exp()
        s = (b - a) / n
        z = through(torch.round(-a / s), -a / s)
    s, z = through(round_scale(s), s).unsqueeze(-1), z.unsqueeze(-1)
    position = state.position * state.scale.unsqueeze(-1) / s + v
    rounded = s * ((through(position.round(), position) + z).clamp(0, n) - z)
    (rounded.flatten(1) * g).sum().backward()
    assert torch.allclose(rounded.detach().flatten(1), state.weight(), atol=1e-5)
    state.descend(g, 0.01, 0.02)
    assert torch.equal(state.offset, -0.01 * v.grad.sign())
    assert (state.high == -0.02 * high.grad.sign()).float().mean() > 0.98  # sums near zero may differ in sign
    if state.zero is not None:
        assert (state.low == -0.02 * low.grad.sign()).float().mean() > 0.98
    for _ in range(100):
        state.descend(g, 0.05, 0.0)
    assert float(state.offset.abs().max()) == 0.5


K_QUANTS = ["q2_k", "q3_k", "q4_k", "q6_k"]


def learned_super(text: str, rows: int = 8) -> tuple[QuantizedTensor, LearnedSuper]:
    """From GPTQ's codes, many of which are not the nearest."""
    w, quant = weight(rows, 512), parse_scheme(text).weights
    x = torch.randn(600, 512, generator=torch.Generator().manual_seed(1)) + torch.randn(600, 1)
    found = gptq_round_super(w, x.T @ x, quant)
    over = found.super_rows(0, rows)
    q = QuantizedTensor(found.codes, found.scale, found.zero, parse_scheme(text), None, {}, None, *over)
    assert q.super_grid is not None
    return q, LearnedSuper.start(w, q.codes, q.super_grid, quant)


@pytest.mark.parametrize("text", K_QUANTS)
def test_k_quants_start_at_any_rounding_and_stay_in_the_file(text, monkeypatch):
    q, state = learned_super(text)
    grid = state.grid()
    assert torch.equal(state.rounded()["codes"], q.codes) and torch.equal(state.weight(), q.dequantize())
    assert torch.equal(grid.super_scale, q.super_scale)
    parts, g = state.copy(), torch.randn(q.shape, generator=torch.Generator().manual_seed(3))
    for _ in range(5):
        state.descend(g, 0.1, 0.05)
    after = replace(q, **state.rounded())
    assert not torch.equal(after.codes, q.codes) and torch.equal(after.dequantize(), state.weight())
    assert torch.equal(after.super_scale, after.super_scale.half().float()) and after.super_grid is not None
    monkeypatch.setattr(signround_super, "CHUNK", 600)
    for _ in range(5):
        parts.descend(g, 0.1, 0.05)
    assert torch.equal(parts.weight(), state.weight())


@pytest.mark.parametrize("text", K_QUANTS)
def test_a_step_on_a_k_quant_follows_straight_through_gradients(text):
    """Against autograd on the formula with rounding as the identity."""
    _, state = learned_super(text)
    state.high.fill_(-0.4)  # many weights lie outside
    state.low.fill_(-0.4)
    first, quant = state.start_grid, state.quant
    g = torch.randn(8, 512, generator=torch.Generator().manual_seed(3))
    v, high, low = (t.clone().requires_grad_() for t in (state.offset, state.high, state.low))

    def exact(value: torch.Tensor) -> torch.Tensor:
        return value + (to_half(value) - value).detach()

    over = exact(high.exp() * first.super_scale)
    groups = first.scale.shape[1] // over.shape[1]
    s = (over.repeat_interleave(groups, 1) * first.scale).unsqueeze(-1)
    z, o = (4 if text == "q3_k" else 32, torch.zeros_like(s))
    if first.super_min is not None:
        z, o = 0, (exact(low.exp() * first.super_min).repeat_interleave(groups, 1) * first.minimum).unsqueeze(-1)
    position = (state.units + o) / s + v + z
    code = (position + (position.round() - position).detach()).clamp(0, quant.levels)
    rounded = (s * (code - z) - o).flatten(1)
    (rounded * g).sum().backward()
    assert torch.allclose(rounded.detach(), state.weight(), atol=1e-5)
    before = state.copy()
    state.descend(g, 0.01, 0.02)
    moved = state.offset - before.offset
    assert torch.equal(moved, -0.01 * v.grad.sign())
    assert torch.equal(torch.sign(before.high - state.high), high.grad.sign())
    if first.super_min is None:
        assert torch.equal(before.low, state.low)
    else:
        assert torch.equal(torch.sign(before.low - state.low), low.grad.sign())


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("signround")
    for family in ("llama", "gpt2", "mixtral"):
        tiny_checkpoint(family, folder / family)
    text_file(folder)
    return folder


def words(place: Path, method: str, *more: object, family: str = "llama") -> list[object]:
    return [
        *("quantize", place / family, "--method", method, "--dataset", place / "text.txt", "--samples", 10),
        *("--seq-len", 32, "--overwrite", "--scheme", "w2a16-g32-sym", "--out", place / "run", *more),
    ]


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_the_block_comes_closer(place, family):
    """The loss falls below that of the start, after rtn and after gptq, for Conv1D and experts too, and on no block
    does it rise."""
    for method in ("signround", "awq+gptq+signround"):
        more = ["--unseen-experts", "rtn"] if family == "mixtral" else []
        done(*words(place, method, *more, family=family))
        record = read_record(place / "run")
        notes = [linear.notes for linear in record.linears if "signround.first_loss" in linear.notes]
        assert len(notes) == len(record.linears)
        first, last = ([n[f"signround.{which}_loss"] for n in notes] for which in ("first", "last"))
        assert all(b <= a for a, b in zip(first, last, strict=True)) and sum(last) < sum(first)


@pytest.mark.parametrize("smooth", ["", '[[pass]]\nname = "rs"\n'])
def test_it_sees_quantized_inputs(place, smooth):
    """The loss in the record is what the written model has on the calibration windows, inputs on 4 bits: behind the
    first block, the only one whose float inputs are those of the run."""
    tokens = torch.randint(0, 256, (4, 32), generator=torch.Generator().manual_seed(7))
    save_file({"input_ids": tokens}, place / "tokens.safetensors")
    recipe = place / "still.toml"
    recipe.write_text(f'{smooth}[[pass]]\nname = "signround"\nepochs = 1\nrate = 0.0\nrange_rate = 0.0\n')
    run = words(place, "gptq", "--scheme", "w3a4", "--dataset", place / "tokens.safetensors", "--samples", 4)
    run[2:4] = ["--recipe", recipe]
    done(*run)
    model, quantized = (load_model(place / name, dtype=torch.float32).model for name in ("llama", "run"))
    with torch.no_grad():
        y, target = (m(tokens, output_hidden_states=True).hidden_states[1] for m in (quantized, model))
    losses = [float(relative_loss(a, b)) for a, b in zip(y, target, strict=True)]
    assert sum(losses) / 4 == pytest.approx(
        read_record(place / "run").linears[0].notes["signround.first_loss"], rel=1e-4
    )


def test_zero_epochs_change_nothing(place):
    recipe = place / "none.toml"
    recipe.write_text('[[pass]]\nname = "gptq"\n[[pass]]\nname = "signround"\nepochs = 0\n')
    run = words(place, "gptq")
    done(*run)
    plain = codes(place / "run")
    run[2:4] = ["--recipe", recipe]
    done(*run)
    again = codes(place / "run")
    assert all(torch.equal(plain[n].codes, again[n].codes) for n in plain)


REFUSED = {
    "epochs = -1": "signround.epochs: -1 is negative",
    "rate = -0.5": "signround.rate: -0.5 is outside",
    "range_rate = 1000": "signround.range_rate: 1000.0 is outside",
}


@pytest.mark.parametrize("setting", REFUSED)
def test_refused_settings(place, setting):
    recipe = place / "bad.toml"
    recipe.write_text(f'[[pass]]\nname = "signround"\n{setting}\n')
    run = words(place, "gptq")
    run[2:4] = ["--recipe", recipe]
    assert REFUSED[setting] in refused(*run)


def test_what_it_cannot_start_from_is_refused(place):
    for scheme in ("mxfp4", "w4a16-g32-asym_float"):
        message = refused("quantize", place / "llama", "--method", "signround", "--scheme", scheme, "--dry-run")
        assert "signround learns integer grids" in message
    assert "write signround+lorc" in refused(*words(place, "lorc+signround", "--dry-run"))
    recipe = place / "reordered.toml"
    recipe.write_text('[[pass]]\nname = "gptq"\nstatic_groups = false\n[[pass]]\nname = "signround"\n')
    run = words(place, "gptq")
    run[2:4] = ["--recipe", recipe]
    assert "cannot learn their ranges" in refused(*run)
