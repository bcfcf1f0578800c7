"""Room: buffers of layers that are filled alike, made for several of them at a time."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor

AHEAD = 2**24
"""Bytes made ahead at most: where a layer grows, its old part stays until all others have grown."""

LINE = 128
"""Bytes; each layer's part begins with a cache line, so that kernels see them alike."""

Buffers = list[Tensor | None]


@dataclass(slots=True)
class _Stock:
    """Buffers of one kind: how many layers have asked for them, what is left, bytes of each.

    `again`: whether it is not the first kind, so that there may be more.
    """

    kind: Hashable
    again: bool
    asked: int = 0
    left: list[Buffers] = field(default_factory=list)
    nbytes: list[int] = field(default_factory=list)


def apart(x: Any) -> Any:
    """What is part of a larger buffer as one of its own; tuples element by element."""
    if isinstance(x, Tensor):
        return x.clone() if x.untyped_storage().nbytes() > x.nbytes else x
    if isinstance(x, tuple):
        parts = map(apart, x)
        return type(x)(*parts) if hasattr(x, "_fields") else tuple(parts)
    return x


class Part:
    """What holds parts of joint buffers: deep copies and pickles take its own, not all of them."""

    def __copy__(self) -> Self:
        new = object.__new__(type(self))
        new.__dict__.update(self.__dict__)
        return new

    def __getstate__(self) -> dict[str, Any]:
        return {name: apart(x) for name, x in vars(self).items()}


class Room:
    """Where layers that are filled alike find buffers, and what was once found out for all.

    To allocate and to zero takes the host as long as a launch, and a layer has ten buffers.

    Args:
        layers: how many will ask for the same.
    """

    def __init__(self, layers: int = 0) -> None:
        self.layers = layers
        self._stocks: dict[str, _Stock] = {}
        self._known: dict[Hashable, Any] = {}

    def __reduce__(self) -> tuple[type[Room], tuple[int]]:
        return Room, (self.layers,)

    def once(self, kind: Hashable, find: Callable[[], Any]) -> Any:
        """What `find` returned for the first layer of a kind."""
        if kind not in self._known:
            self._known = {kind: find()}
        return self._known[kind]

    def take(self, name: str, kind: Hashable, make: Callable[[int], Buffers]) -> list[Any]:
        """Buffers that nobody else has.

        Args:
            name: what they are for.
            kind: what `make` depends on. Buffers of another kind are not kept.
            make: makes them for n layers: n times as large in their first dimension.
        """
        stock = self._stocks.get(name)
        if stock is None or stock.kind != kind:
            stock = self._stocks[name] = _Stock(kind, stock is not None)
        if not stock.left:
            self._more(stock, make)
        stock.asked += 1
        return stock.left.pop()

    @torch.inference_mode(False)  # buffers outlive the mode they are made in
    def _more(self, stock: _Stock, make: Callable[[int], Buffers]) -> None:
        """Buffers of the first layer, then of as many of the others as may be made ahead."""
        count = min(self.layers - stock.asked, AHEAD // max(1, sum(stock.nbytes)))
        if stock.again:  # no more than have been asked for: the next may be of another kind
            count = min(count, stock.asked)
        if count <= 1 or not stock.asked or any(n % LINE for n in stock.nbytes):
            one = make(1)
            stock.left, stock.nbytes = [one], [0 if x is None else x.nbytes for x in one]
            return
        parts = [_parts(x, count) for x in make(count)]
        stock.left = list(map(list, zip(*parts, strict=True)))


def _parts(x: Tensor | None, count: int) -> Sequence[Tensor | None]:
    """A tensor in as many pieces; what has no elements is the same in all places."""
    if x is None:
        return [None] * count
    return x.chunk(count) if x.numel() else [x[: len(x) // count]] * count
