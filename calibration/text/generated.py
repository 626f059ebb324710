"""Calibration windows that the model writes itself (Liu et al. 2023, LLM-QAT, arXiv 2305.17888; Li et al. 2024, norm
tweaking, arXiv 2309.02784): needs no text, but the whole model in memory."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from calibration.architectures.spec import ArchitectureSpec
from calibration.errors import ToolkitError
from calibration.model.checkpoint import CheckpointReader
from calibration.model.classes import rope_switch
from calibration.recorded import CalibrationFacts
from calibration.text.crops import TokenBatches, tokens_fingerprint
from calibration.text.encoding import wanted_bos

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

GENERATED = "generated"
"""What ``--dataset`` says for text of the model's own."""
WRITERS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")  # ends of the names of classes that write text
WORD_STARTS = ("\u0120", "\u2581")  # how byte-level BPE and SentencePiece mark a token that starts a word
BATCH = 32  # sequences that are written side by side
GREEDY = (3, 4, 5)  # tokens of a sample until sampling begins, the first one included


def check_can_write(reader: CheckpointReader, config: Any, spec: ArchitectureSpec) -> None:
    """Refuse, from headers alone, a checkpoint that has nothing to write text with.

    Raises:
        ToolkitError: it has no head, or its config says that it was trained for something else.
    """
    fix = "name a text with --dataset"
    named = list(getattr(config, "architectures", None) or [])
    if named and not any(name.endswith(WRITERS) or name.endswith("Model") for name in named):
        raise ToolkitError(f"--dataset {GENERATED}: {reader.folder} is a {named[0]}, which does not write text", fix)
    tied = getattr(config, "tie_word_embeddings", False)
    if not tied and "lm_head.weight" not in {spec.root_module_name(name) for name in reader.infos}:
        raise ToolkitError(
            f"--dataset {GENERATED}: {reader.folder} has no lm_head.weight, so it cannot generate text", fix
        )


def first_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids that may begin a sample: words, or beginnings of words, in ASCII letters.

    A vocabulary has many tokens of languages that the model saw little of and in which it writes poor text: this is
    the published restriction to the main languages of the training text, for tables that no tokenizer has. Special
    tokens and runs of one letter are out. Where the vocabulary marks beginnings of words, only those are in.

    Raises:
        ToolkitError: no token is left.
    """
    special = set(tokenizer.all_special_ids)
    vocabulary = {i: token for token, i in tokenizer.get_vocab().items() if i not in special}
    marked = {i: t for i, t in vocabulary.items() if t.startswith(WORD_STARTS) and len(t) > 1}
    found = []
    for i, token in sorted((marked or vocabulary).items()):
        word = token.lstrip("".join(WORD_STARTS))
        if word.isascii() and word.isalpha() and not (len(word) >= 3 and len(set(word[:3])) == 1):
            found.append(i)
    if not found:
        raise ToolkitError(
            f"--dataset {GENERATED}: no token of the vocabulary begins a word in ASCII letters",
            "name a text with --dataset",
        )
    return found


def generate_tokens(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    samples: int,
    seq_len: int,
    seed: int,
    advance: Callable[[str], None],
) -> TokenBatches:
    """Windows of text that ``model`` writes: a random first token, the next few greedily, the rest sampled from the
    whole distribution at temperature 1. BOS stands in front where the tokenizer puts one there. Where the model ends a
    text (any special token), a new first token goes on.

    Args:
        model: a transformers causal language model; see `check_can_write`.
        advance: called after every batch.
    """
    allowed = first_tokens(tokenizer)
    text = torch.tensor(sorted(set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids)))
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    firsts: list[int] = []
    while len(firsts) < samples:  # every token once before any twice
        firsts += rng.sample(allowed, len(allowed))
    rows, bos = [], wanted_bos(tokenizer)
    start_ids = [] if bos is None else [bos]
    for start in range(0, samples, BATCH):
        numbers = torch.arange(start, min(start + BATCH, samples))
        ids = torch.tensor([[*start_ids, firsts[i]] for i in numbers.tolist()], dtype=torch.int64)
        greedy = torch.tensor(GREEDY)[numbers % len(GREEDY)] + len(start_ids)
        rows.append(_write(model, ids, greedy, seq_len, text, lambda: rng.choice(allowed), generator))
        advance("write")
    ids = torch.cat(rows)
    source: CalibrationFacts = {
        "dataset": GENERATED,
        "builder": "generated",
        "samples": samples,
        "samples_asked": samples,
        "seq_len": seq_len,
        "seed": seed,
        "bos": bos is not None,
        "tokens": ids.numel(),
        "fingerprint": tokens_fingerprint(ids),
    }
    return TokenBatches(ids, source)


@torch.no_grad()
def _write(
    model: Any,
    ids: torch.Tensor,
    greedy: torch.Tensor,
    seq_len: int,
    text: torch.Tensor,
    restart: Callable[[], int],
    generator: torch.Generator,
) -> torch.Tensor:
    """Continue ``ids [n, 1 or 2]`` to ``[n, seq_len]``; row i is greedy up to its token number ``greedy[i]``.

    What is not among the ids ``text`` (special tokens, rows of a padded vocabulary) is replaced by ``restart``."""
    past, step, switch = None, ids, rope_switch(model.config)
    while ids.shape[1] < seq_len:
        output = model(step.to(model.device), past_key_values=past, use_cache=True)
        past, logits = output.past_key_values, output.logits[:, -1].float().cpu()
        sampled = torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]
        step = torch.where(ids.shape[1] < greedy, logits.argmax(-1), sampled)[:, None]
        for row in torch.isin(step[:, 0], text, invert=True).nonzero()[:, 0].tolist():
            step[row, 0] = restart()
        ids = torch.cat((ids, step), dim=1)
        if ids.shape[1] - 1 == switch:  # keys in the cache have the frequencies of shorter texts
            past, step = None, ids
    return ids
