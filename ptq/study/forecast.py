"""`Forecast`: predictions of the precision law for one model, with the law that they come from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from calibration.errors import ToolkitError
from calibration.shown import Shown
from ptq.study.measured import read_measurements
from ptq.study.precision_law import Fit, Prediction, fit, outside, predict


@dataclass(frozen=True, repr=False)
class Forecast(Shown):
    """Predictions for a model of ``parameters`` (without embeddings) that was trained on ``tokens``.

    Attributes:
        fit: the law fitted to runs.
        outside: in words, where the model leaves the range of the published fit.
    """

    parameters: float
    tokens: float
    predictions: tuple[Prediction, ...]
    fit: Fit
    outside: tuple[str, ...]

    def facts(self) -> Mapping[str, object]:
        return {
            "model": f"{self.parameters:.3g} parameters, {self.tokens:.3g} training tokens",
            "law": f"fitted to {len(self.fit.used)} measurements",
            **{
                f"{p.bits:g} bits": f"+{p.increase:.2g} nats per token, perplexity x {p.ratio:.3g}"
                for p in self.predictions
            },
        }


def forecast(runs: Sequence[Path], params: float | None, tokens: float | None, bits: Sequence[float]) -> Forecast:
    """Fit the law to ``runs`` and predict.

    Raises:
        ToolkitError: see `ptq.predict`.
    """
    if not runs:
        reason = "the law has a factor and a slope of its own for every model and method, and no run tells them"
        raise ToolkitError(reason, "pass runs of one model at two or more numbers of bits, or a .csv table")
    measured = read_measurements(runs, tokens)
    if tokens is None:
        raise ToolkitError("--tokens is missing", "say how many tokens the model was trained on, e.g. --tokens 15e12")
    if params is None:
        sizes = {m.parameters for m in measured}
        if len(sizes) != 1:
            raise ToolkitError("--params is missing", "say how many parameters the model has, e.g. --params 8e9")
        params = sizes.pop()
    fitted = fit(measured)
    predictions = predict(params, tokens, bits, fitted.law)
    return Forecast(params, tokens, predictions, fitted, outside(params, tokens, bits))
