"""Kumar et al. 2024 (arXiv 2411.04330): values worked out from the formulas, and a fit that gives back what made it."""

from __future__ import annotations

import math

import numpy as np
import pytest

from calibration.errors import ToolkitError
from ptq.study.precision_law import Measurement, PrecisionLaw, fit, outside, predict

LAW = PrecisionLaw(0.0598, 0.5907)
"""The published form with some factor and slope; the worked values below are its."""

# (N, D) -> delta at P = 2, 3, 4, 5, 6, 8
TABLE = {
    (1e8, 1e10): (0.4198, 0.07724, 0.01421, 0.002615, 4.81e-4, 1.628e-5),
    (1e9, 2e10): (0.2702, 0.04972, 0.009147, 0.001683, 3.096e-4, 1.048e-5),
    (7e9, 2e12): (1.428, 0.2627, 0.04833, 0.008893, 0.001636, 5.538e-5),
}


@pytest.mark.parametrize(("size", "expected"), TABLE.items())
def test_increase_against_worked_values(size, expected):
    found = [LAW.increase(*size, bits) for bits in (2, 3, 4, 5, 6, 8)]
    assert found == pytest.approx(expected, rel=1e-3)


def test_one_factor_per_step():
    """Doubling D, doubling N, one bit more: 2^0.5068, 2^-0.3439, exp(-1 / 0.5907)."""
    base = LAW.increase(1e9, 1e11, 3)
    assert LAW.increase(1e9, 2e11, 3) / base == pytest.approx(2**0.5068, rel=1e-12)
    assert LAW.increase(2e9, 1e11, 3) / base == pytest.approx(2**-0.3439, rel=1e-12)
    assert LAW.increase(1e9, 1e11, 4) / base == pytest.approx(math.exp(-1 / 0.5907), rel=1e-12)


def test_perplexity_ratio_is_the_exponential():
    (found,) = predict(7e9, 2e12, [3], LAW)
    assert found.ratio == pytest.approx(math.exp(0.2627), rel=1e-3) and found.measurable
    assert not predict(1e8, 1e10, [8], LAW)[0].measurable


def measurements(law, sizes, bits, noise=0.0):
    return [Measurement(f"{n:g} {d:g} {p:g}", n, d, p, law.increase(n, d, p), noise) for n, d in sizes for p in bits]


def test_refit_recovers_the_constants():
    law = PrecisionLaw(0.031, 0.47, 0.61, 0.42)
    sizes = [(1e8, 1e9), (1e8, 1e10), (1e9, 1e10), (3e9, 5e10)]
    found = fit(measurements(law, sizes, (2, 3, 4.125)))
    for name in ("coefficient", "data_exponent", "parameter_exponent", "bits_scale"):
        assert getattr(found.law, name) == pytest.approx(getattr(law, name), rel=1e-6)
    assert found.assumed == () and found.rms < 1e-9


@pytest.mark.parametrize(
    ("sizes", "assumed"),
    [
        ([(1e9, 1e11)], ("data_exponent", "parameter_exponent")),
        ([(1e9, 1e10), (1e9, 1e11)], ("parameter_exponent",)),
        ([(1e8, 1e11), (1e9, 1e11)], ("data_exponent",)),
        ([(1e8, 2e9), (1e9, 2e10)], ("data_exponent",)),  # data in proportion to size: one exponent of the two
    ],
)
def test_what_measurements_do_not_determine_stays_published(sizes, assumed):
    law = PrecisionLaw(coefficient=0.02, bits_scale=0.4)
    found = fit(measurements(law, sizes, (2, 3, 4)))
    assert found.assumed == assumed
    assert found.law.bits_scale == pytest.approx(0.4, rel=1e-6)
    for n, d in sizes:
        assert found.law.increase(n, d, 5) == pytest.approx(law.increase(n, d, 5), rel=1e-6)


def test_increases_below_twice_their_noise_do_not_enter():
    good = measurements(LAW, [(1e9, 1e11)], (2, 3, 4), noise=1e-3)
    noisy = Measurement("w8", 1e9, 1e11, 8, 0.5, noise=0.3)
    negative = Measurement("w6", 1e9, 1e11, 6, -1e-4)
    found = fit([*good, noisy, negative])
    assert found.excluded == ("w8", "w6") and found.law.bits_scale == pytest.approx(LAW.bits_scale, rel=1e-6)


def test_residuals_are_reported():
    rng = np.random.default_rng(0)
    exact = measurements(LAW, [(1e9, 1e11)], np.linspace(2, 5, 200))
    noisy = [Measurement(m.label, m.parameters, m.tokens, m.bits, m.increase * e) for m, e in
             zip(exact, np.exp(0.1 * rng.standard_normal(200)), strict=True)]  # fmt: skip
    assert fit(noisy).rms == pytest.approx(0.1, rel=0.1)


def test_no_slope_no_fit():
    with pytest.raises(ToolkitError, match="no slope to fit"):
        fit(measurements(LAW, [(1e9, 1e11), (1e8, 1e11)], (3,)))
    with pytest.raises(ToolkitError, match="does not fall"):
        fit([Measurement("a", 1e9, 1e11, 3, 0.1), Measurement("b", 1e9, 1e11, 4, 0.2)])


def test_range_of_the_published_fit():
    assert outside(1e8, 1e10, (3, 4)) == ()
    assert len(outside(8e9, 15e12, (1.5,))) == 3
