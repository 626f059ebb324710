"""W8A8, W6A6 and W4A4 with everything that makes activations easier to round, on several checkpoints.

    python benchmarks/stress_model.py MODEL stress
    python benchmarks/stress_model.py MODEL spikes --places "" --spikes 4 --dataset TRAIN
    python benchmarks/activation_table.py MODEL stress spikes --dataset TRAIN --eval TEST [--max-windows N]

One row per method, one column per checkpoint: perplexity on the same windows of the same text, calibration windows and
seed the same for all. ``--rows`` takes some of the rows by name. Quantized inputs and caches are simulated in float32
(kernel ``reference``), so that every row is computed in the same way.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

import torch

import ptq
from calibration.model.opening import load_tokenizer
from calibration.scoring.perplexity import score
from calibration.scoring.windows import Scoring
from calibration.text.corpora import load_corpus
from calibration.text.encoding import encode_text
from ptq.evaluation import logits_of
from ptq.runtime.load import load_model

SMOOTH = '[[pass]]\nname = "smoothquant"\nsearch = true\ndown = true\n'
FIXED = '[[pass]]\nname = "smoothquant"\n'
ROTATE = '[[pass]]\nname = "rotate"\n'
GPTQ = '[[pass]]\nname = "gptq"\n'

OUTLIERTUNE = '[[pass]]\nname = "outliertune"\n'
RTN = '[[pass]]\nname = "rtn"\n'
EQUALIZE = '[[pass]]\nname = "equalize"\n'
RANGES = '[[pass]]\nname = "ranges"\n'
REPQUANT = '[[pass]]\nname = "repquant"\n'
REPQUANT_DOWN = REPQUANT + "down = true\n"

ROWS: dict[str, tuple[str, str]] = {
    "float": ("", ""),
    "naive-w8a8-tensor": ("w8a8-wtensor-atensor", ""),
    "naive-w8a8-token": ("w8a8", ""),
    "smoothquant-w8a8-alpha-0.5": ("w8a8", FIXED),
    "smoothquant-w8a8": ("w8a8", SMOOTH),
    "outliertune-w8a8": ("w8a8-asym", OUTLIERTUNE),
    "repquant-w8a8": ("w8a8", REPQUANT),
    "static-w8a8": ("w8a8-astatic", RANGES),
    "static-repquant-w8a8": ("w8a8-astatic", REPQUANT + RANGES),
    "static-repquant-down-w8a8": ("w8a8-astatic", REPQUANT_DOWN + RANGES),
    "naive-w6a6": ("w6a6", ""),
    "smoothquant-w6a6": ("w6a6", SMOOTH),
    "outliertune-w6a6": ("w6a6-asym", OUTLIERTUNE),
    "repquant-w6a6": ("w6a6", REPQUANT),
    "static-w6a6": ("w6a6-astatic", RANGES),
    "static-repquant-down-w6a6": ("w6a6-astatic", REPQUANT_DOWN + RANGES),
    "naive-w4a4": ("w4a4", ""),
    "smoothquant-w4a4": ("w4a4", SMOOTH),
    "rotate+rtn-w4a4": ("w4a4", ROTATE),
    "rotate+gptq-w4a4": ("w4a4", ROTATE + GPTQ),
    "rs-w4a4": ("w4a4-rs1", GPTQ),
    "rrs-w4a4": ("w4a4-rs128", ROTATE + GPTQ),
    "rrs-unsorted-w4a4": ("w4a4-rs128n", ROTATE + GPTQ),
    "equalize+rotate+gptq-w4a4": ("w4a4", EQUALIZE + ROTATE + GPTQ),
    "equalize+rrs-w4a4": ("w4a4-rs128", EQUALIZE + ROTATE + GPTQ),
    "naive-w4a4kv4": ("w4a4kv4", ""),
    "smoothquant-w4a4kv4": ("w4a4kv4", SMOOTH),
    "rotate+rtn-w4a4kv4": ("w4a4kv4", ROTATE),
    "rotate+gptq-w4a4kv4": ("w4a4kv4", ROTATE + GPTQ),
    "rs-w4a4kv4": ("w4a4kv4-rs1", GPTQ),
    "rrs-w4a4kv4": ("w4a4kv4-rs128", ROTATE + GPTQ),
}
"""Name -> scheme, and the passes of the recipe (rounding to nearest where none rounds)."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--rows", default=",".join(ROWS))
    parser.add_argument("--dataset", help="calibration text", required=True)
    parser.add_argument("--eval", help="text to score", required=True)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--max-windows", type=int, help="score only the first so many windows")
    args = parser.parse_args()
    text = encode_text(load_corpus(args.eval, "score"), load_tokenizer(args.models[0]))
    scoring = Scoring("gptq", args.seq_len, batch_size=4, max_windows=args.max_windows, dtype="float32")

    def perplexity(model: Path) -> float:
        loaded = load_model(model, dtype=torch.float32, kernel="reference")
        return score(logits_of(loaded, torch.device("cpu")), text, scoring).perplexity

    def measured(model: Path, scheme: str, passes: str, place: Path) -> float:
        if not scheme:
            return perplexity(model)
        recipe = place / "recipe.toml"
        recipe.write_text(f'scheme = "{scheme}"\n{passes or RTN}')
        options = {"dataset": args.dataset, "samples": args.samples, "seq_len": args.seq_len, "dtype": "float32"}
        ptq.quantize(model, out=place / "out", recipe=recipe, format="native", overwrite=True, **options)
        return perplexity(place / "out")

    print(f"window {args.seq_len}, float32; calibration {args.samples} x {args.seq_len}, seed 0", flush=True)
    print("| method | " + " | ".join(m.name for m in args.models) + " |", flush=True)
    print("| --- |" + " ---: |" * len(args.models), flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        for row in args.rows.split(","):
            begin = time.perf_counter()
            found = [measured(model, *ROWS[row], Path(temporary)) for model in args.models]
            print(f"| {row} | " + " | ".join(f"{p:.2f}" for p in found) + " |", flush=True)
            print(f"{row}: {time.perf_counter() - begin:.0f} s", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
