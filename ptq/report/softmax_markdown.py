"""The section of report.md on other softmaxes."""

from __future__ import annotations

from ptq.analysis.softmax_record import SoftmaxRow, SoftmaxSweep
from ptq.report import figures
from ptq.report.figures import Cell, code, plain, table

HEADER = (
    "Softmax",
    "Perplexity",
    "KL, nats",
    "Exact zeros",
    "Row sum",
    "Empty rows",
    "Max infinity norm",
    "Avg kurtosis",
    "Max kurtosis",
    "Perplexity, 8 bits",
)
SHOWN_HEADS = 12


def cells(row: SoftmaxRow) -> list[Cell]:
    """One row under `HEADER`; outlier metrics with first tokens."""
    norms = [row.with_first_token.get(key) for key in ("max_inf_norm", "avg_kurtosis", "max_kurtosis")]
    return [
        (row.softmax, row.softmax),
        (figures.perplexity(row.perplexity), row.perplexity),
        (figures.nats(row.divergence), row.divergence),
        (figures.percent(row.zeros), row.zeros),
        (f"{row.row_sum:.3f}", row.row_sum),
        (figures.percent(row.empty_rows), row.empty_rows),
        *((figures.short(value), figures.key(value)) for value in norms),
        (figures.perplexity(row.perplexity_8_bit), figures.key(row.perplexity_8_bit)),
    ]


def about(sweep: SoftmaxSweep) -> str:
    """How the numbers were made."""
    return (
        f"{sweep.windows} windows of {sweep.window} tokens of the text above. 8 bits: {sweep.scheme} in all linears of "
        f"the blocks, static ranges from {sweep.range_windows} other windows. Empty rows: all probabilities are 0."
    )


def clipped_heads(sweep: SoftmaxSweep) -> str:
    """How many heads can be clipped how far."""
    if not sweep.heads:
        return "Single heads were left out."
    steps = sorted({h.gamma for h in sweep.heads}, reverse=True)
    counts = ", ".join(f"{gamma:g}: {sum(h.gamma == gamma for h in sweep.heads)}" for gamma in steps)
    return (
        f"Largest gamma that costs a head less than {sweep.limit:.1%} of the loss ({sweep.head_windows} windows), by "
        f"number of heads: {counts}. These are the heads to clip or gate in pre-training."
    )


def render(sweep: SoftmaxSweep) -> str:
    """Markdown, from its heading on."""
    rows = [[code(row.softmax), *(text for text, _ in cells(row)[1:])] for row in sweep.rows]
    parts = [
        "## Other softmaxes in this model",
        plain(sweep.finding),
        table(HEADER, rows, right=range(1, len(HEADER))),
        plain(about(sweep)),
        plain(clipped_heads(sweep)),
    ]
    shut = sorted((h for h in sweep.heads if h.shut_cost is not None), key=lambda h: h.shut_cost or 0.0)
    if shut:
        listed = [(str(h.block), str(h.head), f"{h.shut_cost:+.3%}", f"{h.gamma:g}") for h in shut[:SHOWN_HEADS]]
        header = ["Block", "Head", "Loss with its output 0", "Largest gamma"]
        parts += ["Heads that are missed least:", table(header, listed, right=range(4))]
    return "\n\n".join(parts)
