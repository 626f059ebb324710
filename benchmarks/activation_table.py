"""Quantized inputs and caches with everything that makes them easier to round, on one model.

    python benchmarks/activation_table.py MODEL --dataset TRAIN --eval TEST --samples 8 --max-windows 4 --json FILE

One row per setting, each a `ptq quantize` in a process of its own: perplexity, KL from the float model, seconds and
peak memory, on the same calibration windows and the same windows of text. ``--rows`` takes some by name. A row is kept
in the file of ``--json`` when it is done, and not made again: a command that was stopped goes on where it was.
Quantized inputs and caches are simulated in float32 (kernel ``reference``), so that every row is computed in one way.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from table import Bench, add_arguments


def _pass(name: str, *settings: str) -> str:
    return "\n".join(["[[pass]]", f'name = "{name}"', *settings, ""])


SMOOTH = _pass("smoothquant", "search = true", "down = true")
ROTATE, GPTQ, RANGES = _pass("rotate"), _pass("gptq"), _pass("ranges")
REPQUANT = _pass("repquant")
CLIP = _pass("awq", "grid = 1")  # AWQ's search for clipping bounds alone: the only exponent of its scales is 0
RS = _pass("rs")
PUBLISHED_RS = _pass("rs", "group = 128", "block = 0", "attention = false")
DOWN_ONLY = _pass("rotate", "residual = false", "values = false")

ROWS: dict[str, tuple[str, str]] = {
    "w8a8-tensor rtn": ("w8a8-wtensor-atensor", ""),
    "w8a8 rtn": ("w8a8", ""),
    "w8a8 smoothquant alpha 0.5": ("w8a8", _pass("smoothquant")),
    "w8a8 smoothquant": ("w8a8", SMOOTH),
    "w8a8 outliertune": ("w8a8-asym", _pass("outliertune")),
    "w8a8 rotate": ("w8a8", ROTATE),
    "w8a8 rotate+gptq": ("w8a8", ROTATE + GPTQ),
    "fp8 rtn": ("fp8", ""),
    "static ranges, massive tokens static": ("w8a8-astatic", _pass("ranges", 'massive = "static"')),
    "static ranges": ("w8a8-astatic", RANGES),
    "static repquant": ("w8a8-astatic", REPQUANT + RANGES),
    "static repquant down": ("w8a8-astatic", _pass("repquant", "down = true") + RANGES),
    "static rotate": ("w8a8-astatic", ROTATE + RANGES),
    "static rotate+gptq": ("w8a8-astatic", ROTATE + RANGES + GPTQ),
    "w6a6 rtn": ("w6a6", ""),
    "w6a6 smoothquant": ("w6a6", SMOOTH),
    "w6a6 rotate+gptq": ("w6a6", ROTATE + GPTQ),
    "w4a4 rtn": ("w4a4", ""),
    "w4a4 smoothquant": ("w4a4", SMOOTH),
    "w4a4 rotate": ("w4a4", ROTATE),
    "w4a4 rotate+gptq": ("w4a4", ROTATE + GPTQ),
    "w4a4 rs+gptq": ("w4a4", RS + GPTQ),
    "w4a4 rrs published": ("w4a4", ROTATE + PUBLISHED_RS + GPTQ),
    "w4a4 rrs": ("w4a4", ROTATE + RS + GPTQ),
    "w4a4 rrs+gptaq": ("w4a4", ROTATE + RS + _pass("gptaq")),
    "w4a4 rrs, clipped, gptaq": ("w4a4", ROTATE + CLIP + RS + _pass("gptaq")),
    "w4a4 rs, rotated down": ("w4a4", DOWN_ONLY + _pass("rs", "transformed = false") + GPTQ),
    "w4a4 rs, rotated and smoothed down": ("w4a4", DOWN_ONLY + RS + GPTQ),
    "w4a4kv4 rotate+gptq": ("w4a4kv4", ROTATE + GPTQ),
    "w4a4kv4 rrs published": ("w4a4kv4", ROTATE + PUBLISHED_RS + GPTQ),
    "w4a4kv4 rrs": ("w4a4kv4", ROTATE + RS + GPTQ),
    "w4a4kv4 rrs, clipped, gptaq": ("w4a4kv4", ROTATE + CLIP + RS + _pass("gptaq")),
    "w4a4kv4 rrs+gptaq": ("w4a4kv4", ROTATE + RS + _pass("gptaq")),
}
"""Name -> scheme, and the passes of the recipe (rounding to nearest where none rounds)."""


def recipe_of(row: str) -> str:
    """The recipe file of a row."""
    scheme, passes = ROWS[row]
    return f'scheme = "{scheme}"\n{passes or _pass("rtn")}'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--rows", default=";".join(ROWS), help="names, separated by semicolons")
    args = parser.parse_args()
    known = json.loads(args.json.read_text())["rows"] if args.json and args.json.exists() else []
    rows = {row["method"]: row for row in known}
    bench = Bench.of(args, kernel="reference")
    with tempfile.TemporaryDirectory() as temporary:
        for name in (name for name in args.rows.split(";") if name not in rows):
            recipe = Path(temporary) / "recipe.toml"
            recipe.write_text(recipe_of(name))
            row = bench.row(str(recipe), ROWS[name][0], "--format", "native")
            rows[name] = {**row, "method": name}
            if args.json:
                bench.save([rows[name] for name in ROWS if name in rows], args.json)
    bench.report([rows[name] for name in ROWS if name in rows], args.json)


if __name__ == "__main__":
    main()
