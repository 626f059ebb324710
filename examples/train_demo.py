"""Train the small demo model that ships in ``calibration/demo``.

The text is what every CPython installation carries: the language reference pages behind ``help()``
(``pydoc_data.topics``) and the docstrings of the standard library. Nothing is downloaded::

    python examples/train_demo.py --out calibration/demo

Runs are seeded. The text itself depends on the Python version that runs the script, so the model card
written next to the weights names it.
"""

from __future__ import annotations

import copy
import platform
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from python_text import (
    VOCAB,
    WINDOW,
    Corpus,
    encode,
    join,
    prepare,
    train_tokenizer,
)
from torch import Tensor, nn
from training import perplexity, train
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)


def build_model() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=WINDOW,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )
    return LlamaForCausalLM(config)


@torch.no_grad()
def rounded(model: nn.Module, bits: int, group: int = 128) -> nn.Module:
    """A copy whose decoder linears are rounded to nearest: symmetric, one scale per `group` inputs."""
    model = copy.deepcopy(model)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and ".layers." in name:
            weight = module.weight.view(module.out_features, -1, group)
            scale = weight.abs().amax(-1, keepdim=True).clamp_min(1e-8) / ((high - low) / 2)
            weight.copy_((weight / scale).round().clamp(low, high) * scale)
    return model


CARD = """# ptq demo model

A {parameters:,}-parameter Llama (3 layers, hidden 256, 4 query and 2 key/value heads, vocabulary {vocab}) for trying
`ptq` without a network, and for tests. It writes plausible fragments of Python documentation and nothing else:
it is no use as a language model.

## Text

The reference pages behind `help()` (`pydoc_data.topics`) and the docstrings of the standard library of
CPython {python}: {documents} documents, {text_bytes:,} bytes. Every paragraph of 60 characters or more occurs once.
Documents (one topic, or one module's docstrings) were split by a seeded shuffle: {train_documents} train
({train_bytes:,} bytes, {train_tokens:,} tokens), {held_documents} held out ({held_bytes:,} bytes), none in both.

| File | Content |
|---|---|
| `train.txt` | {excerpt_documents} of the training documents, {excerpt_tokens:,} tokens, for calibration |
| `test.txt` | {test_documents} of the held-out documents, {test_tokens:,} tokens, for evaluation |

The text is part of Python, copyright (c) 2001 onwards Python Software Foundation, and is distributed under the
Python Software Foundation License Version 2 (<https://docs.python.org/3/license.html>). `train.txt` and `test.txt`
are excerpts under that licence, rearranged: docstrings are listed by module with their headings.

## Training

`python examples/train_demo.py --steps {steps} --threads {threads}` (seed {seed}): AdamW steps of about {batch} tokens
in random windows of 256 to 512 tokens, {seen:,} tokens in all; peak learning rate {rate} (warm-up, part of a cosine,
straight down to zero over the last 22.5 %), weight decay 0.1, gradients clipped at 1.0, bfloat16 autocast. It took
{minutes:.0f} minutes (torch {torch}). The weights are stored in bfloat16. The tokenizer is a byte-level BPE trained on
the training documents; `<|endoftext|>` (id 0) ended each document in training and is not added by the tokenizer.

## Held-out perplexity

`test.txt` as one text, non-overlapping windows of 512 tokens, an incomplete last window dropped, the first token of
each window not scored, no BOS, float32 arithmetic. "Rounded" is plain round-to-nearest of the decoder linears:
symmetric integers, one scale per 128 inputs (largest magnitude over half the integer range), no calibration.

| Weights | Perplexity |
|---|---|
{rows}
"""


def publish(
    out: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, corpus: Corpus, **facts: float
) -> None:
    """Write model, tokenizer and texts, then measure what was written and describe it in the card."""
    out.mkdir(parents=True, exist_ok=True)
    model.to(dtype=torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    (out / "train.txt").write_text(join(corpus.excerpt), encoding="utf-8", newline="\n")
    (out / "test.txt").write_text(join(corpus.test), encoding="utf-8", newline="\n")

    saved = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    loaded = AutoTokenizer.from_pretrained(out)
    text = (out / "test.txt").read_text(encoding="utf-8")
    ids = encode(loaded, text)
    if ids != encode(tokenizer, text) or loaded.decode(ids) != text:
        raise RuntimeError("the saved tokenizer does not reproduce the one that was trained")
    results = {"as stored": perplexity(saved, torch.tensor(ids), WINDOW)}
    for bits in (8, 4, 3, 2):
        results[f"rounded to {bits} bits"] = perplexity(rounded(saved, bits), torch.tensor(ids), WINDOW)
    card = CARD.format(
        parameters=saved.num_parameters(),
        vocab=VOCAB,
        python=platform.python_version(),
        documents=len(corpus.train) + len(corpus.held),
        text_bytes=sum(d.size for d in [*corpus.train, *corpus.held]),
        train_documents=len(corpus.train),
        train_bytes=sum(d.size for d in corpus.train),
        held_documents=len(corpus.held),
        held_bytes=sum(d.size for d in corpus.held),
        excerpt_documents=len(corpus.excerpt),
        excerpt_tokens=len(encode(loaded, join(corpus.excerpt))),
        test_documents=len(corpus.test),
        test_tokens=len(ids),
        torch=torch.__version__,
        rows="\n".join(f"| {name} | {value:.2f} |" for name, value in results.items()),
        **facts,
    )
    (out / "README.md").write_text(card, encoding="utf-8", newline="\n")
    for path in sorted(out.iterdir()):
        path.chmod(0o644)
        print(f"{path.stat().st_size:>9,}  {path.name}")
    print("\n".join(f"{name}: {value:.3f}" for name, value in results.items()))


def main(
    out: Annotated[Path, typer.Option(help="Folder to write.")] = Path("calibration/demo"),
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 2000,
    batch: Annotated[int, typer.Option(help="Tokens per step, about.")] = 4096,
    rate: Annotated[float, typer.Option(help="Peak learning rate.")] = 2e-3,
    seed: Annotated[int, typer.Option(help="Seed of the split, the weights and the batches.")] = 0,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
) -> None:
    """Train the demo model and write it, its calibration and test texts and its card."""
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    corpus = prepare(seed)
    tokenizer = train_tokenizer(corpus.train)
    encoded = [torch.tensor([*encode(tokenizer, d.text), tokenizer.eos_token_id]) for d in corpus.train]
    ids, held = torch.cat(encoded), torch.tensor(encode(tokenizer, join(corpus.test)))
    print(f"{len(corpus.train)} training documents, {len(ids)} tokens; {len(corpus.held)} held out", flush=True)
    model = build_model()
    start = time.perf_counter()

    def windows(generator: torch.Generator) -> Tensor:
        length = 32 * int(torch.randint(8, WINDOW // 32 + 1, (1,), generator=generator))  # 256 .. 512
        offsets = torch.randint(len(ids) - length, (batch // length,), generator=generator)
        return torch.stack([ids[o : o + length] for o in offsets.tolist()])

    def note(step: int) -> str:
        """For the log only: nothing is chosen by held-out text."""
        if step % 500 and step != steps:
            return ""
        return f"held-out perplexity {perplexity(model, held, WINDOW):.3f}"

    seen = train(model, windows, steps=steps, rate=rate, seed=seed, note=note)
    minutes = (time.perf_counter() - start) / 60
    facts = {"seed": seed, "steps": steps, "batch": batch, "seen": seen, "rate": rate, "minutes": minutes}
    publish(out, model, tokenizer, corpus, **facts, threads=threads, train_tokens=len(ids))


if __name__ == "__main__":
    typer.run(main)
