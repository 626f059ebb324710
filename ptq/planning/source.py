"""The one way in: a model opened for forward passes over a text, from headers alone.

Everything that works on a checkpoint and a calibration text begins here: quantize, sparsify, fit, analyze, the studies
and prepare.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from calibration.architectures import ArchitectureSpec
from calibration.bounds import check_counts
from calibration.errors import ToolkitError
from calibration.memory import return_freed
from calibration.model.checkpoint import CheckpointReader
from calibration.model.classes import text_config
from calibration.model.opening import (
    DEMO,
    DEMO_FOLDER,
    context_length,
    forward_dtype,
    load_tokenizer,
    locate,
    open_model,
)
from calibration.progress import Progress, Silent
from calibration.record import read_record
from calibration.text.chats import check_template
from calibration.text.corpora import BUILTIN, KNOWN_NAMES, check_name, load_corpus
from calibration.text.crops import TokenBatches, check_tokenizer, read_ids
from calibration.text.generated import BATCH, GENERATED, check_can_write, first_tokens, generate_tokens
from calibration.text.hub_sets import Unreachable
from calibration.text.random_tokens import RANDOM
from calibration.text.samples import model_tokens
from ptq.devices import parse_dtype, resolve_device
from ptq.runtime.load import checkpoint_dtype, load_model
from sparsity.files import made_of

SHORT = 1 << 24  # bytes of a text that may be too short: plans tokenize no longer ones
BATCH_TOKENS = 2048  # tokens per calibration forward: enough to fill the cores, few enough to stay in cache


@dataclass(frozen=True)
class TextOptions:
    """Calibration text, and where forward passes over it run.

    Attributes:
        dataset: a known set, a file, ``generated`` to have the model write it, or ``random`` tokens; None: wikitext2
            (the built-in text where the hub cannot be reached), or the demo's own text for the demo and what was made
            of it.
        samples, seq_len, seed: windows of text, tokens in each (cut to the model's context), and which they are.
        device, dtype: of forward passes; ``auto`` is the GPU where there is one, and the checkpoint's dtype where the
            machine is fast at it.
        trust_remote_code: run Python code that comes with the model.
    """

    dataset: str | None = None
    samples: int = 128
    seq_len: int = 2048
    seed: int = 0
    device: str = "auto"
    dtype: str = "auto"
    trust_remote_code: bool = False


@dataclass(frozen=True, repr=False)
class Source:
    """A checkpoint and a text, open: headers read, no tensor.

    Attributes:
        name: the hub id, or the folder's own name (paths stay private).
        origin: ``hub``, ``folder`` or ``demo``.
        config: of transformers.
        options: as they were asked for; ``dataset`` and ``seq_len`` of this object are what they came to.
        dtype: of forward passes.
        batch_size: windows per forward pass.
        notes: what a user must be told, such as a ``seq_len`` that was cut.
    """

    name: str
    origin: str
    reader: CheckpointReader
    config: Any
    spec: ArchitectureSpec
    options: TextOptions
    dataset: str
    seq_len: int
    device: torch.device
    dtype: torch.dtype
    batch_size: int
    notes: tuple[str, ...]

    @property
    def folder(self) -> Path:
        return self.reader.folder

    @property
    def provenance(self) -> Mapping[str, str]:
        """``name`` and ``source`` for a record beside what is made of this; ``demo`` also for what came of it."""
        return {"name": self.name, "source": DEMO if is_of_demo(self.folder) else self.origin}

    def check_text(self) -> None:
        """Refuse a data set that is neither known nor a readable file with what calibration needs in it, and a model
        that cannot write its own text. Sets of the hub are not fetched for that.

        Raises:
            ToolkitError: see above.
        """
        if self.dataset == GENERATED:
            check_can_write(self.reader, self.config, self.spec)
            first_tokens(load_tokenizer(self.folder, self.options.trust_remote_code))
        elif self.dataset != RANDOM:
            check_name(self.dataset)
            if self.dataset not in KNOWN_NAMES and Path(self.dataset).is_file():
                self._check_file(Path(self.dataset))

    def check_length(self) -> None:
        """For a plan: refuse a text on this machine that has too few tokens. Sets of the hub are not fetched for that.

        Raises:
            ToolkitError: see above.
        """
        if is_short_file(self.dataset):
            self.windows(Silent())

    def _check_file(self, path: Path) -> None:
        """Open a file of text, rows or token ids."""
        if path.suffix == ".safetensors":
            read_ids(path, self.options.samples, self.seq_len, int(text_config(self.config).vocab_size))
            return
        corpus = load_corpus(str(path), "calibrate")
        if corpus.chats:
            check_template(corpus, load_tokenizer(self.folder, self.options.trust_remote_code))
        elif not corpus.text.strip():
            raise ToolkitError(f"--dataset {path}: no text in it", "give a longer text")

    def tell(self, progress: Progress) -> None:
        """Hand the notes to a display."""
        for note in self.notes:
            progress.message(note)

    def windows(self, progress: Progress, *, seed: int | None = None, dataset: str | None = None) -> TokenBatches:
        """The windows of the text. Where none was named and the default cannot be had, those of the built-in text.

        Args:
            seed, dataset: others than the options have.

        Raises:
            ToolkitError: see `model_tokens`.
        """
        o, dataset = self.options, dataset or self.dataset
        seed = o.seed if seed is None else seed
        if dataset == GENERATED:
            return self._written(seed, progress)
        progress.stage("tokenize", 1)
        tokens = self._of_text(dataset, seed, progress)
        progress.advance("text")
        return tokens

    def _of_text(self, dataset: str, seed: int, progress: Progress) -> TokenBatches:
        o = self.options
        try:
            return self._tokens(dataset, seed)
        except Unreachable as error:
            if o.dataset is not None:
                raise
            progress.message(f"{error.message}: calibrating on the built-in text; --dataset names another")
            return self._tokens(BUILTIN, seed)

    def _tokens(self, dataset: str, seed: int) -> TokenBatches:
        o = self.options
        return model_tokens(self.folder, self.config, dataset, o.samples, self.seq_len, seed, o.trust_remote_code)

    def _written(self, seed: int, progress: Progress) -> TokenBatches:
        """Text of the model's own; the model is gone again afterwards."""
        o = self.options
        tokenizer = load_tokenizer(self.folder, o.trust_remote_code)
        check_tokenizer(tokenizer, int(text_config(self.config).vocab_size))
        progress.stage("write", -(-o.samples // BATCH))
        loaded = load_model(self.folder, dtype=self.dtype, device=self.device, trust_remote_code=o.trust_remote_code)
        tokens = generate_tokens(loaded.model, tokenizer, o.samples, self.seq_len, seed, progress.advance)
        del loaded
        return_freed()
        return tokens


def open_source(model: str | Path, options: TextOptions) -> Source:
    """Open a model for forward passes over a text; no tensor is read.

    Raises:
        ToolkitError: too few samples or tokens, a model, device or dtype that is not there, a broken checkpoint.
    """
    if options.samples < 1 or options.seq_len < 2:
        raise ToolkitError(
            f"--samples {options.samples} --seq-len {options.seq_len}: too small", "use at least 1 sample of 2 tokens"
        )
    check_counts(samples=options.samples, seq_len=options.seq_len, seed=options.seed)
    folder = locate(model)
    reader, config, spec = open_model(folder, options.trust_remote_code)
    device = resolve_device(options.device)
    stored = checkpoint_dtype(reader, spec)
    seq_len, notes = cut_to_context(options.seq_len, config)
    origin = "demo" if str(model) == DEMO else "folder" if Path(model).exists() else "hub"
    return Source(
        name=Path(model).resolve().name if origin == "folder" else str(model),
        origin=origin,
        reader=reader,
        config=config,
        spec=spec,
        options=options,
        dataset=options.dataset or default_dataset(folder),
        seq_len=seq_len,
        device=device,
        dtype=forward_dtype(stored, device) if options.dtype == "auto" else parse_dtype(options.dtype),
        batch_size=max(1, min(options.samples, BATCH_TOKENS // seq_len)),
        notes=notes,
    )


def cut_to_context(seq_len: int, config: Any, option: str = "--seq-len") -> tuple[int, tuple[str, ...]]:
    """A window that the model takes, and what to say where that is not the one asked for."""
    longest = context_length(config)
    if seq_len <= longest:
        return seq_len, ()
    return longest, (f"{option} {seq_len} is longer than the model's context: cut to {longest}",)


def default_dataset(folder: Path) -> str:
    """``builtin`` for the demo and what was made of it, else ``wikitext2``."""
    return BUILTIN if is_of_demo(folder) else "wikitext2"


def is_short_file(dataset: str) -> bool:
    """Whether a text lies on this machine and is tokenized within seconds."""
    return dataset == BUILTIN or (Path(dataset).is_file() and Path(dataset).stat().st_size <= SHORT)


def is_of_demo(folder: Path) -> bool:
    """Whether a folder is the demo, or a quantized or sparsified copy of it."""
    if folder.resolve() == DEMO_FOLDER.resolve():
        return True
    with suppress(ToolkitError):  # no record, or a report.json of another program
        if read_record(folder).model.get("source") == DEMO:
            return True
    return made_of(folder).get("source") == DEMO
