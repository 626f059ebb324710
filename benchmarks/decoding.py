"""Decoding speed beside llama.cpp's, by turns: the same model, as many bytes, threads and tokens.

    python benchmarks/decoding.py MODEL FILE.gguf --llama BIN [--tokens 96] [--repeats 3] [--inputs int8]

MODEL is a folder of `ptq quantize` or a float one, FILE.gguf what llama-bench (in the folder BIN) decodes. Ours: tokens
over seconds of the median step behind the second, llama-bench: its "tg" line. Also transformers' own steps, with the
kernels that `ptq eval` takes, and the machine's read bandwidth.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
from pathlib import Path
from typing import get_args

import torch

import ptq
from ptq.runtime.decoding.native import Inputs
from ptq.runtime.generate import decode_tokens, read_bandwidth, weight_bytes_per_token


def speed(model: torch.nn.Module, tokens: int, fused: bool, inputs: Inputs = "int15") -> float:
    ids = torch.arange(100, 132)[None]
    _, times, one_call = decode_tokens(model, ids, tokens, fused=fused, inputs=inputs)
    assert one_call == fused, "the first step was not the model's"
    return 1 / statistics.median(b - a for a, b in itertools.pairwise(times[3:]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("gguf", type=Path)
    parser.add_argument("--llama", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--inputs", choices=get_args(Inputs), default="int15")
    args = parser.parse_args()
    threads = torch.get_num_threads()
    command = [args.llama / "llama-bench", "-m", args.gguf, "-t", str(threads), "-p", "0", "-n", str(args.tokens)]
    fused = ptq.load_model(args.model, dtype="bfloat16", decoding=True)
    plain = ptq.load_model(args.model, dtype="bfloat16")
    size = weight_bytes_per_token(fused.model)
    print(
        f"{threads} threads; {size / 1e6:.0f} MB of weights per token, {args.gguf.stat().st_size / 1e6:.0f} MB in GGUF"
    )
    print("| one call per step | llama-bench | transformers | read bandwidth GB/s |")
    print("| ---: | ---: | ---: | ---: |")
    for _ in range(args.repeats):
        ours = speed(fused.model, args.tokens, True, args.inputs)
        done = subprocess.run([*command, "-r", "1", "-o", "json"], check=True, capture_output=True, text=True)
        theirs = json.loads(done.stdout)[0]["avg_ts"]
        own = speed(plain.model, args.tokens, False)
        print(f"| {ours:.1f} | {theirs:.1f} | {own:.1f} | {read_bandwidth() / 1e9:.1f} |", flush=True)


if __name__ == "__main__":
    main()
