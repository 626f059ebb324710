"""Whether what `ptq analyze` advises is the best of five recipes: 8 bits on both sides, and 4 bits.

    python benchmarks/doctor_table.py MODEL --dataset TRAIN --eval TEST --samples 8 --max-windows 4 --records FILE

The advice is made from the calibration text. Every recipe is a `ptq quantize` of its own on the same windows, scored on
the other text against the float model; one that the plan refuses is named with the reason. A row is kept in the file of
``--records`` and not made again. "best": no other recipe of its scheme has a smaller KL, but for less than the standard
error of its own or `NOTHING`.
"""

from __future__ import annotations

import argparse
import tempfile
from typing import Any

from table import Bench, add_arguments

import ptq
from calibration.model.opening import locate
from ptq.analysis.accepted import refusal_of
from ptq.planning.job import Options

FIVE = {
    "w8a8": ("rtn", "gptq", "smoothquant+gptq", "rotate+rtn", "rotate+gptq"),
    "w4a4": ("rtn", "smoothquant+gptq", "rotate+gptq", "rs+gptq", "rrs"),
}
NOTHING = 0.001
"""KL in nats that no test text would show."""


def verdict(advised: str, rows: dict[str, dict[str, Any]]) -> str:
    """Whether the advised recipe is the best of those that were carried out."""
    best = min(rows, key=lambda method: rows[method]["kl"])
    lost = rows[advised]["kl"] - rows[best]["kl"]
    if lost <= max(rows[advised]["kl_se"], NOTHING):
        return f"{advised} is the best" + ("" if advised == best else f" ({best} is {lost:.4f} better, which is noise)")
    return f"{advised} is {lost:.4f} nats worse than {best}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    args = parser.parse_args()
    bench = Bench.of(args, kernel="reference")
    with tempfile.TemporaryDirectory() as temporary:
        text = {"dataset": args.dataset, "samples": args.samples, "seq_len": args.seq_len}
        found = ptq.analyze(args.model, out=f"{temporary}/analysis", dtype=args.dtype or "auto", **text)
    advised = {scheme: method for method, scheme in reversed(found.advice[-1].recipes)}  # the first of a scheme counts
    refusal = refusal_of(locate(args.model), Options(args.dataset, args.samples, args.seq_len))
    print(f"float perplexity {bench.base.perplexity:.3f}; advised: {found.advice[-1].recipes}")
    print("| scheme | method | advised | perplexity | KL | CPU s | peak GB |")
    print("| --- | --- | --- | ---: | ---: | ---: | ---: |")
    for scheme, methods in FIVE.items():
        rows: dict[str, dict[str, Any]] = {}
        for method in methods:
            said = "yes" if advised.get(scheme) == method else ""
            reason = refusal(method, scheme)
            if reason is not None:
                print(f"| `{scheme}` | `{method}` | {said} | refused: {reason} | | | |", flush=True)
                continue
            row = rows[method] = bench.row(method, scheme, "--format", "native")
            print(
                f"| `{scheme}` | `{method}` | {said} | {row['perplexity']:.2f} | {row['kl']:.4f} ± {row['kl_se']:.4f} "
                f"| {row['cpu_seconds']:.0f} | {row['peak_gb']:.2f} |",
                flush=True,
            )
        print(f"\n{scheme}: {verdict(advised[scheme], rows) if advised.get(scheme) in rows else 'nothing advised'}\n")


if __name__ == "__main__":
    main()
