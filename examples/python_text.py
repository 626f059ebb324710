"""Text that every CPython installation carries, and a tokenizer for it: what the example models are trained on.

The language reference pages behind ``help()`` (``pydoc_data.topics``) and the docstrings of the standard library. It
depends on the Python version that runs the script.
"""

from __future__ import annotations

import ast
import inspect
import random
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from pydoc_data import topics

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

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
