"""Prompts: pages of keys and values, and what stays exact, from one lookup.

Three launches, or five, take the host less than one call of `quantize_pack` does by itself.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kivi.grids import metadata_dtype
from kivi.kernels import triton_quantize, triton_write
from kivi.kernels.triton_direct import Launch, direct, on_device, stream
from kivi.kernels.triton_formats import is_plain
from kivi.kernels.triton_portable import INTERPRETED
from kivi.spec import PAGE_TOKENS, KVSpec, OpaqueSpec, QuantSpec


class _Plan(NamedTuple):
    """Launches for keys and for values, of whole pages and of one that is not, and for exact slots.

    No launches where tokens like these are not stored here. `spec` stays alive, so that its id is
    nobody else's: to hash and compare specs takes as long as a launch.
    """

    spec: KVSpec
    pages: tuple[tuple[Launch, Launch], ...] = ()
    exact: Launch | None = None
    numbers: tuple[int, ...] = ()


_PLANS: dict[Any, _Plan] = {}


def _pages(one: QuantSpec | None, x: Tensor, n: int, masked: bool) -> Launch:
    """The launch that packs n pages of each row of x `[B, Hkv, T, D]`."""
    (b, heads, _, d), (row, head, token, _), meta = x.shape, x.stride(), metadata_dtype(x.dtype)
    dtypes = (x.dtype, torch.int16, meta, meta if one.has_zero else None) if one else (x.dtype,) * 2
    shape, strides = (b, n, heads, PAGE_TOKENS, d), (row, PAGE_TOKENS * token, head, token, 1)
    launch: Launch = triton_quantize.launch_of(
        triton_quantize.flat(one),
        x.device,
        dtypes,
        shape,
        strides,
        b * n,
        (0, 0, 1) if masked else None,
        (True,) * (7 if one else 4),
    )
    return launch


def _plan(
    view: Any, spec: KVSpec, k: Tensor, v: Tensor, counts: list[int], place: list[Any] | None
) -> _Plan:
    """How tokens like these are stored; `counts`: whole pages, and of those that are not."""
    key, value, strides = spec.key, spec.value, (k.stride(), v.stride())
    if not (is_plain(key) and is_plain(value)) or strides[0][3] != 1 or strides[1][3] != 1:
        return _Plan(spec)
    if counts[1] and (key is None or value is None):  # nothing keeps a copy from reading on
        return _Plan(spec)
    assert not isinstance(key, OpaqueSpec) and not isinstance(value, OpaqueSpec)
    exact, numbers = None, tuple[int, ...]()
    if place is not None:
        tokens, numbers = triton_write.numbers_of(place)
        slots, size = view.exact_value.shape[2:]
        exact = triton_write.launch_of(k.device, k.dtype, tokens, k.shape, slots, size, *strides)
    both = [(n, bool(i)) for i, n in enumerate(counts) if n]
    pages = tuple((_pages(key, k, *how), _pages(value, v, *how)) for how in both)
    return _Plan(spec, pages, exact, numbers)


def store_pages(
    view: Any,
    spec: KVSpec,
    k: Tensor,
    v: Tensor,
    column: int,
    page: Tensor,
    zeros: Tensor,
    tail: Tensor | None,
    place: Any,
) -> bool:
    """Quantize and pack pages of keys and values from their start on, if nobody looks on.

    Args:
        view: where to (CacheView).
        spec: how.
        k: `[B, Hkv, T, D]`.
        v: `[B, Hkv, T, Dv]`.
        column: where the first page begins.
        page: `[B, n]` int64; nothing is written for page 0.
        zeros: `[B, n]` int64, contiguous.
        tail: `[512]` bool, which tokens of the last page are columns, the first ones; None for all.
        place: exact slots that columns enter as well, as `write_new` takes them; None for none.

    Returns:
        Whether it did: what `quantize_pack` does of runs of 512 tokens, and `write_new`.
    """
    if not direct(k, v, cpu=INTERPRETED):
        return False
    device, n, kv, strides = k.device, page.shape[1], (k, v), (k.stride(), v.stride())
    whole = n if tail is None else n - 1
    call = (id(spec), device, k.dtype, k.shape, v.shape, strides, n, whole, *(place or ()))
    plan = _PLANS.get(call)
    if plan is None:
        if len(_PLANS) >= 4096:
            _PLANS.clear()
        plan = _PLANS[call] = _plan(view, spec, k, v, [whole, n - whole], place)
    size = k.itemsize
    at = [x.data_ptr() + column * stride[2] * size for x, stride in zip(kv, strides, strict=True)]
    # Pages are allocations, or begin with a line of the cache.
    if not plan.pages or (at[0] | at[1]) % 16:
        return False
    parts: list[tuple[int, Tensor, Tensor | None]] = [(0, page, None)]
    if tail is not None:
        parts = [(0, page[:, :whole], None)] if whole else []
        parts.append((whole, page[:, whole:], tail))
    with on_device(device) if k.is_cuda else nullcontext():
        queue = stream(device) if k.is_cuda else 0
        for (first, where, mask), launches in zip(parts, plan.pages, strict=True):
            where, start = where.contiguous(), first * PAGE_TOKENS
            for i, launch in enumerate(launches):
                (words, scale, zero, *_), x = view[i], at[i] + start * strides[i][2] * size
                if launch.compiled is None:
                    tokens = kv[i][:, :, column + start :]
                    stored = (words,) if scale is None else (words, scale, zero)
                    launch.first(*stored, tokens, where, zeros, *[mask] * (scale is not None))
                    continue
                runs = x, where.data_ptr(), zeros.data_ptr()
                if scale is None:
                    launch.again(queue, (words.data_ptr(), *runs))
                else:
                    others = [None if t is None else t.data_ptr() for t in (zero, mask)]
                    meta = scale.data_ptr(), others[0]
                    launch.again(queue, (words.data_ptr(), *meta, *runs, others[1]))
        if plan.exact is not None:
            exact = view.exact_key, view.exact_value, k, v
            if plan.exact.compiled is None:
                plan.exact.first(*exact, *plan.numbers)
            else:
                plan.exact.again(queue, (*map(Tensor.data_ptr, exact), *plan.numbers))
    return True
