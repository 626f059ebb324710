"""``ptq fit``: the integer program, the expected errors, the probe, whole runs and bad input."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from command import done, refused, text_file, tiny
from test_cli import codes
from test_oracles_gptq import values
from test_oracles_llm_fp4 import randn
from tiny_models import tiny_model

from calibration.errors import ToolkitError
from calibration.progress import Silent
from calibration.record import read_record
from ptq.fitting.allocation import allocate
from ptq.fitting.budget import Budget, parse_budget
from ptq.fitting.job import prepare_fit
from ptq.numerics.feedback import column_costs, feedback_errors
from ptq.numerics.gptq import gptq_round
from ptq.numerics.grids import fake_quantize
from ptq.planning.job import Options
from ptq.scheme import parse_scheme

torch.set_num_threads(1)
FAST = ("--samples", "6", "--seq-len", "32")


def test_the_program_is_solved_exactly():
    """Against every combination, with unequal numbers of options and dominated ones among them."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        sizes = torch.randint(2, 5, (5,), generator=generator).tolist()
        costs = [torch.randint(1, 20, (n,), generator=generator).double().tolist() for n in sizes]
        losses = [torch.rand(n, generator=generator).double().mul(1e-3).tolist() for n in sizes]
        for budget in (sum(map(min, costs)), 40, 55.5):
            within = [
                combination
                for combination in itertools.product(*map(range, sizes))
                if sum(c[o] for c, o in zip(costs, combination, strict=True)) <= budget
            ]
            chosen = allocate(costs, losses, budget)
            if not within:
                assert chosen is None
                continue
            assert chosen is not None and sum(c[o] for c, o in zip(costs, chosen, strict=True)) <= budget
            best = min(sum(v[o] for v, o in zip(losses, combination, strict=True)) for combination in within)
            assert sum(v[o] for v, o in zip(losses, chosen, strict=True)) == pytest.approx(best, rel=1e-6)


@pytest.mark.parametrize("text", ["w4a16-g32-sym", "w3a16-g64-sym", "w2a16-g32-sym", "nvfp4", "w6a16-gchannel-sym"])
def test_expected_errors_of_gptq(text):
    """1/U_jj^2 times the squared rounding errors is what the column loop reports, but for its own randomness."""
    w, x = randn(64, 128).float(), randn(512, 128, seed=1) @ randn(128, 128, seed=2)
    x[:, 7] = 0
    gram, quant = (x.T @ x).float(), parse_scheme(text).weights
    found = float(feedback_errors(w, fake_quantize(w, quant), column_costs(gram)).sum())
    loss = gptq_round(w, gram, quant, order="activation", static_groups=True).loss
    assert found == pytest.approx(loss, rel=0.1 if quant.bits > 2 else 0.4)
    diagonal = torch.diag(gram.diagonal())
    plain = fake_quantize(w, quant) - w
    damped = diagonal + 0.01 * diagonal.diagonal().clone().add(torch.eye(128)[7]).mean() * torch.eye(128)
    expected = float(((plain @ damped) * plain).sum() - (plain[:, 7].square() * damped[7, 7]).sum())
    assert float(feedback_errors(w, fake_quantize(w, quant), column_costs(diagonal)).sum()) == pytest.approx(
        expected, rel=1e-4
    )


@pytest.mark.parametrize("text", ["w4a16-g32-sym", "w3a16-g64-sym"])
def test_expected_errors_of_gptq_by_another_measure(text):
    """Under M instead of the Gram matrix that the loop works with, row by row."""
    w, x = randn(64, 128).float(), randn(512, 128, seed=1) @ randn(128, 128, seed=2)
    gram, quant = (x.T @ x).float(), parse_scheme(text).weights
    other = randn(256, 128, seed=3).float() @ torch.diag(torch.linspace(0.1, 3, 128))
    measure = other.T @ other
    found = feedback_errors(w, fake_quantize(w, quant), column_costs(gram, measure))
    change = values(gptq_round(w, gram, quant, order="activation", static_groups=True), quant).float() - w
    actual = ((change @ measure) * change).sum(dim=1)
    assert found.shape == actual.shape == (64,)
    assert float(found.sum()) == pytest.approx(float(actual.sum()), rel=0.15)
    assert torch.allclose(column_costs(gram, gram, 1e-9), column_costs(gram, None, 1e-9), rtol=0.03)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fit")
    text_file(folder / "text.txt")
    tiny(folder / "llama", hidden_size=128, head_dim=32, intermediate_size=256, num_key_value_heads=4)
    return folder


