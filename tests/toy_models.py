"""Texts and models of a few lines, for what does not need a network."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from calibration.text.encoding import EncodedText

V = 37


def encoded(ids: Tensor, bos_id: int | None = None) -> EncodedText:
    ones = torch.ones_like(ids)
    return EncodedText(ids, ones, 3 * ones, "toy", "f" * 16, "file as it is", bos_id is not None, bos_id=bos_id)


def random_text(n: int, vocabulary: int = V) -> EncodedText:
    return encoded(torch.randint(0, vocabulary, (n,), generator=torch.Generator().manual_seed(0)))


def bigram(seed: int = 0, vocabulary: int = V, spread: float = 2.0) -> Callable[[Tensor], Tensor]:
    """Logits from the last token alone, plus a part that depends on the position, so that windows matter."""
    generator = torch.Generator().manual_seed(seed)
    table = spread * torch.randn(vocabulary, vocabulary, generator=generator)
    positions = torch.randn(4096, vocabulary, generator=generator)
    return lambda ids: table[ids] + 0.3 * positions[: ids.shape[1]]
