"""Prompts: whole pages of keys and values, and what stays exact, from one lookup.

Three launches take the host less than one call of `quantize_pack` does by itself.
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
    """Launches for keys, values and exact slots, and numbers that the last one takes.

    No launches where tokens like these are not stored here. `spec` stays alive, so that its id is
    nobody else's: to hash and compare specs takes as long as a launch.
    """

    spec: KVSpec
    pages: tuple[Launch, ...] = ()
    exact: Launch | None = None
    numbers: tuple[int, ...] = ()


_PLANS: dict[Any, _Plan] = {}


def _pages(one: QuantSpec | None, x: Tensor, n: int) -> Launch:
    """The launch that packs n whole pages of each row of x `[B, Hkv, T, D]`."""
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
        None,
        (True,) * (7 if one else 4),
    )
    return launch


def _plan(view: Any, spec: KVSpec, k: Tensor, v: Tensor, n: int, place: list[Any] | None) -> _Plan:
    """How tokens like these are stored."""
    key, value, strides = spec.key, spec.value, (k.stride(), v.stride())
    if not (is_plain(key) and is_plain(value)) or strides[0][3] != 1 or strides[1][3] != 1:
        return _Plan(spec)
    assert not isinstance(key, OpaqueSpec) and not isinstance(value, OpaqueSpec)
    exact, numbers = None, tuple[int, ...]()
    if place is not None:
        tokens, numbers = triton_write.numbers_of(place)
        slots, size = view.exact_value.shape[2:]
        exact = triton_write.launch_of(k.device, k.dtype, tokens, k.shape, slots, size, *strides)
    return _Plan(spec, (_pages(key, k, n), _pages(value, v, n)), exact, numbers)


def store_pages(
    view: Any,
    spec: KVSpec,
    k: Tensor,
    v: Tensor,
    column: int,
    page: Tensor,
    first: Tensor,
    place: Any,
) -> bool:
    """Quantize and pack whole pages of keys and values, if nobody looks on.

    Args:
        view: where to (CacheView).
        spec: how.
        k: `[B, Hkv, T, D]`.
        v: `[B, Hkv, T, Dv]`.
        column: where the first page begins; T >= column + 512 * n.
        page: `[B, n]` int64; nothing is written for page 0.
        first: `[B, n]` int64, zeros.
        place: exact slots that columns enter as well, as `write_new` takes them; None for none.

    Returns:
        Whether it did: what `quantize_pack` does of runs of 512 tokens, and `write_new`.
    """
    if not direct(k, v, cpu=INTERPRETED):
        return False
    kv = (k, v) if column == 0 else (k[:, :, column:], v[:, :, column:])
    device, n, at = k.device, page.shape[1], (kv[0].data_ptr(), kv[1].data_ptr())
    of_kv = k.dtype, k.shape, k.stride(), v.shape, v.stride()
    call = (id(spec), device, of_kv, n, *(place or ()))
    plan = _PLANS.get(call)
    if plan is None:
        if len(_PLANS) >= 4096:
            _PLANS.clear()
        plan = _PLANS[call] = _plan(view, spec, k, v, n, place)
    # Pages are allocations, or begin with a line of the cache.
    if not plan.pages or (at[0] | at[1]) % 16:
        return False
    page, first = page.contiguous(), first.contiguous()
    runs = page.data_ptr(), first.data_ptr()
    with on_device(device) if k.is_cuda else nullcontext():
        queue = stream(device) if k.is_cuda else 0
        for i, launch in enumerate(plan.pages):
            (words, scale, zero, *_), x = view[i], kv[i]
            if launch.compiled is None:
                stored = (words,) if scale is None else (words, scale, zero)
                launch.first(*stored, x, page, first, *[None] * (scale is not None))
            elif scale is None:
                launch.again(queue, (words.data_ptr(), at[i], *runs))
            else:
                zeros = None if zero is None else zero.data_ptr()
                launch.again(queue, (words.data_ptr(), scale.data_ptr(), zeros, at[i], *runs, None))
        if plan.exact is not None:
            exact = view.exact_key, view.exact_value, k, v
            if plan.exact.compiled is None:
                plan.exact.first(*exact, *plan.numbers)
            else:
                plan.exact.again(queue, (*map(Tensor.data_ptr, exact), *plan.numbers))
    return True
