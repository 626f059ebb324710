"""Measured frontier of ``ptq fit`` against every uniform setting, on one model, text, window and seed.

    python benchmarks/frontier.py demo
    python benchmarks/frontier.py MODEL --dataset train.txt --eval test.txt --bpw 2.25,3.125 --json frontier.json

Sensitivities are measured once. At every budget the fitted recipe and the best uniform setting within it (by measured
perplexity) stand side by side, with the divergence that the fit expected.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from table import Bench, add_arguments

from calibration.progress import Silent
from ptq.fitting.budget import Budget
from ptq.fitting.job import prepare_fit
from ptq.planning.job import Options

UNIFORM = ",".join(f"w{bits}a16-{group}-sym" for bits in (2, 3, 4) for group in ("g128", "g64", "g32"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--bpw", default="2.25,2.5,2.75,3.125,3.5,4.125,4.5,5")
    parser.add_argument("--uniform", default=UNIFORM, help="settings to compare with")
    parser.add_argument("--method", default="gptq")
    parser.add_argument("--format", default="compressed-tensors")
    args = parser.parse_args()

    bench = Bench.of(args)
    options = Options(dataset=args.dataset, samples=args.samples, seq_len=args.seq_len)
    fit = prepare_fit(args.model, method=args.method, format=args.format, options=options)
    begin = time.perf_counter()
    sensitivities = fit.measure(Silent())
    print(f"sensitivities: {time.perf_counter() - begin:.1f} s")
    rows = [bench.row(args.method, scheme) for scheme in args.uniform.split(",")]
    fitted = []
    for bpw in map(float, args.bpw.split(",")):
        choice = fit.solve(sensitivities, Budget(bpw=bpw))
        with TemporaryDirectory() as folder:
            recipe = Path(folder) / f"fit-{bpw:g}.toml"
            recipe.write_text(fit.recipe(choice, ""), encoding="utf-8")
            row = bench.row(str(recipe), f"fit {bpw:g}")
        fitted.append({**row, "method": args.method, "budget": bpw, "expected_kl": choice.divergence})
    bench.report(sorted(rows + fitted, key=lambda row: row["bits_per_weight"]), args.json)
    print("\n| budget | fit: bits | perplexity | KL | expected KL | best uniform | its perplexity | its KL |")
    print("| ---: | ---: | ---: | ---: | ---: | --- | ---: | ---: |")
    for row in fitted:
        within = [u for u in rows if u["bits_per_weight"] <= row["budget"] + 1e-9]
        best = min(within, key=lambda u: u["perplexity"], default=None)
        beside = "| | |" if best is None else f"{best['scheme']} | {best['perplexity']:.3f} | {best['kl']:.4f} |"
        print(
            f"| {row['budget']:g} | {row['bits_per_weight']:.4f} | {row['perplexity']:.3f} "
            f"| {row['kl']:.4f} | {row['expected_kl']:.4f} | {beside}"
        )


if __name__ == "__main__":
    main()
