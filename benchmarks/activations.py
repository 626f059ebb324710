"""Perplexity with quantized inputs and KV caches: one model, text, window and seed for every setting.

    python benchmarks/activations.py demo
    python benchmarks/activations.py MODEL --dataset train.txt --eval test.txt --settings rtn:w8a8,gptq:w4a4kv4

A setting is METHOD:SCHEME, with @KERNEL behind it where another than the fastest kernel is to run: `@reference`
simulates what `integer` multiplies.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import torch

import ptq
from calibration.corpora import load_corpus
from calibration.models import load_tokenizer, locate
from calibration.perplexity import encode_for, score
from calibration.windows import Scoring
from ptq.evaluation import default_dataset, logits_of
from ptq.runtime.load import load_model

SETTINGS = (
    "rtn:w8a8-wtensor-atensor,rtn:w8a8,rtn:w8a8@reference,ranges+rtn:w8a8-astatic,rtn:w4a16-gchannel,gptq:w4a16-gchannel,"
    "rtn:w4a4,gptq:w4a4,gptq:w4a4kv4,gptq:w4a4-rs128,gptq:w4a4-rs128b64,gptq:w4a4-rs1"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--settings", default=SETTINGS)
    parser.add_argument("--dataset", help="calibration text")
    parser.add_argument("--eval", help="text to score")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--max-windows", type=int, help="score only the first so many windows")
    parser.add_argument("--float", action="store_true", help="score the float model too")
    args = parser.parse_args()

    folder = locate(args.model)
    dataset = args.eval or default_dataset(folder)
    text = encode_for("gptq", load_corpus(dataset, "score"), load_tokenizer(folder))
    scoring = Scoring("gptq", args.seq_len, batch_size=4, max_windows=args.max_windows, dtype="float32")

    def perplexity(model: Path, kernel: str | None) -> tuple[float, str]:
        loaded = load_model(model, dtype=torch.float32, kernel=kernel)
        return score(logits_of(loaded, torch.device("cpu")), text, scoring).perplexity, loaded.path

    print(f"window {args.seq_len}, {dataset}, float32; calibration {args.samples} x {args.seq_len}, seed 0", flush=True)
    print("| method | scheme | perplexity | computed by |\n| --- | --- | ---: | --- |", flush=True)
    if args.float:
        print(f"| float | | {perplexity(folder, None)[0]:.3f} | float |", flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        known: dict[str, Path] = {}
        for setting in args.settings.split(","):
            setting, _, kernel = setting.partition("@")
            method, _, scheme = setting.partition(":")
            begin = time.perf_counter()
            if setting not in known:
                known[setting] = out = Path(temporary) / str(len(known))
                options = {"dataset": args.dataset, "samples": args.samples, "seq_len": args.seq_len}
                ptq.quantize(args.model, out=out, method=method, scheme=scheme, format="native", **options)
            quantized = time.perf_counter()
            found, path = perplexity(known[setting], kernel or None)
            print(f"| {method} | {scheme} | {found:.3f} | {path} |", flush=True)
            seconds = {"quantize": quantized - begin, "score": time.perf_counter() - quantized}
            print(json.dumps({"setting": setting, **{k: round(v, 1) for k, v in seconds.items()}}), file=sys.stderr)


if __name__ == "__main__":
    main()
