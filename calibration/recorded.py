"""What a run record holds beside its dataclasses: dictionaries, key by key. A file is checked against them when it
is read, so that reports, comparisons and cards may rely on every type. Keys that are not here stay: a newer version
has more."""

from __future__ import annotations

from typing import Any, NotRequired, TypedDict

from calibration.model.typed import Count, Finite


class ModelFacts(TypedDict):
    """The float model: ``fingerprint`` of config and headers, ``bytes`` of all tensors, ``source`` (``hub``,
    ``folder``, ``demo``)."""

    name: str
    architecture: str
    parameters: Count
    dtype: str
    fingerprint: str
    bytes: Count
    source: NotRequired[str]


class RuleFacts(TypedDict):
    """A pattern of full linear names and the scheme of those it matches, or ``float``."""

    match: str
    scheme: str


class RecipeFacts(TypedDict):
    """The resolved recipe: ``method`` such as ``awq+gptq``; of every pass its ``name`` and all its settings."""

    method: str
    passes: list[dict[str, Any]]
    schemes: list[RuleFacts]
    command: NotRequired[str]


class CalibrationFacts(TypedDict, total=False):
    """Calibration text: ``samples`` of ``seq_len`` tokens, how rows became one text (``join``), BOS in front of every
    window (``bos``), ``fingerprint`` of the token ids. Empty where a run needs no data; windows that were tokenized
    before, drawn at random or written by the model have fewer keys."""

    dataset: str
    split: str
    revision: str
    builder: str
    samples: Count
    samples_asked: Count
    seq_len: Count
    seed: int
    join: str
    special_tokens: bool
    bos: bool
    tokens: Count
    fingerprint: str


class ResultFacts(TypedDict):
    """What was written: ``bytes`` of all tensors, of which ``quantized_bytes`` linears; ``forward_passes`` over the
    calibration data per block; ``loads_in``: program -> "yes" or the reason why not; ``verified``: linears read back
    and compared; ``outside``: tensors outside the blocks and their schemes."""

    format: str
    format_reason: str
    bytes: Count
    quantized_bytes: Count
    bits_per_weight: Finite
    quantized_linears: Count
    quantized_weights: Count
    forward_passes: Count
    loads_in: dict[str, str]
    verified: Count
    outside: NotRequired[dict[str, str]]


class LeftFacts(TypedDict):
    """What stayed in float, why, and how many there are."""

    what: str
    why: str
    count: Count
