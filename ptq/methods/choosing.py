"""Passes that change schemes: what the plan asks them before a run, so that no format meets a scheme it cannot hold."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from ptq.scheme import QuantScheme


@runtime_checkable
class ChoosesSchemes(Protocol):
    """A pass of phase CHOOSE that replaces entries of ``segment.schemes``."""

    def alternatives(self, scheme: QuantScheme, shape: tuple[int, int]) -> Sequence[QuantScheme]:
        """Every scheme that the pass may give to a linear ``W [out, in]`` planned with this one."""
