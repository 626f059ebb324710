"""Below four bits, sorted by true bits per weight: every method, with and without repairs, integers and floats.

    python benchmarks/low_bit_table.py demo
    python benchmarks/low_bit_table.py MODEL --dataset train.txt --eval test.txt --only W3,FP4 --json low.json

Bits count everything stored: codes, scales, zero points, low-rank factors. See ``table.py`` for how rows are measured.
"""

from __future__ import annotations

import argparse
import re

from table import Bench, add_arguments

METHODS = ("rtn", "gptq", "awq", "awq+gptq", "rtn-ada", "gptq-ada")
REPAIRS = ("", "+lorc")
FLOAT_METHODS = ("rtn", "gptq", "fp4", "fp4+gptq")

SETS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    **{
        f"W{bits}": (
            tuple(method + repair for repair in REPAIRS for method in METHODS),
            tuple(f"w{bits}a16-{group}-sym" for group in ("g128", "g64")),
        )
        for bits in (4, 3, 2)
    },
    "INT4": (("rtn", "gptq", "awq+gptq"), ("w4a16-g32-sym",)),
    "FP4": (FLOAT_METHODS, ("fp4-e2m1-g128", "fp4-e2m1-g64", "fp4-e2m1-g32", "mxfp4", "nvfp4")),
    "E3M0": (("rtn", "gptq"), ("fp4-e3m0-g128", "fp4-e1m2-g128")),
    "TWEAK": (
        tuple(f"{method}+norm-tweak" for method in METHODS),
        tuple(f"w{bits}a16-g128-sym" for bits in (4, 3, 2)),
    ),
    "INPUTS": (
        ("rtn", "gptq"),
        (
            "w4a8-g128",
            "fp4-e2m1-g128-a8",
            "w4a4-g128",
            "w4a4-g128-ag128",
            "fp4-e2m1-g128-afp4",
            "fp4-e2m1-g128-afp4-ag128",
        ),
    ),
    "FPINPUTS": (("fp4", "exponent-shift+fp4"), ("fp4-e2m1-g128-a8", "fp4-e2m1-g128-afp4", "fp4-e2m1-g128-afp4-ag128")),
    "ONE": (("ptq1.61",), ("w1a16-salient20", "w1a16-salient0")),
}
"""Name of a part of the table -> its methods and its schemes."""


def native(method: str, scheme: str) -> bool:
    """Whether compressed-tensors holds no such thing, or not everywhere."""
    kept = any(name in method for name in ("lorc", "-ada", "ptq1.61", "exponent-shift"))
    return kept or any(inputs in scheme for inputs in ("a8", "a4", "afp4"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--only", default=",".join(SETS), help=f"parts of the table: {', '.join(SETS)}")
    parser.add_argument("--match", default="", help="only rows whose 'METHOD SCHEME' this regular expression finds")
    args = parser.parse_args()
    bench = Bench.of(args)
    rows = []
    for methods, schemes in (SETS[name] for name in args.only.split(",")):
        for scheme in schemes:
            for method in (m for m in methods if re.search(args.match, f"{m} {scheme}")):
                stored = ("--format", "native") if native(method, scheme) else ()
                rows.append(bench.row(method, scheme, *stored))
    bench.report(sorted(rows, key=lambda row: (row["bits_per_weight"], row["perplexity"])), args.json)


if __name__ == "__main__":
    main()
