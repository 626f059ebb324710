"""A model whose softmax is changed between forward passes, scored and looked at."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from calibration.architectures import ArchitectureSpec
from calibration.model.classes import text_config
from calibration.model.watching import Watch, watching
from calibration.record import Evaluation
from calibration.scoring.perplexity import score
from calibration.scoring.windows import Scoring
from calibration.text.crops import TokenBatches
from calibration.text.encoding import EncodedText
from ptq.analysis.activations import SequenceNorms
from ptq.analysis.sites import short, sites_of
from ptq.analysis.static_inputs import Ranges, gathering_ranges
from ptq.analysis.summary import headline
from ptq.numerics.softmax import SoftmaxRule
from ptq.runtime.explicit_attention import Probabilities, Scores, exchanged_softmax

BATCH_TOKENS = 2048


@dataclass
class RowCounts:
    """Sums over rows of probabilities of all heads and blocks; shown every call of attention."""

    visible: int = 0
    zeros: int = 0
    rows: int = 0
    empty: int = 0
    mass: float = 0.0

    def look(self, scores: Scores) -> None:
        p = scores.probabilities
        visible = scores.logits > torch.finfo(scores.logits.dtype).min / 2
        sums = p.sum(-1)
        self.visible += int(visible.sum())
        self.zeros += int(((p == 0) & visible).sum())
        self.rows += sums.numel()
        self.empty += int((sums == 0).sum())
        self.mass += float(sums.sum(dtype=torch.float64))


@dataclass
class Norms:
    """Outlier metrics of all tensors that the analysis looks at, with and without first tokens."""

    whole: dict[tuple[int, str], SequenceNorms] = field(default_factory=dict)
    later: dict[tuple[int, str], SequenceNorms] = field(default_factory=dict)

    def look(self, key: tuple[int, str], x: torch.Tensor, positions: torch.Tensor) -> None:
        for sequence in x.float() if x.ndim == 3 else ():
            self.whole.setdefault(key, SequenceNorms()).add(sequence)
            self.later.setdefault(key, SequenceNorms()).add(sequence[1:])

    @contextmanager
    def watching(self, model: Any, spec: ArchitectureSpec) -> Iterator[None]:
        with ExitStack() as stack:
            for index, block in enumerate(model.get_submodule(spec.blocks)):
                sites = [site for site in sites_of(spec, index) if not site.experts]
                watches = [Watch(s.paths[0], partial(self.look, (index, s.role)), s.output) for s in sites]
                stack.enter_context(watching(block, watches))
            yield

    @staticmethod
    def headline(found: dict[tuple[int, str], SequenceNorms]) -> dict[str, Any]:
        return headline((block, role, short(n.inf_norm), short(n.kurtosis)) for (block, role), n in found.items())


class Bench:
    """A transformers model whose attention can be changed from one forward pass to the next.

    Attributes:
        rule: of all blocks; ``own`` those of single blocks, which go first. ``rows`` is shown every call, where set.
    """

    def __init__(self, model: Any, spec: ArchitectureSpec, tokens: TokenBatches, windows: int) -> None:
        self.model, self.spec, self.tokens, self.windows = model, spec, tokens, windows
        self.heads = int(text_config(model.config).num_attention_heads)
        self.rule: Probabilities = SoftmaxRule()
        self.own: dict[int, Probabilities] = {}
        self.rows: RowCounts | None = None

    @contextmanager
    def open(self) -> Iterator[None]:
        """The attention of the model exchanged, for the length of a ``with``."""

        def attention(block: int, logits: torch.Tensor) -> torch.Tensor:
            return self.own.get(block, self.rule)(logits)

        def look(scores: Scores) -> None:
            if self.rows is not None:
                self.rows.look(scores)

        by_block = [partial(attention, block) for block in range(self.spec.n_blocks)]
        with torch.no_grad(), exchanged_softmax(self.model, by_block, look):
            yield

    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.model(ids.to(self.model.device), use_cache=False).logits
        return found.cpu()

    def evaluate(self, windows: int, against_plain: bool = False, norms: Norms | None = None) -> Evaluation:
        """Score the first ``windows`` windows with what is set; ``against_plain`` with the KL from plain softmax."""

        def plain(ids: torch.Tensor) -> torch.Tensor:
            kept = self.rule, self.own, self.rows
            self.rule, self.own, self.rows = SoftmaxRule(), {}, None
            try:
                return self.logits(ids)
            finally:
                self.rule, self.own, self.rows = kept

        def changed(ids: torch.Tensor) -> torch.Tensor:
            with nullcontext() if norms is None else norms.watching(self.model, self.spec):
                return self.logits(ids)

        text = EncodedText.of_windows(self.tokens.input_ids[:windows], "the text of the analysis")
        window = self.tokens.seq_len
        batch = max(1, BATCH_TOKENS // window)
        dtype = str(self.model.dtype).removeprefix("torch.")
        scoring = Scoring(protocol="gptq", window=window, batch_size=batch, dtype=dtype)
        return score(changed, text, scoring, reference_fn=plain if against_plain else None)

    def gather(self) -> Ranges:
        """Ranges of inputs of linears on the windows that are not scored."""
        with gathering_ranges(self.model, self.spec) as ranges:
            for ids in self.tokens.input_ids[self.windows :].split(max(1, BATCH_TOKENS // self.tokens.seq_len)):
                self.logits(ids)
        return ranges
