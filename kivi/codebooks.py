"""Codebooks: levels that stand for a distribution with the least squared error."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

ROUNDS = 200
BINS = 4096


def k_means(
    points: Sequence[float], weights: Sequence[float], start: Sequence[float]
) -> tuple[float, ...]:
    """The 1-D k-means of weighted points, both ascending, from the means `start`."""
    found = list(start)
    for _ in range(ROUNDS):
        sums = [[0.0, 1e-30] for _ in found]
        edges = [(a + b) / 2 for a, b in pairwise(found)]
        place = 0
        for x, w in zip(points, weights, strict=True):
            while place < len(edges) and x > edges[place]:
                place += 1
            sums[place][0] += w * x
            sums[place][1] += w
        # A mean to which no point is nearest stays.
        found = [a / b if b > 1e-30 else old for (a, b), old in zip(sums, found, strict=True)]
    return tuple(found)


def levels(places: Tensor, weights: Tensor, count: int) -> tuple[float, ...]:
    """The weighted k-means of numbers between 0 and 1, found on a histogram of them."""
    place = (places.flatten() * BINS).long().clamp(0, BINS - 1)
    mass = torch.bincount(place, weights.flatten().double(), BINS).tolist()
    points = [(i + 0.5) / BINS for i in range(BINS)]
    return k_means(points, mass, [(i + 0.5) / count for i in range(count)])
