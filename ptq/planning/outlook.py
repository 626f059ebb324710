"""`Outlook`: what a command other than `quantize` would take, and the pieces of which such plans are made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from calibration.distributed import idle_words
from calibration.launcher import launched
from calibration.model.classes import text_config
from calibration.model.headers import TensorInfo
from calibration.shown import Shown
from calibration.walk.cost import BlockShape, Work, total
from calibration.walk.passes import Pass, forwards_per_block
from ptq.devices import evaluation_dtype
from ptq.linears import PlannedLinear
from ptq.planning.block_time import block_shapes, walking
from ptq.planning.duration import START, Duration, front, preparing
from ptq.planning.memory import text_bytes_held
from ptq.planning.peak import Calibration, walk_bytes
from ptq.planning.rates import rates_of
from ptq.planning.source import BATCH_TOKENS, Source


@dataclass(frozen=True, repr=False)
class Outlook(Shown):
    """A command that passed its plan; nothing was read but headers and short texts, and nothing was written.

    Attributes:
        command: with what it is about: ``sparsify teal``.
        model: its name and kind.
        text: the calibration text in words.
        peak_bytes: of memory, above interpreter and libraries.
        disk_bytes: that are written.
        remarks: what is not counted, and what a user may not expect.
    """

    command: str
    model: str
    text: str
    peak_bytes: int
    disk_bytes: int
    duration: Duration
    remarks: tuple[str, ...] = ()

    def facts(self) -> Mapping[str, object]:
        return {
            "command": self.command,
            "model": self.model,
            "calibration": self.text,
            "memory": f"about {self.peak_bytes / 1e9:.2f} GB above interpreter and libraries",
            "disk": f"{self.disk_bytes / 1e9:.3f} GB",
            "time": f"about {self.duration.total:.0f} s",
        }

    def to_json(self) -> dict[str, Any]:
        """The numbers, for ``--json``."""
        named = {"command": self.command, "model": self.model, "calibration": self.text}
        sizes = {"peak_bytes": self.peak_bytes, "disk_bytes": self.disk_bytes, "remarks": list(self.remarks)}
        return {**named, **sizes, **self.duration.to_json()}


def outlook(
    command: str,
    source: Source,
    seconds: Mapping[str, float],
    peak: int,
    disk: int,
    remarks: Sequence[str] = (),
    *,
    infos: Mapping[str, TensorInfo],
    batches: int | None = None,
) -> Outlook:
    """An outlook whose phases begin with those that all commands have: the text, the class of the model, embedding.

    Args:
        seconds, peak: of what is the command's own.
        infos: headers of the float tensors.
        batches: that processes share; None: those of the text.
    """
    rates = rates_of(source.device, source.dtype)
    before, unknown = preparing(source, rates)
    before["embed"] = START + rates.seconds(front(source, infos))
    o = source.options
    kind = f"{source.name}: {source.spec.family}, {source.spec.n_blocks} blocks"
    text = f"{o.samples} x {source.seq_len} tokens of {source.dataset}"
    duration = Duration({**before, **seconds}, launched()[1], tuple(unknown))
    idle = idle_words(duration.processes, batches or -(-o.samples // source.batch_size))
    remarks = (*remarks, idle) if idle else remarks
    peak = max(peak, text_bytes_held(source, (source.dataset,)))
    return Outlook(command, kind, text, peak, disk, duration, (*remarks, *source.notes))


def walk_outlook(
    source: Source, passes: Sequence[Pass], linears: Sequence[PlannedLinear], infos: Mapping[str, TensorInfo]
) -> tuple[float, int]:
    """Seconds and bytes of a walk over the blocks that rounds nothing."""
    shapes = block_shapes(source, linears, False)
    seconds = sum(walking(source, passes, shapes, rates_of(source.device, source.dtype), launched()[1], 0.0))
    return seconds, walk_bytes(infos, source.spec, linears, passes, calibration_of(source, passes), hidden_of(source))


def calibration_of(source: Source, passes: Sequence[Pass]) -> Calibration:
    """The text as the plan of memory counts it."""
    tokens = source.options.samples * source.seq_len
    batch = source.batch_size * source.seq_len
    vocabulary = int(text_config(source.config).vocab_size)
    forwards = max(1, forwards_per_block(passes))
    return Calibration(tokens, batch, source.seq_len, source.dtype.itemsize, forwards, vocabulary)


def hidden_of(source: Source) -> int:
    """Width of the hidden states."""
    return int(text_config(source.config).hidden_size)


def scoring(source: Source, linears: Sequence[PlannedLinear], tokens: int, infos: Mapping[str, TensorInfo]) -> Work:
    """One pass of the whole model over a text, with the losses of its logits, in the dtype of evaluations."""
    shapes: list[BlockShape] = block_shapes(source, linears, False)
    share = tokens / (source.options.samples * source.seq_len)
    vocabulary = int(text_config(source.config).vocab_size)
    forward = total(block.forward for block in shapes) * share
    head = Work(products=2.0 * tokens * vocabulary * hidden_of(source), fresh=3.0 * tokens * vocabulary)
    return forward + head


def whole_model_bytes(source: Source, infos: Mapping[str, TensorInfo], dtype: torch.dtype | None = None) -> int:
    """A model in memory that scores a batch: its weights, and logits in their dtype and in float32 with their
    log-probabilities."""
    itemsize = (dtype or evaluation_dtype("auto", source.device)).itemsize
    batch = max(1, BATCH_TOKENS // source.seq_len) * source.seq_len
    logits = batch * int(text_config(source.config).vocab_size)
    return itemsize * sum(info.numel for info in infos.values()) + (itemsize + 8) * logits
