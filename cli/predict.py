"""``ptq predict``"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli.json_output import Json, json_output

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ptq.study.forecast import Forecast
    from ptq.study.precision_law import Fit, Prediction


def predict(
    runs: Annotated[
        list[Path] | None,
        typer.Argument(
            help="What the law is fitted to: run folders of one model (with --eval), or a .csv table with the columns "
            "params,tokens,bits,delta and optionally noise.",
            metavar="RUN...",
        ),
    ] = None,
    params: Annotated[
        float | None, typer.Option(help="Parameters without embeddings: 8e9. Default: those of the runs' model.")
    ] = None,
    tokens: Annotated[float | None, typer.Option(help="Tokens the model was trained on: 15e12.")] = None,
    bits: Annotated[
        str, typer.Option(help="Stored bits per weight, comma-separated. With scales: w4a16-g128 has 4.125.")
    ] = "2,3,4,5,6,8",
    json: Json = None,
) -> None:
    """What rounding to so many bits will add to the loss, by the precision scaling law (Kumar et al. 2024).

    Examples:

      ptq predict measured.csv --params 8e9 --tokens 15e12 --bits 3

      ptq predict runs/w2 runs/w3 runs/w4 --tokens 15e12 --bits 2.25,5
    """
    widths = _numbers(bits)
    with json_output(json) as write_json:
        import ptq

        found = ptq.predict(runs or (), params=params, tokens=tokens, bits=widths)
        print(f"{found.parameters:.3g} parameters without embeddings, {found.tokens:.3g} training tokens\n")
        for line in _table(found.predictions):
            print(line)
        print()
        for line in _source(found.fit, found.outside):
            print(line)
        write_json(_as_json(found))


def _numbers(text: str) -> list[float]:
    from calibration.errors import ToolkitError

    try:
        return [float(word) for word in text.split(",")]
    except ValueError:
        raise ToolkitError(f"--bits {text}: not numbers", "write them as 3 or 2,3,4.125") from None


def _table(predictions: Sequence[Prediction]) -> list[str]:
    from ptq.study.precision_law import MEASURABLE

    lines = ["| bits | loss, nats per token | perplexity |", "| ---: | ---: | ---: |"]
    for p in predictions:
        increase = f"+{p.increase:.2g}" if p.measurable else f"+{p.increase:.2g} (< noise, {MEASURABLE:g})"
        lines.append(f"| {p.bits:g} | {increase} | × {p.ratio:.3g} |")
    return lines


def _source(fitted: Fit, far: Sequence[str]) -> list[str]:
    law = fitted.law
    lines = [
        f"Fitted to {len(fitted.used)} measurements: {law.coefficient:.4g} D^{law.data_exponent:.4g} / "
        f"N^{law.parameter_exponent:.4g} exp(-P / {law.bits_scale:.4g}); "
        f"residuals x {2.718281828459045**fitted.rms:.3g} (rms)."
    ]
    if fitted.assumed:
        names = " and ".join(name.replace("_exponent", "") for name in fitted.assumed)
        lines.append(f"The exponents of {names} are the published ones: these measurements do not determine them.")
    if fitted.excluded:
        lines.append(f"Left out, below twice their noise: {', '.join(fitted.excluded)}.")
    if far:
        lines.append(f"Outside the range in which the form of the law was tested: {'; '.join(far)}.")
    return lines


def _as_json(found: Forecast) -> dict[str, Any]:
    import dataclasses

    return {
        "parameters": found.parameters,
        "tokens": found.tokens,
        "law": dataclasses.asdict(found.fit.law),
        "fit": dataclasses.asdict(found.fit),
        "outside": list(found.outside),
        "predictions": [dataclasses.asdict(p) for p in found.predictions],
    }
