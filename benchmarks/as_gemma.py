"""A Llama checkpoint as a Gemma one that computes the same: a real second family where only one model is at hand.

    python benchmarks/as_gemma.py LLAMA OUT

Gemma multiplies embeddings by the square root of the hidden size, its norms multiply by one plus their weight, and its
tokenizer puts BOS in front of every text. The embedding is divided and the norms are lowered by one, in float32 (the
head, no longer tied, stays); the activation of the MLP is named in the config. BOS is the tokenizer's own.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer, GemmaConfig, GemmaForCausalLM

SAME = [
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "rms_norm_eps",
    "bos_token_id",
    "eos_token_id",
    "rope_parameters",
    "attention_bias",
]
"""Settings that both configs have."""


def gemma_of(llama: Any) -> Any:
    """The same function of token ids; float32, to rounding errors of the norms' weights."""
    old = llama.config
    config = GemmaConfig(
        **{name: getattr(old, name) for name in SAME},
        head_dim=old.hidden_size // old.num_attention_heads,
        hidden_act=old.hidden_act,
        tie_word_embeddings=False,
    )
    state = {name: tensor.clone() for name, tensor in llama.state_dict().items()}
    state["model.embed_tokens.weight"] /= old.hidden_size**0.5
    for name in state:
        if "norm" in name:
            state[name] -= 1
    model = GemmaForCausalLM(config)
    model.load_state_dict(state, assign=True)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("llama", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    llama = AutoModelForCausalLM.from_pretrained(args.llama, dtype=torch.float32)
    gemma_of(llama).save_pretrained(args.out)
    tokenizer = AutoTokenizer.from_pretrained(args.llama)
    bos = tokenizer.bos_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, tokenizer.bos_token_id)]
    )
    tokenizer.save_pretrained(args.out)


if __name__ == "__main__":
    main()
