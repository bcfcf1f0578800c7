"""A LayerCache as tensors and a description, and back: what a file of a cache is made of."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import torch
from torch import Tensor

from kivi.attention import Impl
from kivi.cache import LayerCache
from kivi.spec import KVSpec, Rope


def describe(cache: LayerCache) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What `rebuild` makes the layer of again.

    Raises:
        ValueError: for a format whose fields JSON cannot write.

    Returns:
        a description that JSON can write, and tensors by name: each page that holds packed tokens
        once, whatever rows share it, and the exact slots.
    """
    packed = cache.packed_lengths()
    pages, rows = cache._pages.used(packed)
    index = torch.tensor(pages, dtype=torch.int64, device=cache.device)
    description = {
        "spec": fields_of(cache.spec),
        "shape": [cache.num_kv_heads, cache.head_dim, cache.value_head_dim],
        "dtype": str(cache.dtype).removeprefix("torch."),
        "max_length": cache.max_length,
        "sliding_window": cache.sliding_window,
        "lengths": cache.lengths(),
        "packed": packed,
        "forgotten": cache._pages.forgotten(packed),
        "rows": rows,
    }
    tensors = {name: x[index] for name, x in _pages(cache).items()}
    return description, tensors | _of_rows(cache)


def rebuild(
    spec: KVSpec,
    description: dict[str, Any],
    tensors: dict[str, Tensor],
    *,
    device: torch.device | str,
    impl: Impl,
    check_finite: bool,
) -> LayerCache:
    """The layer that `describe` gave these of.

    Args:
        spec: how the layer is packed; its fields are those of the description.
        description: see `describe`.
        tensors: see `describe`, on any device.
        device: where the layer is to live.
        impl: see `LayerCache`.
        check_finite: see `LayerCache`.

    Raises:
        ValueError: if the tensors are not those of the description.
    """
    lengths, packed = description["lengths"], description["packed"]
    cache = LayerCache(
        spec,
        len(lengths),
        *description["shape"],
        max_length=description["max_length"],
        sliding_window=description["sliding_window"],
        dtype=getattr(torch, description["dtype"]),
        device=device,
        impl=impl,
        check_finite=check_finite,
    )
    with torch.inference_mode(False):
        cache._pages.refill(description["rows"], packed, description["forgotten"])
        shapes = {name: x.shape[1:] for name, x in (_pages(cache) | _of_rows(cache)).items()}
        if shapes != {name: x.shape[1:] for name, x in tensors.items()}:
            raise ValueError("its tensors are not those of the layer it describes")
        pairs = [
            (page, place)
            for row, places in zip(cache._pages.rows, description["rows"], strict=True)
            for page, place in zip(row, places, strict=False)
        ]
        target, source = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2).unbind(1)
        for name, x in _pages(cache).items():
            x[target.to(x.device)] = tensors[name].to(x)[source.to(x.device)]
        for name, x in _of_rows(cache).items():
            x.copy_(tensors[name])
        cache._count(*(torch.tensor(x, device=cache.device) for x in (lengths, packed)))
    cache._host = (list(lengths), list(packed))
    cache._write_table()
    return cache


def _pages(cache: LayerCache) -> dict[str, Tensor]:
    """The pool's tensors by name."""
    both = zip(("key", "value"), cache._pages.pool.pages(), strict=True)
    named = {f"{name}_{field}": x for name, p in both for field, x in p._asdict().items()}
    return {name: x for name, x in named.items() if x is not None}


def _of_rows(cache: LayerCache) -> dict[str, Tensor]:
    """What the rows hold beside pages and counters, by name: exact slots."""
    others, named = ("table", "packed", "length"), cache._view()._asdict().items()
    return {n: x for n, x in named if isinstance(x, Tensor) and x.numel() and n not in others}


def fields_of(spec: KVSpec) -> dict[str, Any]:
    """The spec as JSON gives it back.

    Raises:
        ValueError: for a format whose fields JSON cannot write.
    """
    try:
        fields: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(spec)))
    except TypeError as error:
        raise ValueError(f"this cache cannot be saved: {error}") from None
    return fields


def rope_of(fields: dict[str, Any]) -> Rope | None:
    """The rotary embedding in a spec's fields: its own, or its keys'."""
    rope = fields.get("rope") or (fields["key"] or {}).get("rope")
    return rope and Rope(*map(tuple, rope.values()))
