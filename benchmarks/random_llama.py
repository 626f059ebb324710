"""A randomly initialised Llama of 1.1 billion parameters (TinyLlama's shape), bf16, sharded, for speed and memory.

    python benchmarks/random_llama.py DIR [--layers 22] [--tokens TOKENS.safetensors]

Written shard by shard without ever holding the model. Its tokenizer is byte-level with one merge; ``--tokens``
also writes 128 x 512 random token ids as calibration samples (``--dataset TOKENS.safetensors``).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from calibration.model.shards import ShardWriter


def write(out: Path, config: LlamaConfig, generator: torch.Generator) -> None:
    """Weights and tokenizer of a Llama of this shape, in bfloat16."""
    out.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(out)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return (torch.randn(rows, columns, generator=generator) * 0.02).to(torch.bfloat16)

    h, m = config.hidden_size, config.intermediate_size
    kv = h // config.num_attention_heads * config.num_key_value_heads
    writer = ShardWriter(out, shard_bytes=500_000_000)
    writer.add("model.embed_tokens.weight", matrix(config.vocab_size, h))
    for i in range(config.num_hidden_layers):
        p = f"model.layers.{i}."
        writer.add(p + "input_layernorm.weight", torch.ones(h, dtype=torch.bfloat16))
        writer.add(p + "post_attention_layernorm.weight", torch.ones(h, dtype=torch.bfloat16))
        for name, (rows, columns) in {"q": (h, h), "k": (kv, h), "v": (kv, h), "o": (h, h)}.items():
            writer.add(f"{p}self_attn.{name}_proj.weight", matrix(rows, columns))
        for name, (rows, columns) in {"gate": (m, h), "up": (m, h), "down": (h, m)}.items():
            writer.add(f"{p}mlp.{name}_proj.weight", matrix(rows, columns))
    writer.add("model.norm.weight", torch.ones(h, dtype=torch.bfloat16))
    writer.add("lm_head.weight", matrix(config.vocab_size, h))
    writer.finish()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, **{c: 3 + i for i, c in enumerate(alphabet)}}
    vocabulary["th"] = len(vocabulary)  # llama.cpp reads no tokenizer without merges
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("t", "h")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(out)


def llama(hidden: int, mlp: int, heads: int, kv_heads: int, layers: int, vocabulary: int = 32000) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
        dtype=torch.bfloat16,
        architectures=["LlamaForCausalLM"],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--tokens", type=Path)
    args = parser.parse_args()
    config = llama(2048, 5632, 32, 4, args.layers)
    generator = torch.Generator().manual_seed(0)
    write(args.out, config, generator)
    if args.tokens:
        ids = torch.randint(3, config.vocab_size, (128, 512), generator=generator)
        save_file({"input_ids": ids}, args.tokens)


if __name__ == "__main__":
    main()
