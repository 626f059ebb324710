"""``ptq analyze --clipped-softmax`` against models whose attention, weights and inputs are changed by hand."""

from __future__ import annotations

import json
import math

import pytest
import torch
from command import done, refused, text_file, tiny
from tiny_models import save_tiny

from calibration.model.opening import open_model
from calibration.progress import Silent
from calibration.text.crops import TokenBatches
from ptq.analysis.head_clipping import HEAD_GAMMAS, LIMIT, _largest, own_gammas
from ptq.analysis.observe import Subject, observe
from ptq.analysis.softmax_record import HeadClipping, SoftmaxRow
from ptq.analysis.softmax_sweep import FREE, GATES, SETTINGS, SweepOptions, finding, sweep_softmax
from ptq.numerics.softmax import HeadSoftmax, SoftmaxRule
from ptq.runtime.explicit_attention import exchanged_softmax, parse_softmax
from ptq.runtime.load import load_model

IDS = torch.randint(0, 96, (6, 24), generator=torch.Generator().manual_seed(0))
WINDOWS = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny("llama", tmp_path_factory.mktemp("sweep") / "model")


@pytest.fixture(scope="module")
def sweep(folder):
    spec = open_model(folder)[2]
    options = SweepOptions((*SETTINGS, *GATES, "gamma=-0.05"), head_windows=2, shut=True)
    model = load_model(folder, dtype=torch.float32).model
    return sweep_softmax(model, spec, TokenBatches(IDS, {}), WINDOWS, options, False, Silent())


def perplexity(model, ids):
    with torch.no_grad():
        logits = model(ids, use_cache=False).logits[:, :-1].double()
    return math.exp(torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()))


def test_every_setting_against_the_model_with_that_softmax(folder, sweep):
    model = load_model(folder, dtype=torch.float32).model
    assert [row.softmax for row in sweep.rows] == [
        "plain", *SETTINGS, "closed=0.99", "closed=0.9", "closed=0.5", "gamma=-0.05", "each head its own",
    ]  # fmt: skip
    for row in sweep.rows[:-1]:
        seen = []
        rule = SoftmaxRule() if row.softmax == "plain" else parse_softmax(row.softmax, 24)
        with exchanged_softmax(model, rule, seen.append):
            expected = perplexity(model, IDS[:WINDOWS])
        assert row.perplexity == pytest.approx(expected, rel=1e-5), row.softmax
        p = torch.stack([s.probabilities for s in seen])
        visible = torch.ones(24, 24).tril().bool().expand_as(p)
        assert row.zeros == pytest.approx(float((p[visible] == 0).float().mean()), rel=1e-4, abs=1e-9)
        assert row.row_sum == pytest.approx(float(p.sum(-1).mean()), rel=1e-5)
        assert row.empty_rows == pytest.approx(float((p.sum(-1) == 0).float().mean()), abs=1e-6)
    plain = sweep.rows[0]
    assert (plain.divergence, plain.zeros, plain.empty_rows) == (0, 0, 0) and plain.row_sum == pytest.approx(1)
    assert all(row.divergence > 0 for row in sweep.rows[3:9])


def test_outlier_metrics_are_those_of_the_analysis(folder, sweep):
    reader, config, spec = open_model(folder)
    subject = Subject(reader, config, spec, torch.float32, torch.device("cpu"))
    sites = observe(subject, TokenBatches(IDS[:WINDOWS], {}), str, Silent()).sites
    norms = sweep.rows[0].with_first_token
    assert norms["max_inf_norm"] == pytest.approx(max(s.inf_norm for s in sites), rel=1e-4)
    assert norms["avg_kurtosis"] == pytest.approx(sum(s.kurtosis_sequence for s in sites) / len(sites), rel=1e-4)
    later = sweep.rows[0].without_first_token
    assert later["max_kurtosis"] == pytest.approx(max(s.kurtosis_sequence_later for s in sites), rel=1e-4)


def test_eight_bits_by_hand(folder, sweep):
    """Symmetric weights and inputs with zero points, one range per tensor, from the windows that are not scored."""
    model = load_model(folder, dtype=torch.float32).model
    linears = {n: m for n, m in model.named_modules() if ".layers." in n and isinstance(m, torch.nn.Linear)}
    for row in (sweep.rows[0], next(r for r in sweep.rows if r.softmax == "gamma=-0.025")):
        rule = SoftmaxRule() if row.softmax == "plain" else parse_softmax(row.softmax, 24)
        changed = load_model(folder, dtype=torch.float32).model
        ranges: dict[str, list[float]] = {}

        def note(name, ranges=ranges):
            def hook(module, args):
                low, high = ranges.get(name, [0.0, 0.0])
                ranges[name] = [min(low, float(args[0].min())), max(high, float(args[0].max()))]

            return hook

        handles = [changed.get_submodule(n).register_forward_pre_hook(note(n)) for n in linears]
        with exchanged_softmax(changed, rule), torch.no_grad():
            changed(IDS[WINDOWS:], use_cache=False)
        for handle in handles:
            handle.remove()

        def rounded(name, ranges=ranges):
            low, high = ranges[name]
            step = (high - low) / 255
            zero = round(-128 - low / step)
            return lambda module, args: (((args[0] / step).round() + zero).clamp(-128, 127) - zero) * step

        for name in linears:
            module = changed.get_submodule(name)
            step = 2 * module.weight.abs().max() / 255
            step = step.to(torch.bfloat16).to(torch.float16).float()  # scales are stored in 16 bits
            module.weight.data = (module.weight / step).round().clamp(-128, 127) * step
            module.register_forward_pre_hook(rounded(name))
        with exchanged_softmax(changed, rule):
            assert row.perplexity_8_bit == pytest.approx(perplexity(changed, IDS[:WINDOWS]), rel=2e-4)
        assert row.perplexity_8_bit != row.perplexity


