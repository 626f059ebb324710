"""LLM-FP4 on activations: the pre-shifted exponent bias, its search, and inputs on grids of floats in whole runs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from command import done, refused, run_ptq, text_file, tiny
from test_exact_passes import logits_around
from test_oracles_llm_fp4 import randn

from calibration.record import read_record
from ptq.methods import ExponentShift
from ptq.numerics import floats
from ptq.numerics.activations import fake_quantize_inputs
from ptq.numerics.exponent_shift import channel_shifts
from ptq.scheme import E2M1, FloatFormat, parse_scheme

torch.set_num_threads(1)
FORMATS = pytest.mark.parametrize("number", [E2M1, FloatFormat(3, 0), FloatFormat(1, 2), FloatFormat(4, 3)], ids=str)


def quantize_shifted(x: torch.Tensor, number: FloatFormat, rho: float, n: torch.Tensor) -> torch.Tensor:
    """Q(X_j; rho + n_j) for ``X [tokens, in]`` and n ``[in]``."""
    return floats.nearest_with_bias(x, number, rho + n)


def power(n: torch.Tensor) -> torch.Tensor:
    return floats.power_of_two(n, torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_one_bias_gives_one_grid_wherever_it_lies_in_memory(dtype):
    """Scalar and vector code of a library's 2^x differ by a unit in the last place in one value of twelve."""
    x = randn(16).to(dtype)
    for bias in (randn(100, seed=5) * 4).to(dtype):
        expected = floats.nearest_with_bias(x, E2M1, float(bias))
        assert torch.equal(floats.nearest_with_bias(x, E2M1, bias), expected)
        assert torch.equal(floats.nearest_with_bias(x, E2M1, bias.expand(16).contiguous()), expected)
        assert torch.equal(floats.nearest_with_bias(x, E2M1, bias.expand(16, 3).contiguous()[:, 1]), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_powers_of_two_are_exact(dtype):
    n = list(range(-126, 128))
    expected = torch.tensor([2.0**k for k in n], dtype=dtype)
    assert torch.equal(floats.power_of_two(torch.tensor(n), dtype), expected)
    assert torch.equal(floats.power_of_two(torch.tensor(n, dtype=dtype), dtype), expected)
    b = -torch.rand(1000, dtype=dtype)
    assert torch.allclose(floats._power_of_fraction(b), torch.exp2(b), rtol=4 * torch.finfo(dtype).eps, atol=0)


def inputs(spread: float = 2.0) -> torch.Tensor:
    """Tokens whose channels have magnitudes over ``10^spread``."""
    order = torch.randperm(64, generator=torch.Generator().manual_seed(7))
    return randn(200, 64) * torch.logspace(-spread, 0, 64, dtype=torch.float64)[order]


@FORMATS
def test_oracle_4_a_shift_moves_into_the_weights(number):
    """4. Q(X_j; rho + n_j) = 2^-n_j Q(2^n_j X_j; rho), to the bit; the output with the shift on the weights' side
    equals the unfolded one."""
    x, w = inputs(), randn(32, 64, seed=3)
    n, rho = channel_shifts(x.abs().amax(dim=0), number)
    rho = round(rho * 2**20) / 2**20  # so that rho + n_j is exact
    shifted = quantize_shifted(x, number, rho, n)
    folded = floats.nearest_with_bias(x * power(n), number, rho)
    assert torch.equal(shifted, folded * power(-n))
    assert torch.allclose(shifted @ w.T, folded @ (w * power(-n)).T, rtol=1e-12)


@FORMATS
def test_oracle_5_shifts(number):
    """5. n_j = 0 for the largest channel and in 0 .. 2^E - 1; equal channels have no shifts; dead ones the largest."""
    x = inputs(6.0)
    maxima = x.abs().amax(dim=0)
    n, rho = channel_shifts(maxima, number)
    assert n[maxima.argmax()] == 0 and n.min() == 0 and n.max() == 2**number.exponent_bits - 1
    assert rho == pytest.approx(float(floats.bias_of(maxima.max(), number)))
    equal, plain = channel_shifts(torch.full((8,), 3.0, dtype=torch.float64), number)
    assert not bool(equal.any())
    assert torch.equal(
        quantize_shifted(x[:, :8], number, plain, equal), floats.nearest_with_bias(x[:, :8], number, plain)
    )
    maxima[5] = 0
    assert channel_shifts(maxima, number)[0][5] == 2**number.exponent_bits - 1


def test_shifts_help_where_channels_differ():
    x, w = inputs(), randn(32, 64, seed=3)
    n, rho = channel_shifts(x.abs().amax(dim=0), E2M1)

    def error(n: torch.Tensor) -> float:
        return float(((quantize_shifted(x, E2M1, rho, n) - x) @ w.T).square().sum())

    assert error(n) < error(torch.zeros_like(n))


def test_inputs_of_four_bits():
    """E2M1 per token: the published quantizer with the bias of the token's largest value."""
    quant = parse_scheme("fp4-e2m1-g32-afp4").inputs
    assert quant is not None
    x = inputs().float()
    found = fake_quantize_inputs(x, quant)
    biases = floats.bias_of(x.abs().amax(dim=1, keepdim=True).double(), E2M1)
    expected = floats.nearest_with_bias(x.double(), E2M1, biases)
    assert (found - expected).abs().max() <= 1e-5 * x.abs().max()
    assert torch.equal(fake_quantize_inputs(found, quant), found)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shift")
    text_file(folder / "text.txt")
    tiny(folder / "llama", intermediate_size=128)
    return folder


def words(place: Path, method: str, scheme: str) -> list[str | Path]:
    run = ["quantize", place / "llama", "--method", method, "--scheme", scheme, "--samples", "4", "--seq-len", "32"]
    return [*run, "--dataset", place / "text.txt", "--format", "native", "--out", place / "run", "--overwrite"]


@pytest.mark.parametrize("scheme", ["fp4-e2m1-g32-afp4", "fp4-e2m1-g32-afp8", "nvfp4-ag16-afp4", "w4a4-g32"])
def test_runs(place, scheme):
    done(*words(place, "exponent-shift+fp4+gptq" if scheme[0] != "w" else "exponent-shift+gptq", scheme))
    record = read_record(place / "run")
    assert any("exponent-shift.mean" in entry.notes for entry in record.linears)
    assert {entry.scheme.split("-")[-1] for entry in record.linears} <= {"atoken", "ag16"}
    done("generate", place / "run", "--prompt", "12", "--max-new-tokens", 2)


def test_static_inputs_are_calibrated(place):
    done(*words(place, "exponent-shift+ranges+rtn", "fp4-e2m1-g32-afp4-astatic"))
    assert "input_scale" in (place / "run" / "model.safetensors").read_bytes()[:20000].decode("latin1")


@pytest.mark.parametrize("family", ["llama", "llama-tied-bias", "gemma2", "opt", "gpt2", "falcon-40b", "mixtral"])
def test_oracle_10_logits_stay_the_same_to_the_bit(tmp_path, family):
    """10. The fold of 2^n_j into producers and columns leaves the float model as it was, exactly: powers of two."""
    before, after, _, segments = logits_around(family, ExponentShift(), torch.float32, tmp_path)
    assert any(float(notes["exponent-shift.mean"]) > 0 for s in segments for notes in s.notes.values())
    assert torch.equal(before, after) if family != "mixtral" else torch.allclose(before, after, rtol=1e-5)


def test_refusals(place):
    for scheme in ("w4afp4-g32", "nvfp4-afp4"):
        run = words(place, "rtn", scheme)
        run[run.index("native")] = "compressed-tensors"
        assert "has 4-bit float inputs" in _message(run)
    assert "exponent-shift.exponent_bits: 4" in _refused(place, "exponent_bits = 4")
    assert "exponent-shift.mantissa_bits: 9" in _refused(place, "mantissa_bits = 9")


def _message(run: list[str | Path]) -> str:
    result = run_ptq(*run)
    assert result.code == 2
    return result.err


def _refused(place: Path, setting: str) -> str:
    recipe = place / "bad.toml"
    recipe.write_text(f'scheme = "w4a16-g32"\n[[pass]]\nname = "exponent-shift"\n{setting}\n')
    run = words(place, "rtn", "w4a16-g32")
    run[2:6] = ["--recipe", recipe]
    return refused(*run)
