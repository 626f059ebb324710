"""How a text is cut into windows, and which tokens of a window are scored, under each perplexity protocol."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from calibration.errors import ToolkitError, unknown_value

PROTOCOLS = ("gptq", "hf-stride", "llama.cpp", "decode")

HALVES = ("llama.cpp", "decode")
"""Protocols that score the second half of a window."""


@dataclass(frozen=True)
class Scoring:
    """What to score and how.

    Attributes:
        protocol: one of `PROTOCOLS`.
        window: tokens a window.
        stride: tokens from one window to the next; None: the protocol's own (half a window for ``hf-stride``, the
            window for the others, which take no other value).
        batch_size: windows per forward pass; changes speed and memory, not the result.
        max_windows: score only that many windows' worth of tokens from the start; the smaller of this and the data
            set's own limit holds.
        dtype: of the forward pass, for the record.

    Raises:
        ToolkitError: unknown protocol, bad window or stride.
    """

    protocol: str = "gptq"
    window: int = 2048
    stride: int | None = None
    batch_size: int = 1
    max_windows: int | None = None
    dtype: str = "float32"

    def __post_init__(self) -> None:
        assert self.batch_size > 0 and (self.max_windows is None or self.max_windows > 0), self
        if self.protocol not in PROTOCOLS:
            raise unknown_value("--protocol", self.protocol, PROTOCOLS)
        shortest = 3 if self.protocol in HALVES else 2
        if self.window < shortest:
            raise ToolkitError(
                f"window {self.window}: under '{self.protocol}' it has no token to score",
                f"use a --seq-len of at least {shortest}",
            )
        if self.stride is None:
            return
        if self.protocol != "hf-stride" and self.stride != self.window:
            raise ToolkitError(
                f"--stride {self.stride}: windows of '{self.protocol}' do not overlap",
                "leave --stride out, or use --protocol hf-stride",
            )
        if not 1 <= self.stride <= self.window:
            raise ToolkitError(
                f"--stride {self.stride}: outside 1 .. {self.window} (the window)", f"use {self.window // 2}"
            )

    @property
    def step(self) -> int:
        """The stride in force."""
        if self.stride is not None:
            return self.stride
        return self.window // 2 if self.protocol == "hf-stride" else self.window


@dataclass(frozen=True)
class Window:
    """Tokens ``[start, stop)`` of a text; targets from index ``first`` of the window on are scored."""

    start: int
    stop: int
    first: int

    @property
    def length(self) -> int:
        return self.stop - self.start


def cut_windows(scoring: Scoring, n: int) -> list[Window]:
    """The windows of a text of ``n`` tokens. A window's first token is never a target: nothing predicts it.

    ``gptq``, ``llama.cpp`` and ``decode`` drop the tail, ``hf-stride`` scores it.
    """
    window = scoring.window
    if scoring.protocol == "hf-stride":
        windows, scored = [], 0
        for start in range(0, n, scoring.step):
            stop = min(start + window, n)
            windows.append(Window(start, stop, max(1, scored - start)))
            scored = stop
            if stop == n:
                break
        return [w for w in windows if w.first < w.length]
    # llama.cpp predicts tokens n_ctx/2 + 1 .. n_ctx - 1 of a chunk: 255 of 512.
    first = window // 2 + 1 if scoring.protocol in HALVES else 1
    return [Window(i * window, (i + 1) * window, first) for i in range(n // window)]


def batches(windows: Sequence[Window], batch_size: int) -> Iterator[list[Window]]:
    """At most ``batch_size`` consecutive windows of one length: hf-stride's last window is shorter and goes
    alone, without padding."""
    assert batch_size > 0, batch_size
    batch: list[Window] = []
    for w in windows:
        if batch and (len(batch) == batch_size or batch[0].length != w.length):
            yield batch
            batch = []
        batch.append(w)
    yield batch