def test_single_heads_by_hand(folder, sweep):
    """A shut head is one whose columns of the output projection are 0; a gamma that is allowed costs little."""
    model = load_model(folder, dtype=torch.float32).model
    base = math.log(perplexity(model, IDS[:2]))
    assert [(h.block, h.head) for h in sweep.heads] == [(b, h) for b in range(2) for h in range(4)]
    for h in sweep.heads:
        projection = model.model.layers[h.block].self_attn.o_proj
        kept = projection.weight.data.clone()
        projection.weight.data[:, 16 * h.head : 16 * (h.head + 1)] = 0
        assert h.shut_cost == pytest.approx(math.log(perplexity(model, IDS[:2])) / base - 1, abs=1e-5)
        projection.weight.data = kept
        others = [SoftmaxRule(), SoftmaxRule()]
        others[h.block] = HeadSoftmax.plain(4).with_head(h.head, h.gamma)
        with exchanged_softmax(model, others):
            assert h.cost == pytest.approx(math.log(perplexity(model, IDS[:2])) / base - 1, abs=1e-5)
        assert h.cost < LIMIT and h.gamma in (0.0, *HEAD_GAMMAS)
    with exchanged_softmax(model, [own_gammas(sweep.heads, 4)[b] for b in range(2)]):
        assert sweep.rows[-1].perplexity == pytest.approx(perplexity(model, IDS[:WINDOWS]), rel=1e-5)


def test_the_largest_gamma_below_the_limit():
    costs = dict(zip(HEAD_GAMMAS, (0, 0, 0, 1e-4, 2e-4, 9e-4, 2e-3, 1), strict=True))
    tried = []
    assert _largest(HEAD_GAMMAS, lambda g: (tried.append(g), costs[g])[1]) == (-3e-3, 9e-4) and len(tried) <= 4
    assert _largest(HEAD_GAMMAS, lambda g: 1.0) == (0.0, 0.0)
    assert _largest(HEAD_GAMMAS, lambda g: 0.0) == (HEAD_GAMMAS[-1], 0.0)
    rules = own_gammas([HeadClipping(1, 2, -0.1, 0, None), HeadClipping(1, 0, -0.2, 0, None)], 4)
    assert list(rules) == [1] and rules[1].gammas.tolist() == pytest.approx([-0.2, 0, -0.1, 0])


def row(gamma, ppl, norm, kurtosis):
    norms = {"max_inf_norm": norm, "avg_kurtosis": kurtosis}
    return SoftmaxRow(f"gamma={gamma}", gamma, ppl, 0.0, 0.0, 1.0, 0.0, norms, norms, None)


def test_what_is_found_in_words():
    plain = row(0.0, 10, 500, 900)
    stays = finding([plain, row(-1e-4, 10.05, 480, 950), row(-0.01, 20, 1, 1)])
    assert "gamma -0.0001" in stays and "500 to 480" in stays and "Outliers stay" in stays
    assert "Outliers shrink" in finding([plain, row(-1e-4, 10.05, 100, 90)])
    assert "Every gamma tried costs more" in finding([plain, row(-1e-4, 10 * (1 + 2 * FREE), 480, 950)])


def test_command(tmp_path):
    model, text = tiny(tmp_path / "model"), text_file(tmp_path / "text.txt")
    few = ("--dataset", text, "--samples", "4", "--seq-len", "32", "--clipped-softmax", "--windows", "2")
    printed = done("analyze", model, *few, "--head-windows", "1", "--out", tmp_path / "a")
    data = json.loads((tmp_path / "a" / "report.json").read_text())["softmax"]
    assert len(data["rows"]) == len(SETTINGS) + 2 and len(data["heads"]) == 8 and data["finding"] in printed
    assert all(h["shut_cost"] is None for h in data["heads"]) and data["range_windows"] == 2
    report = (tmp_path / "a" / "report.md").read_text()
    assert "## Other softmaxes in this model" in report and "`gamma=-0.003,normalise`" in report
    done("quantize", model, "--method", "rtn", "--scheme", "w8a16-g32", "--out", tmp_path / "q")
    done("analyze", tmp_path / "q", *few, "--head-windows", "0", "--out", tmp_path / "b")
    other = json.loads((tmp_path / "b" / "report.json").read_text())["softmax"]
    assert other["heads"] == [] and {r["perplexity_8_bit"] for r in other["rows"]} == {None}


def test_refusals(tmp_path):
    model, text = tiny(tmp_path / "model"), text_file(tmp_path / "text.txt")
    few = ("--dataset", text, "--samples", "4", "--seq-len", "32", "--out", tmp_path / "out")
    assert "parts of --clipped-softmax" in refused("analyze", model, *few, "--gated")
    asked = (*few, "--clipped-softmax")
    assert "some must be left" in refused("analyze", model, *asked, "--windows", "4")
    unmeasured = ("--sensitivity", "w4a16-g32", "--probe-windows", "0")
    assert "--probe-windows 0" in refused("analyze", model, *few, *unmeasured)
    assert "--head-windows 3" in refused("analyze", model, *asked, "--windows", "2", "--head-windows", "3")
    assert "gama" in refused("analyze", model, *asked, "--windows", "2", "--softmax", "gama=1")
    falcon = save_tiny("falcon-rw", tmp_path / "falcon")
    assert "attention interface" in refused("analyze", falcon, *asked, "--windows", "2")
    assert not (tmp_path / "out").exists()
