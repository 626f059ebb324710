"""Results that print well: a few lines in a terminal, a small table in a notebook, never a dump of all fields."""

from __future__ import annotations

import html
from collections.abc import Mapping


class Shown:
    """A result that shows what `facts` says. Its dataclass is made with ``repr=False``."""

    def facts(self) -> Mapping[str, object]:
        """Label -> value, a handful."""
        raise NotImplementedError

    def __str__(self) -> str:
        facts = self.facts()
        width = max(map(len, facts), default=0)
        return "\n".join([type(self).__name__, *(f"  {label:<{width}}  {value}" for label, value in facts.items())])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><th style='text-align:left'>{html.escape(label)}</th>"
            f"<td style='text-align:left'>{html.escape(str(value))}</td></tr>"
            for label, value in self.facts().items()
        )
        return f"<table><caption>{type(self).__name__}</caption>{rows}</table>"
