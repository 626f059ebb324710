"""``ptq compare``"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def compare(
    runs: Annotated[list[Path], typer.Argument(help="Run folders, report.json files or `ptq eval --json` files.")],
) -> None:
    """Put runs of one evaluation protocol side by side; different protocols are refused."""
    import ptq

    print(ptq.compare(runs).to_markdown())
