"""The saved form of thresholds, beside the weights: ``sparsity.safetensors`` and ``sparsity.json``.

The tensors are called ``<linear>.<mode>.threshold``, ``.center`` and ``.shift``; the JSON file says what was asked for,
which sites there are, and which weights they belong to.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NotRequired, TypedDict, cast

import torch
from safetensors.torch import load_file

from calibration.errors import ToolkitError, foreign
from calibration.model.checkpoint import CheckpointReader, save_tensors, write_atomically
from calibration.model.opening import weights_fingerprint
from calibration.model.reading import read_json
from calibration.model.typed import Finite, built
from calibration.recorded import CalibrationFacts
from calibration.shown import Shown
from sparsity.sites import MODES, Mode, Site

TENSORS_FILE = "sparsity.safetensors"
SETTINGS_FILE = "sparsity.json"
SCHEMA_VERSION = 1
REACHED, SHARED = ".reached", ".shared"
"""Beside the parts of a site in ``segment.gates``, for `Sparsity`: float32 ``[1]`` each."""

AGAIN = "run `ptq sparsify` on this checkpoint again"


@dataclass(frozen=True, repr=False)
class Sparsity(Shown):
    """What makes a checkpoint sparse.

    Attributes:
        method: ``cats``, ``chess``, ...; with ``+`` where several added sites.
        target: what was asked for, in [0, 1).
        base: `calibration.model.opening.weights_fingerprint` of the weights that the thresholds were made for.
        sites: in execution order.
        settings: of the method, everything that decides the thresholds.
        calibration: of the text, as in a run record.
        reached: site name -> share of values pruned on the calibration text; more than was asked for where values
            tie, as the zeros of ReLU do.
        shared: names of sites of experts that saw too few tokens, and took the pool of all experts of their layer.
        model: ``name`` and ``source`` (``hub``, ``folder``, ``demo``) of what was made sparse, where it is known.
    """

    method: str
    target: float
    base: str
    sites: tuple[Site, ...]
    settings: dict[str, Any] = field(default_factory=dict)
    calibration: dict[str, Any] = field(default_factory=dict)
    reached: dict[str, float] = field(default_factory=dict)
    shared: tuple[str, ...] = ()
    model: dict[str, str] = field(default_factory=dict)

    def facts(self) -> Mapping[str, object]:
        found = self.settings.get("search")
        mean = sum(self.reached.values()) / len(self.reached) if self.reached else None
        return {
            "method": self.method,
            "target": f"{self.target:.4g}",
            "sites": len(self.sites),
            **({} if mean is None else {"reached": f"{mean:.2%} of values, the mean over sites"}),
            **({} if found is None else {"perplexity": f"{found['perplexity_increase']:+.2%} on the search text"}),
        }


class _SiteEntry(TypedDict):
    linear: str
    mode: str
    reached: Finite | None
    shared: bool


class _Search(TypedDict):
    perplexity_increase: Finite


class _Settings(TypedDict):
    search: NotRequired[_Search]


class _File(TypedDict):
    """`SETTINGS_FILE`, as `save_sparsity` writes it; settings of the methods stay as they are."""

    method: str
    target: Finite
    base: str
    settings: _Settings
    calibration: CalibrationFacts
    model: NotRequired[dict[str, str]]
    sites: list[_SiteEntry]


def site_tensors(sites: Iterable[Site]) -> dict[str, torch.Tensor]:
    """``<linear>.<mode>.<part>`` -> tensor, see `Site`."""
    tensors = {}
    for site in sites:
        parts = {"threshold": site.threshold, "center": site.center, "shift": site.shift}
        tensors.update({f"{site.name}.{part}": t for part, t in parts.items() if t is not None})
    return tensors


def sites_from(tensors: Mapping[str, torch.Tensor]) -> tuple[Site, ...]:
    """The inverse of `site_tensors`, in the order of the thresholds; what `REACHED` and `SHARED` name is left out.

    Raises:
        ToolkitError: a name that is none of ours; thresholds that are negative or not finite; parts that do not fit.
    """
    tensors = {name: t for name, t in tensors.items() if not name.endswith((REACHED, SHARED))}
    sites = []
    known = set()
    for key in (k for k in tensors if k.endswith(".threshold")):
        name = key.removesuffix(".threshold")
        linear, _, mode = name.rpartition(".")
        site = Site(linear, cast(Mode, mode), tensors[key], tensors.get(f"{name}.center"), tensors.get(f"{name}.shift"))
        problem = _problem(site)
        if problem:
            raise ToolkitError(f"{key}: {problem}", AGAIN)
        sites.append(site)
        known |= set(site_tensors([site]))
    if known != set(tensors):
        raise ToolkitError(f"{min(set(tensors) - known)}: belongs to no site of {TENSORS_FILE}", AGAIN)
    return tuple(sites)


def _problem(site: Site) -> str | None:
    if site.mode not in MODES:
        return f"unknown mode '{site.mode}'"
    parts = [t for t in (site.threshold, site.center, site.shift) if t is not None]
    if any(t.dtype != torch.float32 or t.ndim != 1 or not t.numel() for t in parts):
        return "thresholds, centers and shifts are float32 vectors"
    if not all(bool(torch.isfinite(t).all()) for t in parts) or bool((site.threshold < 0).any()):
        return "negative or not finite"
    if (site.center is None) != (site.shift is None) or (site.center is not None and site.mode == "output"):
        return "a center and its shift come together, and only where an input is pruned"
    if site.center is not None and 1 not in (n := {len(site.center), len(site.threshold)}) and len(n) > 1:
        return f"{len(site.threshold)} thresholds, {len(site.center)} centers"
    return None


def save_sparsity(sparsity: Sparsity, folder: Path) -> None:
    """Write both files into the folder of the weights; the JSON file, which makes it sparse, comes last."""
    save_tensors(folder / TENSORS_FILE, site_tensors(sparsity.sites))
    data = {
        "schema_version": SCHEMA_VERSION,
        "method": sparsity.method,
        "target": sparsity.target,
        "base": sparsity.base,
        "settings": sparsity.settings,
        "calibration": sparsity.calibration,
        "model": sparsity.model,
        "sites": [
            {
                "linear": s.linear,
                "mode": s.mode,
                "reached": sparsity.reached.get(s.name),
                "shared": s.name in sparsity.shared,
            }
            for s in sparsity.sites
        ],
    }
    write_atomically(folder / SETTINGS_FILE, (json.dumps(data, indent=1, sort_keys=True) + "\n").encode())


def load_sparsity(folder: Path) -> Sparsity | None:
    """What makes the checkpoint in ``folder`` sparse, or None where it is not.

    Raises:
        ToolkitError: the files are damaged, of a newer version, or were made for other weights.
    """
    path = folder / SETTINGS_FILE
    if not path.exists():
        return None
    data = read_json(path, AGAIN)
    version = data.get("schema_version")
    if version != SCHEMA_VERSION:
        raise ToolkitError(
            f"{path}: schema version {version}, this version reads {SCHEMA_VERSION}", "use the ptq that wrote it"
        )
    with foreign(f"{path}: damaged", AGAIN):
        read = built(_File, data)
    with CheckpointReader(folder) as reader:
        found = weights_fingerprint(reader)
    if found != read["base"]:
        raise ToolkitError(
            f"{path}: thresholds for the weights {read['base']}, those in the folder are {found}",
            f"{AGAIN}, or remove {SETTINGS_FILE} and {TENSORS_FILE} to run it dense",
        )
    sites = {site.name: site for site in sites_from(_tensors(folder / TENSORS_FILE))}
    listed = {f"{entry['linear']}.{entry['mode']}": entry for entry in read["sites"]}
    if set(sites) != set(listed):
        raise ToolkitError(f"{folder}: {SETTINGS_FILE} and {TENSORS_FILE} name different sites", AGAIN)
    return Sparsity(
        method=read["method"],
        target=read["target"],
        base=read["base"],
        sites=tuple(sites[name] for name in listed),
        settings={**read["settings"]},
        calibration={**read["calibration"]},
        reached={name: entry["reached"] for name, entry in listed.items() if entry["reached"] is not None},
        shared=tuple(name for name, entry in listed.items() if entry["shared"]),
        model=read.get("model", {}),
    )


def made_of(folder: Path) -> dict[str, str]:
    """`Sparsity.model` of a sparse checkpoint, without a look at its weights; empty where it is not known."""
    try:
        return built(dict[str, str], read_json(folder / SETTINGS_FILE).get("model", {}))
    except (ToolkitError, TypeError):
        return {}  # no sparse checkpoint, or a damaged file, which `load_sparsity` refuses


def _tensors(path: Path) -> dict[str, torch.Tensor]:
    if not path.exists():
        raise ToolkitError(f"{path}: no such file, though {SETTINGS_FILE} is there", AGAIN)
    with CheckpointReader.of_file(path):  # checks the header against the size of the file
        return load_file(path)