def prepared(place: Path, model: str = "llama", **settings):
    options = Options(dataset=str(place / "text.txt"), samples=6, seq_len=32, dtype="float32")
    return prepare_fit(place / model, options=options, **settings)


@pytest.mark.parametrize("family", ["llama-tied-bias", "gpt2", "gemma2", "opt-post-norm", "mixtral"])
def test_probes_are_divergences_of_models_rounded_by_hand(tmp_path, place, family):
    tiny(place / family, family)
    fit = prepared(place, family, format="native", schemes=("w3a16-gchannel-sym", "w8a16-gchannel-sym"), method="rtn")
    found = fit.measure(Silent())
    ids = fit.job.windows(Silent()).input_ids[:4]
    names = [name for unit in fit.units for name in unit.names]
    scheme = parse_scheme("w3a16-gchannel-sym")

    def log_p(rounded: tuple[str, ...]) -> torch.Tensor:
        model = tiny_model(family, vocab_size=260)
        for name in rounded:
            path = fit.plan.spec.root_module_name(f"{name}.weight")
            w = model.get_parameter(path).data
            w = w.T if fit.plan.spec.conv1d else w
            w.copy_(fake_quantize(w.clone(), scheme.weights))
        with torch.no_grad():
            return model(ids).logits[:, :-1].flatten(0, 1).log_softmax(-1)

    base = log_p(())
    assert len(found.checks) == 6
    for check in found.checks:
        if ".experts." not in check.linear:  # its experts are one tensor in the model class
            expected = float((base.exp() * (base - log_p((check.linear,)))).sum(-1).mean())
            assert check.scheme == scheme and check.measured == pytest.approx(expected, rel=1e-3, abs=1e-7)
            assert 0.3 < check.expected / check.measured < 3
    if family != "mixtral":
        everything = log_p(tuple(names))
        expected = float((base.exp() * (base - everything)).sum(-1).mean())
        all_rounded = dict.fromkeys(names, scheme)
        assert found.together.kl(found.parts(all_rounded)) == pytest.approx(expected, rel=1e-3)
        assert fit.choice(all_rounded, found).divergence == pytest.approx(expected, rel=1e-3)


def test_what_a_pass_refuses_is_not_on_offer(place):
    """Learned rounding knows integers only."""
    offered = [{str(o) for o in unit.options} for unit in prepared(place, method="awq+signround").units]
    assert all("w4a16-g32-sym" in options and not {"mxfp4", "nvfp4"} & options for options in offered)
    assert all({"mxfp4", "nvfp4"} <= {str(o) for o in unit.options} for unit in prepared(place, method="gptq").units)


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_at_every_budget_at_least_as_good_as_the_best_uniform_scheme(place, method):
    fit = prepared(place, method=method)
    found = fit.measure(Silent())
    uniform = fit.uniform(found)
    assert {str(choice.uniform) for choice in uniform} >= {"w2a16-g128-sym", "w8a16-g32-sym", "nvfp4", "mxfp4"}
    for choice in uniform:
        budget = Budget(bpw=choice.bits_per_weight)
        fitted = fit.solve(found, budget)
        assert fitted.bits_per_weight <= choice.bits_per_weight * (1 + 1e-12)
        assert fitted.divergence <= choice.divergence * (1 + 1e-9)
        by_size = fit.solve(found, Budget(size=choice.file_bytes))
        assert by_size.file_bytes <= choice.file_bytes and by_size.divergence <= choice.divergence * (1 + 1e-6)
        by_loss = fit.solve(found, Budget(ppl_increase=choice.ppl_increase)) if choice.ppl_increase > 0 else fitted
        assert by_loss.bits_per_weight <= choice.bits_per_weight * (1 + 1e-9)
    for unit in fit.units:
        assert {name.rpartition(".")[2] for name in unit.names} in (
            {"q_proj", "k_proj", "v_proj"}, {"o_proj"}, {"gate_proj", "up_proj"}, {"down_proj"}
        )  # fmt: skip
    assert all(len(unit.names) == 1 for unit in prepared(place, format="native").units)


