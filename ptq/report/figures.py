"""Numbers as text, the same digits in every view. ``None`` is a dash: it was not measured."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable

DASH = "–"
MINUS = "−"

Number = int | float | None
Cell = tuple[str, float | str]
"""What stands in a cell of a table, and what its column is sorted by."""

_MARKUP = str.maketrans({"<": "&lt;", ">": "&gt;", "&": "&amp;"} | {char: f"\\{char}" for char in "\\`*[]|"})
_EMPHASIS = re.compile(r"(?<!\w)_|_(?!\w)")  # between letters an underscore is only itself


def size(n_bytes: Number) -> str:
    """Bytes in the units of a file listing: 1 GB is 1e9 bytes, MB below 0.1 GB, kB below 0.1 MB."""
    if n_bytes is None:
        return DASH
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n_bytes >= 0.1 * factor:
            value = n_bytes / factor
            return f"{value:.1f} {unit}" if value >= 100 else f"{value:.2f} {unit}"
    return f"{n_bytes:.0f} bytes"


def count(n: Number) -> str:
    """``1,234,567``"""
    return DASH if n is None else f"{n:,.0f}"


def large_count(n: Number) -> str:
    """``8.03 billion``; exact below a million."""
    if n is None:
        return DASH
    for word, factor in (("billion", 1e9), ("million", 1e6)):
        if n >= factor:
            return f"{n / factor:.3g} {word}" if n < 1000 * factor else f"{n / factor:,.0f} {word}"
    return f"{n:,.0f}"


def bits(value: Number) -> str:
    """Bits per weight: thousandths, because a 16-bit scale per 128 weights is 0.125."""
    return DASH if value is None else f"{value:.3f}"


def perplexity(value: Number) -> str:
    """Three decimals where they can mean something, fewer where the model is broken anyway."""
    if value is None:
        return DASH
    if math.isnan(value):
        return "not a number"
    if math.isinf(value):
        return "∞"
    if value >= 1e6:
        return f"{value:.2e}"
    return f"{value:.3f}" if value < 100 else f"{value:.2f}" if value < 1000 else f"{value:,.0f}"


def signed(value: Number, digits: int = 3) -> str:
    """With its sign, so that a difference cannot be taken for a value."""
    if value is None or not math.isfinite(value):
        return DASH
    text = f"{abs(value):,.0f}" if abs(value) >= 1000 else f"{abs(value):.{digits}f}"
    return f"{MINUS if value < 0 else '+'}{text}"


def error(value: Number) -> str:
    """Relative errors span decades, so all of them are written with an exponent: ``1.23e-3``."""
    if value is None:
        return DASH
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else "∞" if math.isinf(value) else "not a number"
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def short(value: Number) -> str:
    """Three significant digits; all of a large number's."""
    if value is None:
        return DASH
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def key(value: float | None) -> float:
    """To sort by; what was not measured comes last."""
    return -1.0 if value is None or value != value else value


def percent(fraction: Number) -> str:
    return DASH if fraction is None else f"{100 * fraction:.2f} %"


def nats(value: Number) -> str:
    """A divergence: four decimals, or an exponent where they would all be zero."""
    if value is None:
        return DASH
    return f"{value:.4f}" if abs(value) >= 0.001 or value == 0 else error(value)


def shrinkage(before: Number, after: Number) -> str:
    """``2.80× smaller``; packing can also make a tiny model larger, and then that is said. Empty where unknown."""
    if not before or not after:
        return ""
    return f"{before / after:.2f}× smaller" if before >= after else f"{after / before:.2f}× larger"


def difference(value: Number, baseline: Number) -> float | None:
    """``value - baseline`` where both are known and finite."""
    if value is None or baseline is None or not (math.isfinite(value) and math.isfinite(baseline)):
        return None
    return value - baseline


def plain(text: object) -> str:
    """One line of Markdown that says ``text`` and nothing else: no markup, no HTML, no table cell of its own."""
    line = " ".join(str(text).split())
    return _EMPHASIS.sub(r"\\_", line.translate(_MARKUP))


def code(text: object, cell: bool = True) -> str:
    """A Markdown code span that holds ``text`` whatever backticks are in it; in a table ``cell`` pipes too."""
    line = " ".join(str(text).split())
    line = line.replace("|", "\\|") if cell else line
    fence = "`" * (_longest_run(line, "`") + 1)
    pad = " " if line.startswith("`") or line.endswith("`") or not line else ""
    return f"{fence}{pad}{line}{pad}{fence}"


def block(text: str, language: str = "") -> str:
    """A fenced code block that ``text`` cannot close."""
    fence = "`" * max(3, _longest_run(text, "`") + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def table(header: Iterable[str], rows: Iterable[Iterable[str]], right: Iterable[int] = ()) -> str:
    """A Markdown table of cells that are Markdown already; ``right`` are the columns of numbers."""
    columns, numeric = list(header), set(right)
    rule = ["---:" if i in numeric else "---" for i in range(len(columns))]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [columns, rule, *map(list, rows)])


def _longest_run(text: str, char: str) -> int:
    longest = here = 0
    for c in text:
        here = here + 1 if c == char else 0
        longest = max(longest, here)
    return longest
