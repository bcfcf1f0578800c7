"""Confidence intervals: Wilson for shares, block bootstrap for statistics of token series."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

LEVEL = 0.95
"""Confidence level of every interval here."""
Z = 1.959963984540054


class Interval(NamedTuple):
    """An estimate with the bounds of its 95 % confidence interval."""

    estimate: float
    low: float
    high: float

    def exp(self) -> Interval:
        """The interval of the exponential, which keeps order and so keeps coverage."""
        return Interval(*map(math.exp, self))


def wilson(successes: int, trials: int) -> Interval:
    """Share of successes with its Wilson score interval, honest at 0 and at 1 as well.

    Raises:
        ValueError: without trials, or for more successes than trials.
    """
    if trials < 1 or not 0 <= successes <= trials:
        raise ValueError(
            f"successes={successes}, trials={trials}: need 0 <= successes <= trials >= 1"
        )
    share, z2 = successes / trials, Z * Z / trials
    centre = (share + z2 / 2) / (1 + z2)
    half = Z / (1 + z2) * math.sqrt(share * (1 - share) / trials + z2 / (4 * trials))
    low = 0.0 if successes == 0 else centre - half  # exactly, not up to rounding
    high = 1.0 if successes == trials else centre + half
    return Interval(share, low, high)


def mean(values: Tensor) -> Tensor:
    """Mean over the last dimension, as a bootstrap statistic."""
    return values.mean(-1)


def p999(values: Tensor) -> Tensor:
    """99.9th percentile over the last dimension, as a bootstrap statistic."""
    at = 0.999 * (values.shape[-1] - 1)
    below = math.floor(at)
    # Only the largest are needed in order; sorting everything costs ten times as much.
    largest = values.topk(values.shape[-1] - below).values
    low, high = largest[..., -1], largest[..., -2 if at > below else -1]
    return low + (high - low) * (at - below)


def block_bootstrap(
    values: Tensor,
    statistic: Callable[[Tensor], Tensor] = mean,
    *,
    seed: int = 0,
    block: int = 64,
    resamples: int = 1000,
) -> Interval:
    """A statistic of token values with its percentile interval.

    Neighbouring tokens are not independent, so whole blocks of them are drawn with replacement.

    Args:
        values: `[S, N]`, N consecutive tokens of each of S sequences.
        statistic: maps `[..., M]` to `[...]`.
        seed: of the resampling; the same blocks are drawn for every scheme.
        block: tokens in a block; the tokens past the last whole block of a sequence count for
            the estimate and are left out of the resampling.
        resamples: how many.

    Raises:
        ValueError: for values that are not `[S, N]` with at least one element.
    """
    if values.ndim != 2 or values.numel() == 0:
        raise ValueError(f"values has shape {tuple(values.shape)}; it must be [S, N], not empty")
    values = values.detach().to("cpu", torch.float64)
    estimate = statistic(values.flatten()).item()
    block = min(block, values.shape[1])
    blocks = values[:, : values.shape[1] // block * block].reshape(-1, block)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(blocks), (resamples, len(blocks)), generator=generator)
    # A few resamples at a time: all of them would be thousands of times the data.
    rows = max(1, 4_000_000 // blocks.numel())
    spread = torch.cat([statistic(blocks[part].flatten(1)) for part in drawn.split(rows)])
    tail = (1 - LEVEL) / 2
    low, high = spread.quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return Interval(estimate, low, high)
