"""Conversations as text: through the chat template of the model's tokenizer, in transformers' sandbox."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from calibration.errors import ToolkitError, foreign
from calibration.text.corpora import Corpus

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

JOINED = "conversations by the chat template"


def check_template(corpus: Corpus, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse conversations for a tokenizer without a chat template.

    Raises:
        ToolkitError: see above.
    """
    if corpus.chats and not tokenizer.chat_template:
        raise ToolkitError(
            f"{corpus.label}: conversations, and the tokenizer has no chat template",
            "name rows of text, or the instruction-tuned model that has one",
        )


def as_text(corpus: Corpus, tokenizer: PreTrainedTokenizerBase) -> Corpus:
    """A corpus of conversations as one of texts, one behind the other; any other corpus unchanged.

    Templates write the special tokens themselves, so the tokenizer adds none. They come with the model and are run as
    transformers runs them: in Jinja's immutable sandbox.

    Raises:
        ToolkitError: no chat template, or one that refuses a conversation (roles that it does not know, an order).
    """
    if not corpus.chats:
        return corpus
    check_template(corpus, tokenizer)
    rows = []
    for number, chat in enumerate(corpus.chats):
        with foreign(
            f"{corpus.label}, conversation {number}: the chat template refuses it",
            "give conversations as the model knows them: mostly user and assistant in turns",
        ):
            rows.append(str(tokenizer.apply_chat_template([dict(message) for message in chat], tokenize=False)))
    return replace(corpus, rows=rows, chats=(), joiner="", special_tokens=False, joined_by=JOINED)
