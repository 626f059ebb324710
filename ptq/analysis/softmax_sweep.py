"""Other softmaxes in a finished model: what clipping costs, what it zeroes, and what it does to outliers.

Bondarenko et al. (NeurIPS 2023, arXiv 2306.12929) train with a clipped softmax. Here it is put into a model that was
trained without: an experiment that tells which heads would like to do nothing, not a method that mends the model. The
one part of the analysis that holds the whole model in memory, and with it the probabilities of one batch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from calibration.architectures import ArchitectureSpec
from calibration.errors import ToolkitError
from calibration.progress import Progress
from calibration.text.crops import TokenBatches
from ptq.analysis.head_clipping import HEAD_GAMMAS, LIMIT, clip_heads, own_gammas
from ptq.analysis.sites import short
from ptq.analysis.softmax_bench import Bench, Norms, RowCounts
from ptq.analysis.softmax_record import HeadClipping, SoftmaxRow, SoftmaxSweep
from ptq.analysis.static_inputs import SCHEME, round_weights, static_inputs
from ptq.numerics.softmax import SoftmaxRule
from ptq.runtime.explicit_attention import Probabilities, parse_softmax

PLAIN, PER_HEAD = "plain", "each head its own"
SETTINGS = (
    *(f"gamma={gamma:g}" for gamma in HEAD_GAMMAS),
    "alpha=4",
    "alpha=12",
    "zeta=1.03",
    "gamma=-0.003,normalise",
    "gamma=-0.01,normalise",
    "off-by-one",
)
GATES = ("closed=0.99", "closed=0.9", "closed=0.5")
"""Gates that a finished model can have without weights for them: shut where the first token gets that much."""
FREE = 0.01
"""Relative increase of perplexity up to which a softmax counts as free."""
KEPT = 0.5
"""Outliers stay where their metrics keep at least this share."""


@dataclass(frozen=True)
class SweepOptions:
    """What is tried.

    Attributes:
        settings: softmaxes, as ``ptq eval --softmax`` takes them; the plain one goes first by itself.
        head_windows: of the scored windows the first, that judge single heads; 0 leaves heads out.
        shut: score every head shut, too.
    """

    settings: tuple[str, ...] = SETTINGS
    head_windows: int = 2
    shut: bool = False


def sweep_options(wanted: bool, gated: bool, softmax: Sequence[str], head_windows: int) -> SweepOptions | None:
    """What ``--clipped-softmax`` tries, None where it is not wanted: gates and heads that are shut with ``gated``,
    settings of one's own in ``softmax``.

    Raises:
        ToolkitError: one of its parts without it.
    """
    if (gated or softmax) and not wanted:
        raise ToolkitError("--gated and --softmax are parts of --clipped-softmax", "add --clipped-softmax")
    settings = tuple(dict.fromkeys([*SETTINGS, *(GATES if gated else ()), *softmax]))
    return SweepOptions(settings, head_windows, gated) if wanted else None


@dataclass(frozen=True)
class _Setting:
    """A softmax to try; ``own`` of single blocks."""

    text: str
    gamma: float | None
    rule: Probabilities
    own: dict[int, Probabilities] = field(default_factory=dict)


def sweep_softmax(
    model: Any,
    spec: ArchitectureSpec,
    tokens: TokenBatches,
    windows: int,
    options: SweepOptions,
    quantized: bool,
    progress: Progress,
) -> SoftmaxSweep:
    """Try every softmax. The weights of ``model`` are rounded in the end: it is of no use afterwards.

    Args:
        model: of transformers, with all weights; ``quantized`` models are not rounded once more.
        windows: of ``tokens``, that are scored; the others set static ranges.

    Raises:
        ToolkitError: its attention cannot be exchanged.
    """
    bench = Bench(model, spec, tokens, windows)
    settings = [_parsed(PLAIN, tokens.seq_len), *(_parsed(text, tokens.seq_len) for text in options.settings)]
    heads: tuple[HeadClipping, ...] = ()
    with bench.open():
        if options.head_windows:
            progress.stage("single heads", spec.n_blocks * bench.heads)
            heads = clip_heads(bench, spec.n_blocks, bench.heads, options.head_windows, options.shut, progress.advance)
            settings.append(_Setting(PER_HEAD, None, SoftmaxRule(), own_gammas(heads, bench.heads)))
        progress.stage("softmaxes", len(settings) * (1 if quantized else 2))
        rows, ranges = [], []
        for setting in settings:
            bench.rule, bench.own = setting.rule, setting.own
            rows.append(_row(bench, setting))
            ranges.append(None if quantized else bench.gather())
            progress.advance(setting.text)
        if not quantized:
            round_weights(model, spec)
            for i, setting in enumerate(settings):
                found = ranges[i]
                assert found is not None
                bench.rule, bench.own = setting.rule, setting.own
                with static_inputs(model, spec, found):
                    rows[i] = dataclasses.replace(rows[i], perplexity_8_bit=short(bench.evaluate(windows).perplexity))
                progress.advance(f"{setting.text}, 8 bits")
    return SoftmaxSweep(
        window=tokens.seq_len,
        windows=windows,
        range_windows=len(tokens) - windows,
        head_windows=options.head_windows,
        scheme=SCHEME,
        limit=LIMIT,
        rows=tuple(rows),
        heads=heads,
        finding=finding(rows),
    )


def _parsed(text: str, length: int) -> _Setting:
    rule = SoftmaxRule() if text == PLAIN else parse_softmax(text, length)
    clipping = not rule.off_by_one and not rule.normalise and rule.closed_from is None and rule.zeta == 1
    return _Setting(text, rule.gamma if clipping else None, rule)


def _row(bench: Bench, setting: _Setting) -> SoftmaxRow:
    norms = Norms()
    bench.rows = seen = RowCounts()
    found = bench.evaluate(bench.windows, against_plain=True, norms=norms)
    bench.rows = None
    assert found.divergence is not None
    return SoftmaxRow(
        softmax=setting.text,
        gamma=setting.gamma,
        perplexity=short(found.perplexity),
        divergence=short(found.divergence.kl_mean),
        zeros=short(seen.zeros / max(seen.visible, 1)),
        row_sum=short(seen.mass / max(seen.rows, 1)),
        empty_rows=short(seen.empty / max(seen.rows, 1)),
        with_first_token=Norms.headline(norms.whole),
        without_first_token=Norms.headline(norms.later),
        perplexity_8_bit=None,
    )


def finding(rows: Sequence[SoftmaxRow]) -> str:
    """What the largest clipping that leaves the model nearly as good does to its outliers, in words."""
    plain = rows[0]
    free = [r for r in rows if r.gamma and r.perplexity < plain.perplexity * (1 + FREE)]
    if not free:
        return (
            f"Every gamma tried costs more than {FREE:.0%} of the perplexity: the model needs its small probabilities."
        )
    largest = min(free, key=lambda row: row.gamma or 0.0)
    norm, kurtosis = (
        [row.with_first_token.get(key, 0.0) for row in (plain, largest)] for key in ("max_inf_norm", "avg_kurtosis")
    )
    said = (
        f"Clipping by gamma {largest.gamma:g} costs less than {FREE:.0%} of the perplexity and takes the largest "
        f"infinity norm from {norm[0]:.4g} to {norm[1]:.4g}, the average kurtosis from {kurtosis[0]:.4g} to "
        f"{kurtosis[1]:.4g}. "
    )
    if norm[1] > KEPT * norm[0] and kurtosis[1] > KEPT * kurtosis[0]:
        return said + "Outliers stay: weights write them, which were trained without clipping."
    return said + "Outliers shrink, although the weights were trained without clipping."
