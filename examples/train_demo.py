"""Train the small demo model that ships in ``calibration/demo``.

The text is what every CPython installation carries: the language reference pages behind ``help()``
(``pydoc_data.topics``) and the docstrings of the standard library. Nothing is downloaded::

    python examples/train_demo.py --out calibration/demo

Runs are seeded. The text itself depends on the Python version that runs the script, so the model card
written next to the weights names it.
"""

from __future__ import annotations

import ast
import copy
import inspect
import math
import platform
import random
import sysconfig
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from pydoc_data import topics
from typing import Annotated

import torch
import typer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

END = "<|endoftext|>"
VOCAB = 1024
WINDOW = 512
SKIP_DIRS = {"site-packages", "test", "tests", "idle_test", "lib2to3", "encodings", "turtledemo", "pydoc_data"}
SEPARATOR = "\n\n"


@dataclass(frozen=True)
class Document:
    """One reference topic, or the docstrings of one module."""

    name: str
    text: str

    @property
    def size(self) -> int:
        return len(self.text.encode())


# ---------------------------------------------------------------------------------------------- text


def module_entries(tree: ast.Module, module: str) -> Iterator[tuple[str, str]]:
    """(heading, docstring) of a module, its classes and its functions, in source order."""
    if doc := ast.get_docstring(tree):
        yield f"module {module}", doc

    def walk(body: list[ast.stmt], prefix: str) -> Iterator[tuple[str, str]]:
        for node in body:
            if isinstance(node, ast.ClassDef):
                bases = ", ".join(ast.unparse(base) for base in node.bases)
                if doc := ast.get_docstring(node):
                    yield f"class {prefix}{node.name}({bases})" if bases else f"class {prefix}{node.name}", doc
                yield from walk(node.body, f"{prefix}{node.name}.")
            elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and (doc := ast.get_docstring(node)):
                yield f"{prefix}{node.name}({ast.unparse(node.args)})", doc

    yield from walk(tree.body, "")


def raw_documents() -> Iterator[Document]:
    """Topics (longest first, as the short ones are often parts of them), then modules by name."""
    for name, text in sorted(topics.topics.items(), key=lambda item: (-len(item[1]), item[0])):
        yield Document(f"topic {name}", text)
    root = Path(sysconfig.get_paths()["stdlib"])
    seen: set[str] = set()
    for path in sorted(root.rglob("*.py"), key=lambda p: p.relative_to(root).as_posix()):
        parts = path.relative_to(root).with_suffix("").parts
        if SKIP_DIRS & set(parts) or parts[0].startswith(("config-", "_sysconfigdata")):
            continue
        try:
            with warnings.catch_warnings(action="ignore"):
                tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):
            continue
        module = ".".join(part for part in parts if part != "__init__")
        entries = []
        for heading, doc in module_entries(tree, module):
            if doc not in seen:
                seen.add(doc)
                entries.append(f"{heading}\n{inspect.cleandoc(doc)}")
        yield Document(f"module {module}", SEPARATOR.join(entries))


def collect() -> list[Document]:
    """Documents with every longer paragraph kept at its first appearance only.

    Reference topics repeat one another's sections, so without this a held-out page could be read in training.
    """
    seen: set[str] = set()
    documents = []
    for document in raw_documents():
        kept = []
        for paragraph in document.text.split(SEPARATOR):
            key = " ".join(paragraph.split())
            if len(key) >= 60 and key in seen:
                continue
            seen.add(key)
            kept.append(paragraph.rstrip())
        text = SEPARATOR.join(kept).strip("\n")
        if len(text) >= 400:
            documents.append(Document(document.name, text + "\n"))
    return documents


def take(documents: list[Document], limit: int, longest: int) -> list[Document]:
    """Whole documents, in order, none longer than `longest` bytes, that fit in `limit` bytes together."""
    chosen, total = [], 0
    for document in documents:
        cost = document.size + len(SEPARATOR)
        if document.size <= longest and total + cost <= limit:
            chosen.append(document)
            total += cost
    return chosen


