"""A Llama checkpoint as a wider one that computes the same: a real model with rows that blocks of 256 divide.

    python benchmarks/as_wide.py LLAMA OUT [--multiple 256]

K-quants need such rows. Channels of the stream and of the MLP are added up to the next multiple, and heads with them:
the weights that write to them are zero, so they carry nothing, and those that read them are zero, too. A norm over more
channels, of which the new ones are zero, has a smaller mean square; its weight and its epsilon make up for it. Float32,
to the rounding errors of the norms' weights. Both sides of a comparison have the same zeros to store.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM


def up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def wide_of(llama: Any, multiple: int) -> Any:
    """The same function of token ids as the Llama, in float32.

    Raises:
        SystemExit: the heads do not come out even at the new width.
    """
    old = llama.config
    head = old.hidden_size // old.num_attention_heads
    shared = old.num_attention_heads // old.num_key_value_heads
    width = up(old.hidden_size, multiple)
    if width % (head * shared):
        raise SystemExit(f"width {width} is no multiple of {shared} heads of {head}: choose another --multiple")
    part = old.hidden_size / width
    config = LlamaConfig(**{**old.to_dict(), "dtype": "float32"})
    config.hidden_size, config.intermediate_size = width, up(old.intermediate_size, multiple)
    config.num_attention_heads, config.num_key_value_heads = width // head, width // head // shared
    config.rms_norm_eps = old.rms_norm_eps * part
    model = LlamaForCausalLM(config)
    state = {name: torch.zeros_like(tensor) for name, tensor in model.state_dict().items()}
    for name, tensor in llama.state_dict().items():
        place = state[name][tuple(slice(size) for size in tensor.shape)]
        place.copy_(tensor * part**0.5 if "norm" in name else tensor)
    model.load_state_dict(state)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("llama", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--multiple", type=int, default=256)
    args = parser.parse_args()
    llama = AutoModelForCausalLM.from_pretrained(args.llama, dtype=torch.float32)
    wide = wide_of(llama, args.multiple)
    ids = torch.arange(1000, 1064)[None]
    with torch.no_grad():
        away = (wide(ids).logits - llama(ids).logits).abs().max()
    print(f"hidden {wide.config.hidden_size}, MLP {wide.config.intermediate_size}; logits differ by {away:.1e}")
    wide.save_pretrained(args.out)
    AutoTokenizer.from_pretrained(args.llama).save_pretrained(args.out)


if __name__ == "__main__":
    main()
