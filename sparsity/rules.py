"""`Rule`: a site whose share is still open; and what all methods do with their settings."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from calibration.architectures import ArchitectureSpec
from calibration.errors import Problem, ToolkitError
from calibration.histogram import Histogram
from calibration.walk.passes import Pass
from calibration.walk.segment import Segment
from sparsity.files import REACHED, SHARED, site_tensors
from sparsity.pools import MIN_TOKENS, Pool
from sparsity.sites import Mode, Site
from sparsity.thresholds import channel_thresholds

ANY_LINEAR = "scap or teal, which prune what any linear reads"


@dataclass(frozen=True)
class Rule:
    """How a site prunes any share of its values.

    Attributes:
        linear: block-relative checkpoint name; ``mode`` as in `Site`.
        histogram: of the values, or where there is ``importance`` ``[n]`` of |value| times importance.
        center: what pruned values become.
        shared: the histogram is that of all experts of the layer, because this one saw too few tokens.
    """

    linear: str
    mode: Mode
    histogram: Histogram
    importance: torch.Tensor | None = None
    center: float = 0.0
    shared: bool = False

    def threshold(self, share: float) -> torch.Tensor:
        """float32 ``[1]``, or ``[n]`` where channels differ in importance."""
        pooled = self.histogram.threshold(share, self.center)
        if self.importance is not None:
            return channel_thresholds(pooled, self.importance).cpu()
        return torch.tensor([pooled], dtype=torch.float32)

    def reached(self, share: float) -> float:
        """What is pruned of the pool itself."""
        return self.histogram.share(self.center, self.histogram.threshold(share, self.center))

    def site(self, segment: Segment, share: float) -> Site:
        """The site, with the fold of its center into the bias: ``center * rowsum(W)`` in float64, kept in float32."""
        path = segment.module_path(self.linear)
        if self.center == 0.0:
            return Site(path, self.mode, self.threshold(share))
        rows = segment.weight(self.linear).double().sum(dim=1)
        center = torch.tensor([self.center], dtype=torch.float32)
        return Site(path, self.mode, self.threshold(share), center, (float(center) * rows).float().cpu())


def pool_rule(linear: str, mode: Mode, pool: Pool) -> Rule:
    """The rule that prunes the smallest values of a pool."""
    return Rule(linear, mode, pool.histogram, shared=pool.shared)


def put(segment: Segment, rules: Iterable[Rule], shares: Mapping[str, float]) -> tuple[Site, ...]:
    """Fix the shares (by linear) and leave the sites in the segment; where the share is 0 there is no site."""
    sites = []
    for rule in (rule for rule in rules if shares[rule.linear] > 0.0):
        site = rule.site(segment, shares[rule.linear])
        segment.gates.update(site_tensors([site]))
        segment.gates[site.name + REACHED] = torch.tensor([rule.reached(shares[rule.linear])], dtype=torch.float32)
        if rule.shared:
            segment.gates[site.name + SHARED] = torch.ones(1)
        sites.append(site)
    return tuple(sites)


def parse_targets(text: str) -> tuple[tuple[str, float], ...]:
    """``down_proj=0.6,*=0.35`` to (pattern of the last part of a linear's name, share), of which the first match wins.

    Raises:
        ToolkitError: not of that form.
    """
    pairs = []
    for part in (p.strip() for p in text.split(",") if p.strip()):
        pattern, _, value = part.partition("=")
        try:
            pairs.append((pattern.strip(), float(value)))
        except ValueError:
            raise ToolkitError(f"--target {text}: '{part}' is not NAME=SHARE", "write down_proj=0.6,*=0.35") from None
    return tuple(pairs)


def share_of(linear: str, target: float, targets: str) -> float:
    """The share asked for at a linear: that of the first pattern that fits its last name, else ``target``."""
    leaf = linear.rpartition(".")[2]
    return next((share for pattern, share in parse_targets(targets) if fnmatch.fnmatchcase(leaf, pattern)), target)


def target_problems(target: float, targets: str = "") -> Iterable[Problem]:
    """Shares outside [0, 1)."""
    for where, share in (("target", target), *((f"target {p}", s) for p, s in parse_targets(targets))):
        if not 0.0 <= share < 1.0:
            raise_to = "a share of the values is pruned: use 0.5 for half of them"
            yield Problem(f"{where} {share:g}", "outside [0, 1)", raise_to)


def token_problems(tokens: int) -> Iterable[Problem]:
    if tokens < MIN_TOKENS:
        yield Problem(
            f"{tokens} calibration tokens",
            f"too few for thresholds, which need {MIN_TOKENS} at least",
            "use more --samples or a longer --seq-len",
        )


def gate_problems(name: str, spec: ArchitectureSpec) -> Iterable[Problem]:
    """Families whose feed-forward networks have no gate to prune, or none that is apart from ``up``."""
    networks = [network for index in range(spec.n_blocks) for network in spec.block(index).feed_forward]
    if any(network.gate is None for network in networks):
        reason = f"its feed-forward networks ({networks[0].activation}) have no gate, which '{name}' prunes"
        yield Problem(f"family {spec.family}", reason, f"use --method {ANY_LINEAR}")
    elif any(network.gate == network.up for network in networks):
        reason = f"gate and up are one linear ({networks[0].gate}), whose rows '{name}' cannot skip apart"
        yield Problem(f"family {spec.family}", reason, f"use --method {ANY_LINEAR}")


def settings_of(step: Pass) -> dict[str, Any]:
    """Everything that a method's dataclass holds."""
    return dict(vars(step))
