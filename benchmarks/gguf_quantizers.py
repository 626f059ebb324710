"""GGUF files by ptq and by llama-quantize with an importance matrix: same type, same bytes, same calibration tokens.

    python benchmarks/gguf_quantizers.py MODEL WORK --train TEXT --test TEXT --llama FOLDER_OF_PROGRAMS \
        [--types q2_k,q3_k,q4_k] [--linears "*.down_proj=ffn_down"] [--methods gptq,awq+gptq]

The float model is written as GGUF, F32 by llama-quantize, and is what llama-imatrix reads and what llama-perplexity
compares with. ``--linears`` says which linears get the type, as a pattern here and in llama.cpp's names, where rows of
others do not divide into blocks of 256 (`as_wide.py` makes a model of which all do); those, and the embeddings, stay as
they are in both files. What lies in WORK is not made again. One thread. llama-perplexity takes special tokens for
text: ``--test`` should have none (wiki.test.raw).
"""

from __future__ import annotations

import argparse
import re
import subprocess
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer

import ptq

LINEARS = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")


def tool(program: Path, *words: object) -> str:
    """What one of llama.cpp's programs printed."""
    done = subprocess.run([str(program), *map(str, words)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{program.name}: {(done.stdout + done.stderr)[-2000:]}")
    return done.stdout + done.stderr


def quantize(args: argparse.Namespace, out: Path, scheme: str, pattern: str, method: str) -> None:
    """Ours: linears of the pattern in this scheme, or all in float for the pattern ""."""
    passes = "".join(f'[[pass]]\nname = "{name}"\n' for name in method.split("+"))
    rules = f'[[rule]]\nmatch = "{pattern}"\nscheme = "{scheme}"\n' if pattern else ""
    recipe = args.work / f"{out.stem}.toml"
    recipe.write_text(f'scheme = "{scheme}"\n{passes}{rules}[[rule]]\nmatch = "*"\nscheme = "float"\n')
    ptq.quantize(
        args.model,
        out=out,
        recipe=recipe,
        format="gguf",
        embeddings="float",
        dataset=str(args.work / "tokens.safetensors"),
        samples=args.samples,
        seq_len=args.length,
        dtype="float32",
    )


def prepare(args: argparse.Namespace) -> None:
    """Calibration tokens, the float model, its importance matrix and its log-probabilities."""
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    text = args.train.read_text(encoding="utf-8")[: 20 * args.samples * args.length]
    ids = tokenizer(text, add_special_tokens=False)["input_ids"][: args.samples * args.length]
    tokens = torch.tensor(ids).view(args.samples, args.length)
    save_file({"input_ids": tokens}, args.work / "tokens.safetensors")
    (args.work / "train.txt").write_text(text, encoding="utf-8")
    plain, whole, base = (args.work / name for name in ("float.gguf", "f32.gguf", "base"))
    if not plain.exists():
        quantize(args, plain, "q8_0", "", "rtn")
        tool(args.llama / "llama-quantize", plain, whole, "F32", 1)
    if not (args.work / "imatrix.gguf").exists():
        words = ("-f", args.work / "train.txt", "-c", args.length, "--chunks", args.samples, "-t", 1)
        words = (*words, "--no-ppl", "--parse-special")  # as tokenizers do here
        tool(args.llama / "llama-imatrix", "-m", whole, *words, "-o", args.work / "imatrix.gguf")
    if not base.exists():
        exact = ("-ctk", "f32", "-ctv", "f32", "-fa", "off")
        tool(args.llama / "llama-perplexity", "-m", whole, *scored(args), *exact, "--kl-divergence-base", base)


def scored(args: argparse.Namespace) -> tuple[object, ...]:
    return "-f", args.test, "-c", args.length, "--chunks", args.chunks, "-t", 1


def theirs(args: argparse.Namespace, out: Path, kind: str, names: str) -> None:
    """llama-quantize with the importance matrix; everything else in the dtype of our file."""
    other = {"bfloat16": "bf16", "float16": "f16", "float32": "f32"}[
        ptq.plan(args.model, method="rtn").plan.layout.dtype
    ]
    types = {name: kind if any(part in name for part in names.split(",")) else other for name in LINEARS}
    kept = ("--token-embedding-type", other, "--output-tensor-type", other)
    chosen = [word for name, own in types.items() for word in ("--tensor-type", f"{name}={own}")]
    words = ("--imatrix", args.work / "imatrix.gguf", *kept, *chosen)
    tool(args.llama / "llama-quantize", *words, args.work / "f32.gguf", out, kind, 1)


def divergence(args: argparse.Namespace, file: Path) -> tuple[float, float, float]:
    """Mean KL, its standard error, and perplexity, from llama-perplexity."""
    base = ("--kl-divergence-base", args.work / "base", "--kl-divergence")
    said = tool(args.llama / "llama-perplexity", "-m", file, *scored(args), *base)
    kl = re.search(r"Mean\s+KLD:\s+([\d.]+) ±\s+([\d.]+)", said)
    perplexity = re.search(r"Mean PPL\(Q\)\s+:\s+([\d.]+)", said)
    if kl is None or perplexity is None:
        raise SystemExit(f"{file}: {said[-2000:]}")
    return float(kl.group(1)), float(kl.group(2)), float(perplexity.group(1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("work", type=Path)
    for name in ("train", "test", "llama"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--types", default="q2_k,q3_k,q4_k,q4_0")
    parser.add_argument("--linears", default="*=attn,ffn")
    parser.add_argument("--methods", default="gptq,awq+gptq")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--chunks", type=int, default=16)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    prepare(args)
    pattern, names = args.linears.split("=")
    print("| type | made by | bytes | KL | perplexity |\n| --- | --- | ---: | ---: | ---: |", flush=True)
    for kind in args.types.split(","):
        for method in ("llama-quantize, imatrix", *args.methods.split(",")):
            out = args.work / f"{kind}-{re.sub(r'[^a-z0-9*]+', '-', method + names)}.gguf"
            if not out.exists() and "imatrix" in method:
                theirs(args, out, kind, names)
            elif not out.exists():
                quantize(args, out, kind, pattern, method)
            kl, error, perplexity = divergence(args, out)
            size = out.stat().st_size
            print(f"| {kind} | {method} | {size} | {kl:.4f} ± {error:.4f} | {perplexity:.3f} |", flush=True)


if __name__ == "__main__":
    main()
