"""What other programs did with files of ours, as `benchmarks/readers.py` has seen it and wrote it to readers.json."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from ptq.linears import ModelLayout

_GROUP = re.compile(r"-g\d+")


@cache
def seen() -> dict[str, Any]:
    """readers.json: ``readers`` (name -> version, date), and one entry of ``runs`` for every reader and file."""
    document: dict[str, Any] = json.loads((Path(__file__).parent / "readers.json").read_text(encoding="utf-8"))
    return document


def schemes_of(layout: ModelLayout) -> list[str]:
    """The schemes of a model's linears, each once, in order."""
    return sorted({str(linear.scheme) for linear in layout.quantized})


def quote(reader: str, format_name: str, layout: ModelLayout) -> str | None:
    """What was seen of files like this one: ``yes (run in ...)``, ``no: refused by ...``, ``no: read wrongly (by
    ...)``, ``not known: no kernel in ...``.

    A file is like another if the format is the same, all schemes were run (in some group size, which is then named),
    and, where linears stay in float, a file with such linears was run.

    Returns:
        None where no such file was run.
    """
    runs = [run for run in seen()["runs"] if run["reader"] == reader and run["format"] == format_name]
    found = [_like(scheme, [run for run in runs if not run["left"]]) for scheme in schemes_of(layout)]
    if layout.left:
        found.append(next((run for run in runs if run["left"]), None))
    known = [run for run in found if run is not None]
    worst = [run for answer in ("wrong", "refused", "no kernel") for run in known if run["answer"] == answer]
    if not worst and (not known or len(known) < len(found)):
        return None
    version = seen()["readers"][reader]
    return sentence(worst[0] if worst else max(known, key=lambda r: r["difference"]), reader, version, layout)


def sentence(run: Mapping[str, Any], reader: str, version: Mapping[str, str], layout: ModelLayout | None = None) -> str:
    """One run in words, with version and date."""
    where = f"{reader} {version['version']} on a {version['machine']}, {version['date']}"
    exact = layout is None or run["left"] or run["scheme"] in schemes_of(layout)
    as_what = "" if exact else f", as {run['scheme']}"
    if run["left"]:
        as_what = f", with {run['left']} in float"
    if run["answer"] == "refused":
        return f"no: refused by {where}{as_what}: {run['why'].partition(': ')[2][:120]}"
    if run["answer"] == "no kernel":
        return f"not known: no kernel in {where}{as_what}; not run: needs a GPU"
    numbers = f"{run['difference']:.2g} nats per token from ours, quantization moves {run['moved']:.2g}"
    verb = "yes (run in" if run["answer"] == "run" else "no: read wrongly (by"
    return f"{verb} {where}{as_what}: {numbers})"


def _like(scheme: str, runs: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The run of this scheme, else of one that differs in the group size alone."""
    exact = next((run for run in runs if run["scheme"] == scheme), None)
    kind = _GROUP.sub("", scheme)
    sized = bool(_GROUP.search(scheme))
    other = (run for run in runs if sized and _GROUP.search(run["scheme"]) and _GROUP.sub("", run["scheme"]) == kind)
    return exact or next(other, None)