def split(documents: list[Document], share: float, seed: int) -> tuple[list[Document], list[Document]]:
    """Shuffle and hold out `share` of the bytes, by whole documents; very long ones always train."""
    order = list(documents)
    random.Random(seed).shuffle(order)
    held = take(order, int(share * sum(d.size for d in order)), longest=20_000)
    names = {d.name for d in held}
    return [d for d in order if d.name not in names], held


# ------------------------------------------------------------------------------------ tokenizer, model


def train_tokenizer(documents: list[Document]) -> PreTrainedTokenizerFast:
    """Byte-level BPE; the one special token ends documents and is never added by itself."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=[END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator([d.text for d in documents], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=END,
        eos_token=END,
        model_max_length=WINDOW,
        clean_up_tokenization_spaces=False,
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


# ------------------------------------------------------------------------------------------- measuring


@torch.no_grad()
def perplexity(model: nn.Module, ids: Tensor, window: int = WINDOW) -> float:
    """Non-overlapping windows, the first token of each unscored, an incomplete last window dropped."""
    windows = ids[: len(ids) // window * window].view(-1, window)
    loss, count = 0.0, 0
    for batch in windows.split(16):
        logits = model(input_ids=batch, use_cache=False).logits[:, :-1].float()
        loss += nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum").item()
        count += batch[:, 1:].numel()
    return math.exp(loss / count)


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


# -------------------------------------------------------------------------------------------- training


def rate_factor(step: int, steps: int) -> float:
    """Warm-up, then the first part of a cosine that is one and a half times as long, then straight down to zero."""
    warm, cooldown, horizon = 100, round(0.225 * steps), round(1.5 * steps)
    if step < warm:
        return (step + 1) / warm
    cosine = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, horizon - warm)))
    return cosine * min(1.0, (steps - step) / cooldown)


def train(model: LlamaForCausalLM, ids: Tensor, held: Tensor, steps: int, tokens: int, rate: float, seed: int) -> int:
    """AdamW; each batch holds about `tokens` tokens in windows of one length.

    Returns the number of tokens seen. Held-out text is measured for the log only: nothing is chosen by it.
    """
    generator = torch.Generator().manual_seed(seed)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_factor(step, steps))
    start, seen = time.perf_counter(), 0
    for step in range(1, steps + 1):
        length = 32 * int(torch.randint(8, WINDOW // 32 + 1, (1,), generator=generator))  # 256 .. 512
        offsets = torch.randint(len(ids) - length, (tokens // length,), generator=generator)
        batch = torch.stack([ids[o : o + length] for o in offsets.tolist()])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(input_ids=batch[:, :-1], use_cache=False).logits
        loss = nn.functional.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        seen += batch.numel()
        if step % 100 == 0 or step == steps:
            text = f"step {step}/{steps}  loss {loss.item():.3f}  {seen / (time.perf_counter() - start):.0f} tokens/s"
            if step % 500 == 0 or step == steps:
                text += f"  held-out perplexity {perplexity(model, held):.3f}"
            print(f"{text}  {time.perf_counter() - start:.0f} s", flush=True)
    return seen


# ------------------------------------------------------------------------------------------ model card

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


@dataclass(frozen=True)
class Corpus:
    """The documents and what is written of them."""

    train: list[Document]
    held: list[Document]
    excerpt: list[Document]
    test: list[Document]


def prepare(seed: int) -> Corpus:
    train_documents, held = split(collect(), share=0.06, seed=seed)
    excerpt, test = take(train_documents, 350_000, longest=20_000), take(held, 130_000, longest=20_000)
    return Corpus(train_documents, held, excerpt, test)


def join(documents: list[Document]) -> str:
    return SEPARATOR.join(d.text for d in documents)


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False, verbose=False)


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
    results = {"as stored": perplexity(saved, torch.tensor(ids))}
    for bits in (8, 4, 3, 2):
        results[f"rounded to {bits} bits"] = perplexity(rounded(saved, bits), torch.tensor(ids))
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
    seen = train(model, ids, held, steps=steps, tokens=batch, rate=rate, seed=seed)
    minutes = (time.perf_counter() - start) / 60
    facts = {"seed": seed, "steps": steps, "batch": batch, "seen": seen, "rate": rate, "minutes": minutes}
    publish(out, model, tokenizer, corpus, **facts, threads=threads, train_tokens=len(ids))


if __name__ == "__main__":
    typer.run(main)
