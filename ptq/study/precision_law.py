"""The precision scaling law: what rounding the weights of a trained model to P bits adds to its loss.

Kumar et al. 2024, "Scaling Laws for Precision" (arXiv 2411.04330). With N non-embedding parameters and D training
tokens, a model trained in high precision loses, in nats per token,

    delta(N, D, P) = C_T D^gD / N^gN exp(-P / g_post),

where D and N only scale what one model shows: its runs at two numbers of bits give the slope and the factor.

The exponents gD and gN are the published ones, which a second source confirms. The paper's other constants are not in
this module: they could not be looked up, and its authors warn that none carries over to other models. C_T and g_post
come from runs of one's own (`fit`). The form was tested on models of 30 to 220 million parameters (checked up to 1.7
billion) and at most 26 billion tokens, with GPTQ-like rounding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from calibration.errors import ToolkitError

FITTED_PARAMETERS = (3e7, 1.7e9)
FITTED_TOKENS = 2.6e10
FITTED_BITS = (2.0, 8.0)
MEASURABLE = 1e-3
"""Nats per token. Smaller differences drown in the paired standard error of a test text of some 100 000 tokens."""
EXAMPLE = "give e.g. 8e9 parameters, 15e12 tokens, 3 bits"


@dataclass(frozen=True)
class PrecisionLaw:
    """delta = coefficient D^data_exponent / N^parameter_exponent exp(-bits / bits_scale), see the module."""

    coefficient: float
    bits_scale: float
    data_exponent: float = 0.5068
    parameter_exponent: float = 0.3439

    def increase(self, parameters: float, tokens: float, bits: float) -> float:
        """Nats per token that ``bits`` stored bits per weight (scales and zero points included) add to the loss."""
        powers = self.data_exponent * math.log(tokens) - self.parameter_exponent * math.log(parameters)
        return self.coefficient * math.exp(powers - bits / self.bits_scale)


@dataclass(frozen=True)
class Prediction:
    """For one model and one number of bits.

    Attributes:
        increase: nats per token; ``ratio`` of perplexities is its exponential.
    """

    bits: float
    increase: float
    ratio: float

    @property
    def measurable(self) -> bool:
        """Whether a test set of usual length would show it."""
        return self.increase >= MEASURABLE


def predict(parameters: float, tokens: float, bits: Sequence[float], law: PrecisionLaw) -> tuple[Prediction, ...]:
    """What rounding to each of ``bits`` costs a model of ``parameters`` that was trained on ``tokens``.

    Raises:
        ToolkitError: a number that is not positive, or so far out that the law overflows.
    """
    for name, value in [("--params", parameters), ("--tokens", tokens), *(("--bits", b) for b in bits)]:
        if not 0 < value < math.inf:
            raise ToolkitError(
                f"{name} {value:g}: not a positive number", "give e.g. 8e9 parameters, 15e12 tokens, 3 bits"
            )
    found = []
    for b in bits:
        try:
            increase = law.increase(parameters, tokens, b)
            ratio = math.exp(increase)
        except OverflowError:
            raise ToolkitError(
                f"--params {parameters:g} --tokens {tokens:g} --bits {b:g}: the law gives no finite number there",
                EXAMPLE,
            ) from None
        found.append(Prediction(b, increase, ratio))
    return tuple(found)


def outside(parameters: float, tokens: float, bits: Sequence[float]) -> tuple[str, ...]:
    """In words, every respect in which a prediction leaves the range of the published fit."""
    found = []
    low, high = FITTED_PARAMETERS
    if not low <= parameters <= high:
        found.append(f"{parameters:.3g} parameters (the law: {low:.3g} to {high:.3g})")
    if tokens > FITTED_TOKENS:
        found.append(f"{tokens:.3g} training tokens (the law: at most {FITTED_TOKENS:.3g})")
    far = [b for b in bits if not FITTED_BITS[0] <= b <= FITTED_BITS[1]]
    if far:
        shown = ", ".join(f"{b:g}" for b in far)
        found.append(f"{shown} bits (the law: {FITTED_BITS[0]:g} to {FITTED_BITS[1]:g})")
    return tuple(found)


@dataclass(frozen=True)
class Measurement:
    """A loss increase somebody measured.

    Attributes:
        label: where it is from.
        parameters, tokens, bits: non-embedding parameters; training tokens; stored bits per weight.
        increase: nats per token, quantized minus float on the same tokens; ``noise`` its standard error.
    """

    label: str
    parameters: float
    tokens: float
    bits: float
    increase: float
    noise: float = 0.0

    @property
    def usable(self) -> bool:
        return self.increase > 0 and self.increase >= 2 * self.noise


@dataclass(frozen=True)
class Fit:
    """A law fitted to measurements.

    Attributes:
        assumed: names of the exponents that the measurements do not determine; they keep their published values.
        used, excluded: labels; excluded are those below twice their noise.
        rms: root mean square of ln(measured / fitted) over those used.
    """

    law: PrecisionLaw
    assumed: tuple[str, ...]
    used: tuple[str, ...]
    excluded: tuple[str, ...]
    rms: float


def fit(measurements: Sequence[Measurement]) -> Fit:
    """Least squares on ln delta = c + gD ln D - gN ln N - P / g.

    With one model only the slope over bits and the factor can be known; with models of one size or one amount of data
    one more exponent. The others keep their published values, which does not change predictions for such models.

    Raises:
        ToolkitError: fewer than two usable measurements, or all of one number of bits, or a loss that does not fall
            with bits.
    """
    used = [m for m in measurements if m.usable]
    excluded = tuple(m.label for m in measurements if not m.usable)
    widths = len({m.bits for m in used})
    if widths < 2:
        raise ToolkitError(
            f"{len(used)} of {len(measurements)} measurements can be used, with {widths} different numbers of bits: "
            "no slope to fit",
            "measure at two or more numbers of bits, low enough for a loss increase of twice its standard error",
        )
    published = PrecisionLaw(1.0, 1.0)
    columns = {
        "data_exponent": np.log([m.tokens for m in used]),
        "parameter_exponent": -np.log([m.parameters for m in used]),
    }
    target = np.log([m.increase for m in used])
    always = np.column_stack((np.ones(len(used)), [-m.bits for m in used]))
    for assumed in ((), ("data_exponent",), ("parameter_exponent",), ("data_exponent", "parameter_exponent")):
        free = [name for name in columns if name not in assumed]
        design = np.column_stack((always, *(columns[name] for name in free)))
        rest = target - sum(getattr(published, name) * columns[name] for name in assumed)
        centred = design[:, 1:] - design[:, 1:].mean(axis=0)
        if np.linalg.matrix_rank(centred, tol=1e-9) == centred.shape[1]:
            break
    solution = np.linalg.lstsq(design, rest, rcond=None)[0]
    if solution[1] <= 0:
        raise ToolkitError(
            "the measured loss does not fall with the number of bits", "check that the runs differ in bits alone"
        )
    law = replace(
        published,
        coefficient=math.exp(solution[0]),
        bits_scale=1 / float(solution[1]),
        **dict(zip(free, map(float, solution[2:]), strict=True)),
    )
    residual = rest - design @ solution
    return Fit(law, assumed, tuple(m.label for m in used), excluded, float(np.sqrt(np.mean(residual**2))))
