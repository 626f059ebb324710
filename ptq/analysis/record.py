"""The record of an analysis: plain data, from which every report is made."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from calibration.recorded import CalibrationFacts
from calibration.shown import Shown
from ptq.analysis.softmax_record import SoftmaxSweep
from ptq.study.frontier import Point
from ptq.study.sensitivity import SchemeSensitivity

SCHEMA_VERSION = 2


@dataclass(frozen=True)
class OutlierChannel:
    """A channel whose mean |x| is more than `RATIO` times that of all channels (Nrusimha et al. 2024).

    Attributes:
        ratio: mean |x| of the channel over the mean of all channels.
        max_abs: largest |x|, first tokens of sequences left out.
        persistence: share of the texts in which the channel is an outlier by the same rule.
    """

    channel: int
    ratio: float
    max_abs: float
    persistence: float


@dataclass(frozen=True)
class Peak:
    """One value. ``position`` in its sequence; ``token`` is its text, None where it is not known (experts)."""

    value: float
    channel: int
    position: int
    token: str | None


@dataclass(frozen=True)
class Massive:
    """Massive activations (Sun et al. 2024): ``|x| > 100`` and more than 1000 times the median of its sequence.

    Attributes:
        count: how many values.
        channels, positions: ``(index, count)``, most frequent first.
        largest: the largest in each of the first channels.
    """

    count: int
    channels: tuple[tuple[int, int], ...]
    positions: tuple[tuple[int, int], ...]
    largest: tuple[Peak, ...]


@dataclass(frozen=True)
class SixSigma:
    """Values further than six standard deviations from the mean of their sequence (Bondarenko et al. 2023).

    Attributes:
        count, share: how many, and of all values.
        channels, positions: ``(index, count)``, most frequent first. ``tokens``: ``(text, count)``.
        channels_hit: channels with at least one.
    """

    count: int
    share: float
    channels_hit: int
    channels: tuple[tuple[int, int], ...]
    positions: tuple[tuple[int, int], ...]
    tokens: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class SiteRecord:
    """One tensor of one block. "Later" numbers leave out the first token of every sequence.

    Attributes:
        role: ``attention input``, ``o input``, ``mlp input``, ``down input``, ``attention output``, ``mlp output``,
            ``block output`` (the residual stream).
        linears: that read it, or the one that writes it; block-relative names, ``*`` for experts.
        balanced: what a scale per channel could be moved into exactly: ``norm``, ``linear``, ``value`` or None.
        max_abs: largest |x|, and `largest`, where it is.
        inf_norm: max |x| of a sequence, averaged over sequences; None where parts of sequences were seen (experts).
        kurtosis_sequence: of all values of a sequence, averaged over sequences (the paper's).
        kurtosis_tensor: of all values. ``kurtosis_token``: over channels, averaged over tokens. ``kurtosis_channel``:
            over tokens, the median channel. All three of later tokens.
        channel_disparity: largest over median of the channels' max |x| (later). ``token_disparity``: of the tokens'
            (all). ``percentile_ratio``: 99.99 % over 50 % quantile of |x| (later).
        outlier_channels: largest ratio first (later).
        standout: channels whose mean and largest |x| are more than 10 times the median channel's (later): unlike the
            mean, the median does not grow with the outliers, so that many of them do not hide each other.
        emergent: channels with |x| >= 6 at 6 % of the positions or more (Dettmers et al. 2022).
        sqnr: decibels of symmetric rounding to 8 and 4 bits with one scale per ``tensor`` (range of all text),
            ``tensor-later``, ``token`` or ``channel``; keys like ``token-8``.
        output_error: ||X W^T - Q(X) W^T|| / ||X W^T|| of the linears that read it, for the same keys.
        octaves: ``(e, count)`` of later values with ``2^e <= |x| < 2^(e+1)``.
        six_sigma_at: six deviations of all later values, for the histogram.
        profile: max |x| (later) of equal runs of channels, for the heat map.
    """

    block: int
    role: str
    linears: tuple[str, ...]
    balanced: str | None
    width: int
    tokens: int
    max_abs: float
    largest: Peak
    inf_norm: float | None
    inf_norm_later: float | None
    kurtosis_sequence: float | None
    kurtosis_sequence_later: float | None
    kurtosis_tensor: float
    kurtosis_token: float
    kurtosis_channel: float
    six_sigma: SixSigma | None
    six_sigma_later: SixSigma | None
    channel_disparity: float
    token_disparity: float
    percentile_ratio: float
    outlier_channels: tuple[OutlierChannel, ...]
    standout: tuple[int, ...]
    emergent: tuple[int, ...]
    massive: Massive | None
    sqnr: dict[str, float]
    output_error: dict[str, float]
    octaves: tuple[tuple[int, int], ...]
    six_sigma_at: float
    profile: tuple[float, ...]


@dataclass(frozen=True)
class WeightRecord:
    """One weight ``[out, in]``.

    Attributes:
        kurtosis: of all its values. ``six_sigma``: values beyond six deviations.
        row_disparity, column_disparity: largest over median of max |w| per row (output) and per column (input).
        columns: outlier columns by the rule for channels, largest ratio first; ``persistence`` is 1.
    """

    name: str
    block: int
    shape: tuple[int, int]
    max_abs: float
    kurtosis: float
    six_sigma: int
    row_disparity: float
    column_disparity: float
    columns: tuple[OutlierChannel, ...]


@dataclass(frozen=True)
class HeadRecord:
    """One attention head; means over all queries behind the first token.

    Attributes:
        first_mass, delimiter_mass: probability on the first token, and on later full stops, commas and line breaks.
        value_ratio: value norm of the key with the largest probability, over the median of its head.
        entropy: of a row, over the logarithm of its visible keys: 1 is uniform.
        logit_range: largest less smallest logit of a row.
        contribution: ||O_h W_h|| over the norm of the residual stream.
        no_op_score: first and delimiter mass, where ``value_ratio`` is below 0.3, else 0.
        no_op_share: of the queries with 0.9 of their mass there and a contribution among the layer's lowest tenth.
    """

    block: int
    head: int
    first_mass: float
    delimiter_mass: float
    value_ratio: float
    entropy: float
    logit_range: float
    contribution: float
    no_op_score: float
    no_op_share: float


@dataclass(frozen=True)
class Advice:
    """What one rule says.

    Attributes:
        rule: its name. ``alarm``: whether something is wrong; the recipe to try is no alarm.
        channels: that it is about.
        helps, cannot: methods or scheme suffixes, and why.
        recipes: (method, scheme) to try.
    """

    rule: str
    alarm: bool
    finding: str
    channels: tuple[int, ...]
    helps: tuple[str, ...]
    cannot: tuple[str, ...]
    recipes: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Trial:
    """A recipe that was carried out, to see whether the advice helps.

    Attributes:
        advised: or plain rounding, to compare with.
        bits_per_weight, perplexity, divergence: of the result; KL from the float model in nats. None where ``refused``
            says why it cannot be done.
    """

    method: str
    scheme: str
    advised: bool
    bits_per_weight: float | None
    perplexity: float | None
    divergence: float | None
    refused: str | None


@dataclass(frozen=True, repr=False)
class AnalysisRecord(Shown):
    """Everything that an analysis found; ``report.json`` as it is.

    Attributes:
        model: ``name``, ``architecture``, ``dtype``, ``fingerprint``, ``blocks``, ``format`` (None: float).
        calibration: of the text, as in a run record.
        summary: headline numbers, see `summarize`.
        no_heads: why attention was not looked at, None where it was.
        softmax: other softmaxes tried, None where that was not asked for.
        sensitivity: every linear rounded alone, per scheme; ``frontier`` what mixing these schemes is expected to
            reach, (bits per weight, KL).
        trials: advised recipes carried out; ``verdicts`` what came of it, in words.
    """

    model: dict[str, Any]
    calibration: CalibrationFacts
    summary: dict[str, Any]
    sites: tuple[SiteRecord, ...]
    weights: tuple[WeightRecord, ...]
    heads: tuple[HeadRecord, ...]
    no_heads: str | None
    advice: tuple[Advice, ...]
    command: str
    versions: dict[str, str]
    softmax: SoftmaxSweep | None = None
    sensitivity: tuple[SchemeSensitivity, ...] = ()
    frontier: tuple[Point, ...] = ()
    trials: tuple[Trial, ...] = ()
    verdicts: tuple[str, ...] = ()
    schema_version: int = SCHEMA_VERSION

    def facts(self) -> Mapping[str, object]:
        found = self.summary["with_first_token"] or {}
        said = {a.rule: a.finding for a in self.advice}
        tokens = {"largest activation": found.get("max_inf_norm"), "at": found.get("max_inf_norm_at")}
        return {"model": self.model["name"], **tokens, **said}

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), sort_keys=True, allow_nan=False) + "\n"
