"""Seconds of one Llama block on a whole prompt: float32, bfloat16, and quantized linears of several schemes.

    python benchmarks/prefill.py [--tokens 512] [--threads 2] [--schemes w8a8,w4a4,w4a4-rs128,w8a16-gchannel]

The block has the shape of a 1.1-billion-parameter Llama (hidden 2048, MLP 5632, 32 heads, 4 key/value heads), random
weights, batch 1. Variants take turns, and the smallest of the repeats counts. ``linears`` are those seven alone.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable

import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from ptq.methods.rtn import round_to_nearest
from ptq.runtime.linear import QuantLinear
from ptq.scheme import parse_scheme

CONFIG = LlamaConfig(hidden_size=2048, intermediate_size=5632, num_attention_heads=32, num_key_value_heads=4)
LINEARS = (
    *(f"self_attn.{name}_proj" for name in ("q", "k", "v", "o")),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
)


def quantized(block: torch.nn.Module, scheme: str, dtype: torch.dtype) -> torch.nn.Module:
    """A copy of the float32 block with `QuantLinear` in place of its linears, and the rest in ``dtype``."""
    result = copy.deepcopy(block).to(dtype)
    for name in LINEARS:
        q = round_to_nearest(block.get_submodule(name).weight, parse_scheme(scheme))
        parent, _, leaf = name.rpartition(".")
        setattr(result.get_submodule(parent), leaf, QuantLinear(q, None, dtype))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--schemes", default="w8a8,w4a4,w4a4-rs128,w8a16-gchannel")
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    CONFIG._attn_implementation = "sdpa"
    block = LlamaDecoderLayer(CONFIG, 0).eval().requires_grad_(False)
    hidden = torch.randn(1, args.tokens, CONFIG.hidden_size)
    rotary = LlamaRotaryEmbedding(CONFIG)(hidden, torch.arange(args.tokens)[None])

    variants: dict[str, tuple[torch.nn.Module, torch.dtype]] = {
        "float32": (block, torch.float32),
        "bfloat16": (copy.deepcopy(block).to(torch.bfloat16), torch.bfloat16),
    }
    for scheme in args.schemes.split(","):
        for dtype in (torch.bfloat16, torch.float32):
            name = f"{scheme}, {str(dtype).removeprefix('torch.')} around"
            variants[name] = (quantized(block, scheme, dtype), dtype)

    def whole(module: torch.nn.Module, dtype: torch.dtype) -> Callable[[], object]:
        x, embeddings = hidden.to(dtype), tuple(t.to(dtype) for t in rotary)
        return lambda: module(x, position_embeddings=embeddings)

    def linears(module: torch.nn.Module, dtype: torch.dtype) -> Callable[[], object]:
        layers = [module.get_submodule(name) for name in LINEARS]
        given = [torch.randn(1, args.tokens, int(layer.in_features), dtype=dtype) for layer in layers]  # type: ignore[arg-type]
        return lambda: [layer(x) for layer, x in zip(layers, given, strict=True)]

    best: dict[tuple[str, str], float] = {}
    for _ in range(args.repeats):
        for name, variant in variants.items():
            for what, call in (("block", whole(*variant)), ("linears", linears(*variant))):
                begin = time.perf_counter()
                with torch.inference_mode():
                    call()
                best[name, what] = min(best.get((name, what), float("inf")), time.perf_counter() - begin)
    print(f"1 x {args.tokens} tokens, {args.threads} thread(s), smallest of {args.repeats}\n")
    print(
        "| block | kernel | ms | times float32 | times bfloat16 | linears, ms |\n"
        "| --- | --- | ---: | ---: | ---: | ---: |"
    )
    for name, (module, _) in variants.items():
        layer = module.get_submodule(LINEARS[0])
        seconds = best[name, "block"]
        ratios = (best[reference, "block"] / seconds for reference in ("float32", "bfloat16"))
        print(
            f"| {name} | {getattr(layer, 'kernel', 'torch')} | {1e3 * seconds:.1f} | "
            + " | ".join(f"{ratio:.2f}" for ratio in ratios)
            + f" | {1e3 * best[name, 'linears']:.1f} |"
        )


if __name__ == "__main__":
    main()
