"""Logarithmic grids for attention probabilities and for what enters the last linear of an MLP: perplexity of each.

    python benchmarks/log_grids.py MODEL --dataset TRAIN --eval TEST [--max-windows N] [--bits 4,3]

Every grid once as 2^bits values with zero among them, and once as published, with zero beside them. Bases of adalog-B
are searched on windows of the calibration text. Weights, keys, values and products stay in float32.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from calibration.architectures import resolve
from calibration.model.opening import load_tokenizer
from calibration.scoring.perplexity import score
from calibration.scoring.windows import Scoring
from calibration.text.corpora import load_corpus
from calibration.text.encoding import encode_text
from calibration.text.samples import model_tokens
from ptq.evaluation import logits_of
from ptq.numerics.softmax import SoftmaxRule
from ptq.runtime.explicit_attention import exchange_softmax
from ptq.runtime.load import load_model
from ptq.runtime.log_search import WINDOW, WINDOWS, search_mlp_values, search_probabilities
from ptq.runtime.log_values import LogGrid, log_probabilities, parse_log_grid, quantize_mlp_values

NAMES = ("log2", "log-sqrt2", "adalog")


def install(model: Any, place: str, grid: LogGrid, tokens: Any) -> str:
    """Put a grid into a model; the bases that were searched."""
    spec, softmax = resolve(model.config), SoftmaxRule()
    if place == "probabilities":
        layers = [grid.quant] * spec.n_blocks
        if grid.search:
            layers = search_probabilities(model, spec, softmax, grid.quant, tokens)
        exchange_softmax(model, [log_probabilities(quant, softmax) for quant in layers])
        return " ".join(str(quant.q) for quant in layers) if grid.search else ""
    found = search_mlp_values(model, spec, grid.quant, tokens) if grid.search else grid.quant
    quantize_mlp_values(model, spec, found)
    return "" if not isinstance(found, dict) else " ".join(str(quant.q) for quant in found.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--dataset", help="calibration text", required=True)
    parser.add_argument("--eval", help="text to score", required=True)
    parser.add_argument("--bits", default="4,3")
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--max-windows", type=int, help="score only the first so many windows")
    args = parser.parse_args()
    text = encode_text(load_corpus(args.eval, "score"), load_tokenizer(args.model))
    scoring = Scoring("gptq", args.seq_len, batch_size=4, max_windows=args.max_windows, dtype="float32")

    def loaded() -> Any:
        return load_model(args.model, dtype=torch.float32)

    config = loaded().model.config
    tokens = model_tokens(args.model, config, args.dataset, WINDOWS, min(args.seq_len, WINDOW), 0, False)
    print(f"float: {score(logits_of(loaded(), torch.device('cpu')), text, scoring).perplexity:.2f}", flush=True)
    print("| place | grid | zero among 2^b values | zero beside them | searched q |", flush=True)
    print("| --- | --- | ---: | ---: | --- |", flush=True)
    for place in ("probabilities", "mlp-values"):
        for name in [f"{name}-{bits}" for bits in args.bits.split(",") for name in NAMES]:
            row, bases = [], ""
            for variant in ("", "-published"):
                model = loaded()
                said = install(model.model, place, parse_log_grid(place, name + variant), tokens)
                bases = bases or said
                row.append(score(logits_of(model, torch.device("cpu")), text, scoring).perplexity)
            print(f"| {place} | {name} | {row[0]:.2f} | {row[1]:.2f} | {bases} |", flush=True)


if __name__ == "__main__":
    main()
