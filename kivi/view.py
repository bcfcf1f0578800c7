"""CacheView: a layer's state as the operators see it."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from kivi.quantize import Pages


class CacheView(NamedTuple):
    """A layer's state; tensors only.

    `key`, `value`: the pool's pages. `table [B, n]` int64: page of each 512 packed tokens.
    `packed [B]` int64: packed tokens of each row. `exact_key`, `exact_value` `[B, Hkv, E, D]`:
    S sink slots, then a ring of W slots, then one bin. `length [B]` int64: tokens of each row.
    Where a layer has a sliding window, columns that no query with this window sees may name pages
    of newer tokens, or page 0.
    Token p of a row is sink slot p if p < S; packed token p - S if p < S + packed; else it lies in
    ring slot (p - S) mod W. `smooth [B, Hkv, n]`: what the channels of packed keys, then of values,
    were divided by, of those that the spec smooths (n = 0 for none).
    """

    key: Pages
    value: Pages
    table: Tensor
    packed: Tensor
    exact_key: Tensor
    exact_value: Tensor
    length: Tensor
    smooth: Tensor | None = None

    def tensors(self) -> list[Tensor]:
        """All tensors."""
        return [x for x in (*self.key, *self.value, *self[2:]) if isinstance(x, Tensor)]
