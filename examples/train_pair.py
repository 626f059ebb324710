"""Train one tiny model three times, with plain, clipped and gated attention, and compare what outliers they grow.

Bondarenko et al., "Quantizable Transformers" (NeurIPS 2023, arXiv 2306.12929): heads that want to do nothing need large
logits, which makes activations grow, which eight bits with one range per tensor cannot hold; a softmax that can output
zero, or a gate, takes the pressure away. An OPT (learned positions, LayerNorm, biases), every window behind one token
that ends texts, so that there is a place to put probability::

    python examples/train_pair.py --out pair
    ptq analyze pair/clipped --clipped-softmax --softmax gamma=-0.03 --out pair/clipped-analysis

The log shows when outliers grow: the largest share of the first token in any head, and the largest infinity norm of any
tensor. Outlier metrics and perplexities are those of ``ptq analyze --clipped-softmax``, on held-out text.
"""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from python_text import VOCAB, encode, join, prepare, train_tokenizer
from torch import Tensor, nn
from training import train
from transformers import OPTConfig, OPTForCausalLM

from calibration.architectures import resolve
from calibration.progress import Silent
from calibration.text.crops import TokenBatches
from ptq.analysis.softmax_bench import Norms
from ptq.analysis.softmax_record import SoftmaxRow
from ptq.analysis.softmax_sweep import SweepOptions, sweep_softmax
from ptq.numerics.softmax import SoftmaxRule
from ptq.runtime.explicit_attention import Scores, exchanged_softmax

LENGTH = 128
WINDOWS = 48
"""Held-out windows: a third is scored, the others set static ranges."""
OPENNESS = 0.25
"""Of a gate before training, as in the paper for OPT."""


def build_model(layers: int, width: int, post_norm: bool) -> OPTForCausalLM:
    config = OPTConfig(
        vocab_size=VOCAB,
        hidden_size=width,
        word_embed_proj_dim=width,
        ffn_dim=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        max_position_embeddings=LENGTH,
        do_layer_norm_before=not post_norm,
        dropout=0.0,
        attention_dropout=0.0,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=0,
    )
    return OPTForCausalLM(config)


