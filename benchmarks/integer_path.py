"""One perplexity by three programs: our integer products, our simulation, and plain transformers on our files.

    python benchmarks/integer_path.py demo
    python benchmarks/integer_path.py MODEL --dataset TRAIN --eval TEST [--settings rtn:w8a8,rs+gptq:w4a4]

A setting is METHOD:SCHEME, calibrated on 128 windows. Where compressed-tensors holds it, transformers loads the files
and the same windows are scored; elsewhere (Runtime Smooth, for one) the last column stays empty.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

import ptq
from calibration.model.opening import load_tokenizer, locate
from calibration.scoring.perplexity import score
from calibration.scoring.windows import Scoring
from calibration.text.corpora import load_corpus
from calibration.text.encoding import encode_text
from ptq.evaluation import logits_of
from ptq.planning.source import default_dataset
from ptq.runtime.load import load_model

SETTINGS = "rtn:w8a8,ranges+rtn:w8a8-astatic,rtn:w8a8kv8,rtn:fp8,rtn:w4a8,gptq:w4a4-rs128,gptq:w4a4-rs128b64"
CPU = torch.device("cpu")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--settings", default=SETTINGS)
    parser.add_argument("--dataset", help="calibration text")
    parser.add_argument("--eval", help="text to score")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--max-windows", type=int, help="score only the first so many windows")
    args = parser.parse_args()
    folder = locate(args.model)
    dataset = args.eval or default_dataset(folder)
    text = encode_text(load_corpus(dataset, "score"), load_tokenizer(folder))
    scoring = Scoring("gptq", args.seq_len, batch_size=4, max_windows=args.max_windows, dtype="float32")

    def ours(model: Path, kernel: str | None) -> tuple[str, str]:
        loaded = load_model(model, dtype=torch.float32, kernel=kernel)
        return f"{score(logits_of(loaded, CPU), text, scoring).perplexity:.4f}", loaded.path

    def theirs(model: Path, scheme: str) -> str:
        fp4 = "fp4" in scheme  # decompressed to bfloat16 by the first forward pass
        dtype = torch.bfloat16 if fp4 else torch.float32
        network: Any = AutoModelForCausalLM.from_pretrained(model, dtype=dtype).eval()
        if fp4:
            network(text.ids.view(1, -1)[:, :2])
            torch.nn.Module.float(network)  # transformers refuses its own for quantized models
        return f"{score(lambda ids: network(ids, use_cache=False).logits, text, scoring).perplexity:.4f}"

    windows = f"{args.max_windows or 'all'} windows of {args.seq_len} tokens"
    print(f"{windows} of {dataset}, float32; float perplexity {ours(folder, None)[0]}")
    print("\n| method | scheme | fastest kernel | perplexity | simulated | transformers |")
    print("| --- | --- | --- | ---: | ---: | ---: |", flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        for number, setting in enumerate(args.settings.split(",")):
            method, _, scheme = setting.partition(":")
            out = Path(temporary) / str(number)
            options = {"dataset": args.dataset, "samples": args.samples, "seq_len": args.seq_len}
            record = ptq.quantize(args.model, out=out, method=method, scheme=scheme, **options)
            foreign = theirs(out, scheme) if record.result["format"] == "compressed-tensors" else ""
            fastest, path = ours(out, None)
            print(f"| {method} | {scheme} | {path} | {fastest} | {ours(out, 'reference')[0]} | {foreign} |", flush=True)


if __name__ == "__main__":
    main()
