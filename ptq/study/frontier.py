"""What mixing schemes can be expected to reach: bits per weight against divergence, from a sensitivity study."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Sequence

from ptq.study.sensitivity import SchemeSensitivity

Point = tuple[float, float]
"""Bits per weight and KL from the float model, nats per token."""


def together(scheme: SchemeSensitivity) -> Point:
    """All linears under one scheme; the divergence was measured."""
    weights = sum(x.shape[0] * x.shape[1] for x in scheme.linears)
    bits = sum(x.bits_per_weight * x.shape[0] * x.shape[1] for x in scheme.linears)
    return bits / weights, scheme.additivity * sum(x.divergence for x in scheme.linears)


def frontier(schemes: Sequence[SchemeSensitivity]) -> tuple[Point, ...]:
    """The lower convex edge of all ways to give every linear one of the schemes, fewest bits first.

    The expected divergence of a linear alone is taken times its scheme's additivity, and sums are taken to hold. Every
    step on the edge gives one linear the bits that save most nats each, so it ends in the best scheme for all.
    """
    options: dict[str, dict[float, float]] = defaultdict(dict)
    weights = {}
    for scheme in schemes:
        for x in scheme.linears:
            weights[x.name] = x.shape[0] * x.shape[1]
            options[x.name][x.bits_per_weight * weights[x.name]] = scheme.additivity * x.divergence
    edges = [_edge(sorted(found.items())) for found in options.values()]
    bits, loss, total = sum(e[0][0] for e in edges), sum(e[0][1] for e in edges), sum(weights.values())
    points = [(bits / total, loss)]
    steps = [(b[0] - a[0], b[1] - a[1]) for edge in edges for a, b in itertools.pairwise(edge)]
    for more, change in sorted(steps, key=lambda step: step[1] / step[0]):
        bits, loss = bits + more, loss + change
        points.append((bits / total, loss))
    return tuple(points)


def _edge(points: Sequence[Point]) -> list[Point]:
    """The lower convex edge of points in order of their first coordinate, as far as it falls."""
    edge: list[Point] = []
    for x, y in points:
        if edge and y >= edge[-1][1]:
            continue
        while len(edge) > 1 and _slope(edge[-2], (x, y)) <= _slope(edge[-2], edge[-1]):
            edge.pop()
        edge.append((x, y))
    return edge


def _slope(a: Point, b: Point) -> float:
    return (b[1] - a[1]) / (b[0] - a[0])
