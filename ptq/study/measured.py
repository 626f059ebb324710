"""Loss increases as measurements for the precision law: from finished runs, or from a table of one's own."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from pathlib import Path

from calibration.errors import ToolkitError
from calibration.model.reading import read_text
from calibration.record import read_record
from ptq.report.compare import is_evaluations
from ptq.study.precision_law import Measurement

COLUMNS = ("params", "tokens", "bits", "delta")


def read_measurements(paths: Sequence[Path], tokens: float | None) -> tuple[Measurement, ...]:
    """Measurements of run folders, ``report.json`` files and ``.csv`` tables.

    Args:
        tokens: training tokens of the one model that the runs quantized; tables have a column for it.

    Raises:
        ToolkitError: a run without ``--eval``, runs of several models, a run with linears left in float; a table
            without the columns params, tokens, bits, delta (nats per token; noise is optional), or with bad numbers.
    """
    found: list[Measurement] = []
    models: dict[str, str] = {}
    for path in paths:
        if path.suffix == ".csv":
            found += _read_table(path)
            continue
        measured, fingerprint = _read_run(path, tokens)
        found.append(measured)
        models.setdefault(fingerprint, str(path))
    if len(models) > 1:
        raise ToolkitError(
            f"runs of {len(models)} models ({', '.join(models.values())}): each was trained on tokens of its own",
            f"write a .csv with the columns {','.join(COLUMNS)} and name that instead",
        )
    return tuple(found)


def _read_run(path: Path, tokens: float | None) -> tuple[Measurement, str]:
    """A run as a measurement, and the fingerprint of its float model."""
    if path.suffix == ".json" and is_evaluations(path):
        raise ToolkitError(
            f"{path}: a file of `ptq eval` does not say how many bits a weight has", "name the run's folder"
        )
    record = read_record(path)
    quantized = next((e for e in record.evaluations if e.divergence is not None), None)
    if quantized is None or quantized.divergence is None:
        raise ToolkitError(f"{path}: not evaluated", "repeat the run with --eval DATASET")
    partly = [entry for entry in record.left if entry["what"] == "linears of the blocks"]
    if partly:
        raise ToolkitError(
            f"{path}: {partly[0]['count']} linears of the blocks stay in float, the law is for all of them",
            "fit to runs that quantize every linear",
        )
    if tokens is None:
        raise ToolkitError(f"{path}: a run does not say what its model was trained on", "add --tokens, e.g. 15e12")
    measured = _measurement(
        label=path.parent.name if path.suffix == ".json" else path.name,
        parameters=record.result["quantized_weights"],
        tokens=tokens,
        bits=record.result["bits_per_weight"],
        increase=quantized.divergence.delta_nll,
        noise=quantized.divergence.delta_nll_se,
    )
    return measured, record.model["fingerprint"]


def _measurement(
    label: str, parameters: float, tokens: float, bits: float, increase: float, noise: float
) -> Measurement:
    """One whose numbers the law can be fitted to."""
    if not all(0 < value < math.inf for value in (parameters, tokens, bits)):
        raise ToolkitError(f"{label}: params, tokens and bits must be positive numbers", "correct it or leave it out")
    if not (math.isfinite(increase) and 0 <= noise < math.inf):
        raise ToolkitError(
            f"{label}: delta and noise must be finite, and noise not negative", "correct it or leave it out"
        )
    return Measurement(label, float(parameters), tokens, bits, increase, noise)


def _read_table(path: Path) -> list[Measurement]:
    text = read_text(path, "give a .csv file in UTF-8")
    rows = csv.DictReader(text.splitlines())
    missing = [name for name in COLUMNS if name not in (rows.fieldnames or ())]
    if missing:
        raise ToolkitError(
            f"{path}: no column {', '.join(missing)}", f"name the columns in the first line: {','.join(COLUMNS)}"
        )
    found = []
    for row in rows:
        label = f"{path.name} line {rows.line_num}"
        try:
            params, tokens, bits, delta = (float(row[name] or "") for name in COLUMNS)
            noise = float(row.get("noise") or 0)
        except ValueError as error:
            raise ToolkitError(f"{label}: {error}", "write plain numbers such as 8e9") from None
        found.append(_measurement(label, params, tokens, bits, delta, noise))
    return found
