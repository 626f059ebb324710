"""ptq, auto-round and llm-compressor's GPTQ at 3 and 2 bits, symmetric groups of 128: perplexity, KL, wall time, peak.

    python benchmarks/low_bit_side_by_side.py MODEL --dataset train.txt --eval test.txt --other OTHER/bin/python

``--other`` is the environment of ``side_by_side.py`` with ``pip install auto-round==0.15.1`` on top. All get the same
token ids, every run is a process of its own, and one reader scores them all in float32.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from side_by_side import HERE, measured, ours, scores, theirs, tokens_file


def auto_round(python: str, model: Path, tokens: Path, bits: int, out: Path) -> tuple[Path, dict[str, float]]:
    """The folder with the rounded model, and what the run took."""
    result = out.with_suffix(".json")
    command = [python, str(HERE / "autoround_run.py"), "--model", str(model), "--tokens", str(tokens)]
    seconds = measured([*command, "--bits", str(bits), "--out", str(out), "--json", str(result)])
    data = json.loads(result.read_text())
    folder = next(out.rglob("config.json")).parent
    return folder, {"process": seconds, "quantize": data["quantize_seconds"], "peak_gib": data["peak_rss_gib"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--eval", required=True)
    parser.add_argument("--other", required=True, help="Python of the environment with llm-compressor and auto-round")
    parser.add_argument("--bits", default="3,2")
    parser.add_argument("--methods", default="gptq,awq+gptq", help="ours: methods, or recipes")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=512)
    args = parser.parse_args()
    shape = (args.samples, args.seq_len)
    print("| bits | tool | perplexity | KL | quantize s | process s | peak GiB |", flush=True)
    print("| ---: | --- | ---: | ---: | ---: | ---: | ---: |", flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        tokens = work / "tokens.safetensors"
        tokens_file(args.model, args.dataset, *shape, tokens)

        def report(bits: int, tool: str, folder: Path, run: dict[str, float]) -> None:
            found = run | scores(folder, args.eval, args.seq_len, args.model)
            print(
                f"| {bits} | {tool} | {found['perplexity']:.3f} | {found['kl']:.5f} | {found['quantize']:.1f} "
                f"| {found['process']:.1f} | {found['peak_gib']:.2f} |",
                flush=True,
            )
            print(json.dumps({"bits": bits, "tool": tool, **found}), file=sys.stderr, flush=True)

        for bits in map(int, args.bits.split(",")):
            for i, method in enumerate(args.methods.split(",")):
                out = work / f"ours-{bits}-{i}"
                run = ours(args.model, tokens, method, shape, out, f"w{bits}a16-g128-sym")
                report(bits, f"ptq {Path(method).stem if method.endswith('.toml') else method}", out, run)
            out = work / f"compressor-{bits}"
            report(bits, "llm-compressor gptq", out, theirs(args.other, args.model, tokens, "gptq", out, [], bits))
            folder, run = auto_round(args.other, args.model, tokens, bits, work / f"auto-{bits}")
            report(bits, "auto-round, 200 iterations", folder, run)


if __name__ == "__main__":
    main()