def words(place: Path, *budget: str | Path, model: str = "llama") -> list[str | Path]:
    run = ["fit", place / model, *budget, *FAST, "--dataset", place / "text.txt", "--out", place / "fit.toml"]
    return [*run, "--overwrite"]


@pytest.mark.parametrize(("format", "method"), [("compressed-tensors", "gptq"), ("native", "rtn")])
def test_the_recipe_keeps_the_budget(place, format, method):
    for budget in (("--bpw", "3.3"), ("--size", "0.42MB")):
        out = done(*words(place, *budget, "--format", format, "--method", method))
        assert "best uniform" in out and "chosen: " in out
        run = ["quantize", place / "llama", "--recipe", place / "fit.toml", *FAST, "--dataset", place / "text.txt"]
        done(*run, "--out", place / "run", "--overwrite")
        record = read_record(place / "run")
        assert record.result["format"] == format
        size = sum(path.stat().st_size for path in (place / "run").glob("*.safetensors"))
        if budget[0] == "--bpw":
            assert 3.2 < record.result["bits_per_weight"] <= 3.3
        else:
            assert 0.4e6 < size <= 0.42e6
        schemes = {name: str(q.scheme) for name, q in codes(place / "run").items()}
        assert len(set(schemes.values())) > 1
        if format != "native":
            for block in range(2):
                prefix = f"model.layers.{block}"
                assert len({schemes[f"{prefix}.self_attn.{n}_proj"] for n in "qkv"}) == 1
                assert schemes[f"{prefix}.mlp.gate_proj"] == schemes[f"{prefix}.mlp.up_proj"]


def test_the_same_seed_gives_the_same_recipe(place):
    done(*words(place, "--bpw", "2.9"))
    first = (place / "fit.toml").read_bytes()
    done(*words(place, "--bpw", "2.9"))
    assert (place / "fit.toml").read_bytes() == first


def test_refusals_that_say_what_works(place):
    message = refused(*words(place, "--bpw", "1.5"))
    assert "the smallest possible is 2.1250 bits per weight" in message and "pass --bpw 2.125" in message
    done(*words(place, "--bpw", "2.125"))
    message = refused(*words(place, "--size", "1KB"))
    assert "the smallest possible file has" in message
    done(*words(place, "--size", message.split("pass --size ")[1].split()[0]))
    for name in ("gptq", "awq"):
        message = refused(*words(place, "--bpw", "4.5", "--format", name))
        assert f"--format {name}: one file holds one scheme" in message or "no scheme on offer" in message
    message = refused(*words(place, "--max-ppl-increase", "0.000001%", "--schemes", "w2a16-g32,w3a16-g32"))
    assert "the least expected with the schemes on offer" in message
    share = message.split("pass --max-ppl-increase ")[1].split()[0]
    done(*words(place, "--max-ppl-increase", share, "--schemes", "w2a16-g32,w3a16-g32"))
    assert "--out" in refused(*words(place, "--bpw", "3")[:-1])
    assert "needs exactly one of --size" in refused(*words(place))
    assert "--method" in refused(*words(place, "--bpw", "3", "--method", "gpt"))
    assert "--format" in refused(*words(place, "--bpw", "3", "--format", "ggml"))
    assert "not a weight scheme" in refused(*words(place, "--bpw", "3", "--schemes", "w2"))


@pytest.mark.parametrize(
    ("size", "bpw", "increase", "word"),
    [
        ("six", None, None, "not a size"),
        ("6TB", None, None, "not a size"),
        (None, -1.0, None, "not a positive"),
        (None, float("nan"), None, "not a positive"),
        (None, None, "lots", "not a positive share"),
        (None, None, "-2%", "not a positive share"),
        ("6GB", 3.0, None, "exactly one"),
    ],
)
def test_budgets_that_are_none(size, bpw, increase, word):
    with pytest.raises(ToolkitError, match=word):
        parse_budget(size, bpw, increase)


def test_budgets():
    assert parse_budget("6GB", None, None).size == 6 * 10**9 and parse_budget("1.5 MiB", None, None).size == 3 * 2**19
    assert parse_budget(None, None, "2%").ppl_increase == parse_budget(None, None, "0.02").ppl_increase == 0.02