class Gates(nn.Module):
    """``sigmoid(w_h x_h + b_h)`` of the part x_h of the attention's input, one per head and token (section 4.2)."""

    def __init__(self, heads: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(heads, width) * 0.02)
        self.bias = nn.Parameter(torch.full((heads,), math.log(OPENNESS / (1 - OPENNESS))))
        self.open: Tensor | None = None

    def read(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        parts = args[0].unflatten(-1, self.weight.shape)
        self.open = torch.sigmoid((parts * self.weight).sum(-1) + self.bias)

    def apply_to_heads(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        assert self.open is not None
        heads = args[0].unflatten(-1, (len(self.bias), -1))
        return ((heads * self.open[..., None].to(heads.dtype)).flatten(-2),)


def add_gates(model: OPTForCausalLM) -> None:
    for layer in model.model.decoder.layers:
        attention = layer.self_attn
        attention.gates = gates = Gates(attention.num_heads, attention.head_dim)
        attention.q_proj.register_forward_pre_hook(gates.read)
        attention.out_proj.register_forward_pre_hook(gates.apply_to_heads)


class Watcher:
    """What grows while a model is trained: shares of the first token, and norms."""

    def __init__(self, model: Any, held: Tensor, every: int) -> None:
        self.model, self.held, self.every = model, held, every
        self.shares: list[Tensor] | None = None
        self.curve: list[dict[str, float]] = []

    def look(self, scores: Scores) -> None:
        if self.shares is not None:
            self.shares.append(scores.probabilities[:, :, 1:, 0].mean((0, 2)))

    def note(self, step: int) -> str:
        if step % self.every:
            return ""
        norms, self.shares = Norms(), []
        with torch.no_grad(), norms.watching(self.model, resolve(self.model.config)):
            self.model(self.held, use_cache=False)
        shares, self.shares = torch.cat(self.shares), None
        found = Norms.headline(norms.whole)
        entry = {
            "step": step,
            "largest_first_share": round(float(shares.max()), 4),
            "mean_first_share": round(float(shares.mean()), 4),
            "max_inf_norm": found["max_inf_norm"],
            "avg_kurtosis": found["avg_kurtosis"],
        }
        self.curve.append(entry)
        return "  ".join(f"{key} {value:g}" for key, value in entry.items() if key != "step")


def main(
    out: Annotated[Path, typer.Option(help="Folder to write: one checkpoint per variant, and pair.json.")],
    variants: Annotated[str, typer.Option(help="Comma-separated.")] = "plain,clipped,gated",
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 2500,
    batch: Annotated[int, typer.Option(help="Windows of 128 tokens per step.")] = 16,
    rate: Annotated[float, typer.Option(help="Peak learning rate.")] = 2e-3,
    layers: Annotated[int, typer.Option(help="Decoder blocks.")] = 4,
    width: Annotated[int, typer.Option(help="Hidden size; heads are 32 wide.")] = 128,
    post_norm: Annotated[bool, typer.Option("--post-norm", help="LayerNorm behind the sums, as in BERT.")] = False,
    gamma: Annotated[float, typer.Option(help="Of the clipped softmax; the paper's BERT has -3.2 / 128.")] = -0.025,
    every: Annotated[int, typer.Option(help="Steps between looks at outliers.")] = 250,
    seed: Annotated[int, typer.Option(help="Of weights and batches.")] = 0,
) -> None:
    """Train each variant from the same weights on the same batches, then measure it on held-out text."""
    torch.set_num_threads(1)
    corpus = prepare(0)
    tokenizer = train_tokenizer(corpus.train)
    end = int(tokenizer.eos_token_id)
    ids = torch.cat([torch.tensor([*encode(tokenizer, d.text), end]) for d in corpus.train])
    test = torch.tensor(encode(tokenizer, join(corpus.test)))
    held = behind_end(test[: WINDOWS * (LENGTH - 1)].view(WINDOWS, -1), end)
    results: dict[str, Any] = {}
    out.mkdir(parents=True, exist_ok=True)
    for name in variants.split(","):
        torch.manual_seed(seed)
        model = build_model(layers, width, post_norm)
        if name == "gated":
            add_gates(model)
        rule = SoftmaxRule(gamma=gamma) if name == "clipped" else SoftmaxRule()
        watcher = Watcher(model, held[:16], every)

        def windows(generator: torch.Generator) -> Tensor:
            offsets = torch.randint(len(ids) - LENGTH, (batch,), generator=generator)
            return behind_end(torch.stack([ids[o : o + LENGTH - 1] for o in offsets.tolist()]), end)

        print(f"{name}: {model.num_parameters():,} parameters, softmax {rule}", flush=True)
        start = time.perf_counter()
        with exchanged_softmax(model, rule, watcher.look):
            train(model, windows, steps=steps, rate=rate, seed=seed, note=watcher.note)
        model.save_pretrained(out / name)
        tokenizer.save_pretrained(out / name)
        row = measure(model.eval().requires_grad_(False), held, gamma if name == "clipped" else 0.0)
        results[name] = {
            "perplexity": row.perplexity,
            "perplexity_8_bit": row.perplexity_8_bit,
            "with_first_token": row.with_first_token,
            "without_first_token": row.without_first_token,
            "minutes": round((time.perf_counter() - start) / 60, 1),
            "curve": watcher.curve,
        }
        (out / "pair.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(table(results))


def behind_end(text: Tensor, end: int) -> Tensor:
    """``[windows, tokens]`` with the token that ends texts in front."""
    return torch.cat([torch.full((len(text), 1), end), text], 1)


def measure(model: Any, held: Tensor, gamma: float) -> SoftmaxRow:
    """The model with its own softmax; its weights are rounded afterwards."""
    settings = (f"gamma={gamma:g}",) if gamma else ()
    options = SweepOptions(settings, head_windows=0)
    sweep = sweep_softmax(model, resolve(model.config), TokenBatches(held, {}), WINDOWS // 3, options, False, Silent())
    return sweep.rows[-1]


def table(results: dict[str, Any]) -> str:
    lines = ["| attention | perplexity | W8A8 static | gap | max infinity norm | avg kurtosis | max kurtosis |"]
    lines.append("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for name, found in results.items():
        before, after, norms = found["perplexity"], found["perplexity_8_bit"], found["with_first_token"]
        numbers = [f"{norms[key]:.4g}" for key in ("max_inf_norm", "avg_kurtosis", "max_kurtosis")]
        cells = [name, f"{before:.3f}", f"{after:.3f}", f"{after / before - 1:+.2%}", *numbers]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    typer.run(main)
