"""Quantize one model with auto-round and write its time and peak memory as JSON.

Runs in an environment of its own that has auto-round (0.15.1 here) and llm-compressor, see ``side_by_side.py``:

    python benchmarks/autoround_run.py --model MODEL --tokens tokens.safetensors --bits 3 --out OUT --json OUT.json

``--tokens`` names a safetensors file with ``input_ids``, int64, samples x sequence length. The result is written with
the rounded weights as floats ("fake" format), so that any reader gives its perplexity. What the command line does not
name stays at auto-round's defaults (200 iterations, batches of 8).
"""

import time

START = time.perf_counter()

import argparse  # noqa: E402
import json  # noqa: E402
from pathlib import Path  # noqa: E402

import torch  # noqa: E402
from auto_round import AutoRound  # noqa: E402
from llmcompressor_run import peak_rss  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from torch.utils.data import DataLoader  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of the float model")
    parser.add_argument("--tokens", type=Path, required=True, help="safetensors file with input_ids")
    parser.add_argument("--bits", type=int, required=True)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--iters", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--out", type=Path, required=True, help="folder for the rounded model")
    parser.add_argument("--json", type=Path, help="file for the result (default: standard output only)")
    args = parser.parse_args()
    ids = load_file(args.tokens)["input_ids"]
    batches = DataLoader([{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in ids], args.batch_size)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    started = time.perf_counter()
    rounding = AutoRound(
        model,
        tokenizer,
        scheme={"bits": args.bits, "group_size": args.group_size, "sym": True, "data_type": "int", "act_bits": 16},
        dataset=batches,
        iters=args.iters,
        nsamples=len(ids),
        seqlen=ids.shape[1],
        batch_size=args.batch_size,
        device_map="cpu",
        seed=0,
    )
    rounding.quantize_and_save(output_dir=str(args.out), format="fake")
    finished = time.perf_counter()
    result = {
        "tool": "auto-round",
        "quantize_seconds": round(finished - started, 3),
        "process_seconds": round(finished - START, 3),
        "peak_rss_gib": round(peak_rss(), 3),
    }
    text = json.dumps(result, indent=2)
    print(text)
    if args.json:
        args.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
