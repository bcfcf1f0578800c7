"""Orthogonal maps of the tokens: quantized is the map of a key or value, attention undoes it.

Keys: `<q, k> = <H q, H k>`, so a kernel may map the query instead. Values: the inverse map of the
output is the output of the inverse maps.
"""

from __future__ import annotations

import torch
from torch import Tensor


def hadamard(x: Tensor, block: int) -> Tensor:
    """The Walsh-Hadamard map of each block of `block` channels, `[..., D]` float32; 1: none.

    Times `2^-floor(log2(block) / 2)`, which makes it orthogonal for even powers and sqrt(2) times
    that for odd ones: a power of two rounds nothing. Sums have a fixed order, so that every
    implementation finds the same numbers.
    """
    return _butterflies(x, block) * 2.0 ** -((block.bit_length() - 1) // 2)


def inverse_hadamard(x: Tensor, block: int) -> Tensor:
    """What `hadamard` undoes; also the map of the queries that go with mapped keys."""
    return _butterflies(x, block) * 2.0 ** -(block.bit_length() // 2)


def _butterflies(x: Tensor, block: int) -> Tensor:
    step = 1
    while step < block:
        low, high = x.unflatten(-1, (-1, 2, step)).unbind(-2)
        x = torch.stack([low + high, low - high], -2).flatten(-3)
        step *= 2
    return x
