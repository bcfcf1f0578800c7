"""How tokens move through a layer's buffers: into exact slots, into pages and back."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from kivi.kernels.reference import exact_positions, gather_pages, smooth_factors
from kivi.packing import units_per_tile
from kivi.pages import CROP
from kivi.smoothing import find_smooth
from kivi.spec import PAGE_TOKENS, TILE_ROWS, KVSpec, QuantSpec, check_count
from kivi.view import CacheView

SLACK = TILE_ROWS
"""Tokens that fit into the ring before a unit must have left it."""


Counts = tuple[list[int], list[int]]
"""Lengths and packed lengths of the rows, on the host."""


class Step(NamedTuple):
    """What storing T columns does to the counters; computed before anything changes.

    `position [B, T]` of each column in its row, -1 for padding; `length [B]` and `packed [B]`
    afterwards; `units`: at most so many units leave the window of a row. They may be views of the
    counters.
    """

    position: Tensor
    length: Tensor
    packed: Tensor
    units: int


def ring_slots(spec: KVSpec) -> int:
    """W: room for R tokens, a unit that is not yet full, and SLACK new tokens."""
    return spec.residual_length + spec.unit + SLACK


def slots(spec: KVSpec, position: Tensor) -> Tensor:
    """The exact slot of a position; the bin, S + W, for a negative one."""
    sinks, ring = spec.sink_length, ring_slots(spec)
    if sinks:
        slot = torch.where(position < sinks, position, sinks + (position - sinks) % ring)
    else:
        slot = position % ring
    return slot.masked_fill(position < 0, sinks + ring)


def plan(view: CacheView, spec: KVSpec, t: int, valid: Tensor | None, units: int) -> Step:
    """The step that stores t columns, those of `valid [B, t]` only; at most `units` units leave.

    A decode step in eager mode launches every operation here on its own: no more than it needs.
    """
    if valid is None:
        position = view.length[:, None]
        if t > 1:
            position = position + torch.arange(t, device=view.length.device)
        length = view.length + t
    else:
        position = torch.where(valid, view.length[:, None] + valid.cumsum(1) - 1, -1)
        length = view.length + valid.sum(1)
    if not units:
        return Step(position, length, view.packed, 0)
    window = length - view.packed - (spec.sink_length + spec.residual_length)
    leaving = window.clamp_min(0) // spec.unit * spec.unit
    return Step(position, length, view.packed + leaving, units)


def plan_on_host(
    spec: KVSpec, counts: Counts, new: list[int], max_length: int | None
) -> tuple[Counts, int]:
    """The counts after so many new tokens in each row, and the most units that leave a row.

    Raises:
        ValueError: for a row of more than `max_length` tokens.
    """
    window = spec.sink_length + spec.residual_length
    lengths = [n + t for n, t in zip(counts[0], new, strict=True)]
    if max_length is not None and max(lengths) > max_length:
        raise ValueError(
            f"k has {max(new)} more tokens, which makes rows of {lengths} tokens; "
            f"max_length={max_length}"
        )
    pairs = zip(lengths, counts[1], strict=True)
    units = [max(0, n - p - window) // spec.unit for n, p in pairs]
    packed = [p + u * spec.unit for p, u in zip(counts[1], units, strict=True)]
    return (lengths, packed), max(units)


def needed(window: int | None, counts: Counts | None, max_length: int | None) -> int | None:
    """The window of queries, or None where no row reaches out of it: kernels need not look then.

    Args:
        window: the window.
        counts: after the step, None if the host does not know them.
        max_length: the most that a row can hold.
    """
    longest = max_length if counts is None else max(counts[0])
    return None if window is None or longest is None or longest <= window else window


def cut(
    spec: KVSpec, counts: Counts, tokens: int, window: int | None, forgotten: list[int]
) -> Counts:
    """The counts after dropping the last tokens; a packed unit is kept whole or not at all.

    Args:
        spec: how the layer is packed.
        counts: the counts before.
        tokens: how many are dropped.
        window: of the layer's queries.
        forgotten: packed tokens at the start of each row that are gone.

    Raises:
        ValueError: for more tokens than a row has, or if the next query would see forgotten ones.
    """
    check_count("tokens", tokens)
    if tokens > min(counts[0]):
        raise ValueError(f"tokens={tokens} is not allowed; the rows hold {counts[0]} tokens")
    lengths = [n - tokens for n in counts[0]]
    whole = [max(0, n - spec.sink_length) // spec.unit * spec.unit for n in lengths]
    packed = [min(pair) for pair in zip(whole, counts[1], strict=True)]
    for length, last, lost in zip(lengths, packed, forgotten, strict=True):
        first = length + 1 - (window or length) - spec.sink_length
        if lost > max(0, min(first, last)):
            if tokens == 0:
                raise ValueError(
                    f"a step that failed has overwritten tokens in the window of {window}; reset()"
                )
            raise ValueError(
                f"tokens={tokens} is not allowed; sliding_window={window} has forgotten what the "
                f"rows would see then (up to {CROP} tokens can always be cropped)"
            )
    return lengths, packed


def tensors(view: CacheView) -> list[Tensor]:
    """All tensors of a view."""
    return [x for x in (*view.key, *view.value, *view[2:]) if x is not None]


def write_exact(view: CacheView, spec: KVSpec, k: Tensor, v: Tensor, position: Tensor) -> None:
    """Put columns `[B, Hkv, T, D]` into the exact slots of their positions `[B, T]`."""
    row = torch.arange(k.shape[0], device=k.device)[:, None]
    slot = slots(spec, position)
    view.exact_key[row, :, slot] = k.transpose(1, 2)
    view.exact_value[row, :, slot] = v.transpose(1, 2)


def pack_units(
    view: CacheView,
    spec: KVSpec,
    sources: tuple[Tensor, Tensor],
    first: Tensor,
    due: Tensor,
    quantize_pack: Callable[..., None],
) -> None:
    """Quantize and pack units of keys and values.

    Args:
        view: where to.
        spec: how.
        sources: keys and values, each `[B, Hkv, m, U, D]`.
        first: `[B, m]` the units' first tokens, counted from the first packed token.
        due: `[B, m]` bool; the other units go to the bin.
        quantize_pack: the operator.
    """
    column = (first // PAGE_TOKENS).clamp_max(view.table.shape[1] - 1)
    page, offset = view.table.gather(1, column) * due, first % PAGE_TOKENS
    specs, factors = (spec.key, spec.value), smooth_factors(view, spec)
    for x, pages, one, f in zip(sources, (view.key, view.value), specs, factors, strict=True):
        unit = x.shape[3]
        # Units that may fall into one word tile are written one call after the other.
        stride = units_per_tile(one.bits, unit) if isinstance(one, QuantSpec) else 1
        for start in range(min(stride, x.shape[2])):
            pick = slice(start, None, stride)
            run = x[:, :, pick].transpose(1, 2)
            quantize_pack(pages, one, run, page[:, pick], offset[:, pick], None, f)


def store(
    view: CacheView,
    spec: KVSpec,
    k: Tensor,
    v: Tensor,
    step: Step,
    fresh: bool,
    quantize_pack: Callable[..., None],
    ring: int | None = None,
) -> None:
    """Store T columns: units leave the window into pages, the new tokens enter it.

    Up to SLACK columns must already lie in their exact slots (`write_exact`).

    Args:
        view: the state before; pages and exact slots are written, counters are not.
        spec: how the layer is packed.
        k: `[B, Hkv, T, D]`.
        v: `[B, Hkv, T, Dv]`.
        step: what to do.
        fresh: the caller knows that the cache is empty and no column is padding.
        quantize_pack: the operator.
        ring: a page is written again this many columns later; what would be lost so at once is
            not packed at all.
    """
    t, unit, sinks = k.shape[2], spec.unit, spec.sink_length
    units, start, done = step.units, view.packed, 0
    if units and ring is not None:
        start = torch.maximum(start, (-(-step.packed // PAGE_TOKENS) - ring) * PAGE_TOKENS)
        units = units if fresh else min(units, ring * PAGE_TOKENS // unit)
    if units and fresh:
        skipped = 0 if ring is None else max(0, -(-units * unit // PAGE_TOKENS) - ring)
        done = units * unit // PAGE_TOKENS - skipped
        units -= skipped * PAGE_TOKENS // unit
        begin = sinks + skipped * PAGE_TOKENS
        body = [x[:, :, begin : begin + units * unit] for x in (k, v)]
        find_smooth(view, spec, body, step.packed)
        if done > 0:
            page, factors = view.table[:, skipped : skipped + done], smooth_factors(view, spec)
            specs = (spec.key, spec.value)
            for x, pages, one, f in zip(body, view[:2], specs, factors, strict=True):
                run = x[:, :, : done * PAGE_TOKENS].unflatten(2, (done, PAGE_TOKENS))
                quantize_pack(pages, one, run.transpose(1, 2), page, page * 0, None, f)
        body = [x[:, :, done * PAGE_TOKENS :] for x in body]
        units -= done * PAGE_TOKENS // unit
    elif units:
        body = _leaving(view, spec, k, v, step.position, start, units)
        find_smooth(view, spec, body, step.packed)
    if units:
        first = start[:, None]
        if units > 1 or done:
            first = first + torch.arange(units, device=k.device) * unit + done * PAGE_TOKENS
        sources = (body[0].unflatten(2, (units, unit)), body[1].unflatten(2, (units, unit)))
        pack_units(view, spec, sources, first, first < step.packed[:, None], quantize_pack)
    if t > SLACK:
        _enter(view, spec, k, v, step)


def _columns(new: Tensor, rank: Tensor) -> Tensor:
    """The column of each row's rank-th new token, `[B, n]`, in range whatever the rank.

    `new [B, T]`: the positions of the new columns, -1 for padding.
    """
    order = torch.argsort(new < 0, dim=1, stable=True)
    return order.gather(1, rank.clamp(0, order.shape[1] - 1))


def _leaving(
    view: CacheView, spec: KVSpec, k: Tensor, v: Tensor, new: Tensor, start: Tensor, units: int
) -> list[Tensor]:
    """The tokens of units from packed token `start [B]` on, `[B, Hkv, units * U, D]`."""
    index = torch.arange(units * spec.unit, device=k.device)
    position = spec.sink_length + start[:, None] + index
    row = torch.arange(k.shape[0], device=k.device)[:, None]
    source = slots(spec, position)
    if k.shape[2] > SLACK:
        old = view.length[:, None]
        column = view.exact_key.shape[2] + _columns(new, position - old)
        source = torch.where(position < old, source, column)
    body = []
    for x, exact in ((k, view.exact_key), (v, view.exact_value)):
        tokens = exact if k.shape[2] <= SLACK else torch.cat([exact, x], 2)
        body.append(tokens[row, :, source].transpose(1, 2))
    return body


def _enter(view: CacheView, spec: KVSpec, k: Tensor, v: Tensor, step: Step) -> None:
    """Put the most recent of many new tokens into the ring, and the first ones into sinks."""
    row = torch.arange(k.shape[0], device=k.device)[:, None]
    old = view.length[:, None]
    count = step.length[:, None] - old
    recent = count - torch.arange(min(k.shape[2], ring_slots(spec)), device=k.device) - 1
    position = torch.where(recent >= 0, old + recent, -1)
    places = [(recent, torch.where(position >= spec.sink_length, position, -1))]
    if spec.sink_length:
        early = torch.arange(min(k.shape[2], spec.sink_length), device=k.device) - old * 0
        inside = (early < count) & (old + early < spec.sink_length)
        places.append((early, torch.where(inside, old + early, -1)))
    new = []
    for rank, position in places:
        column = _columns(step.position, rank)
        new_k, new_v = (x[row, :, column].transpose(1, 2) for x in (k, v))
        new.append((new_k, new_v, position))
    # Only now: old tokens in the window give way, so nothing may fail any more.
    for new_k, new_v, position in new:
        write_exact(view, spec, new_k, new_v, position)


def unpack_unit(
    view: CacheView, spec: KVSpec, packed: Tensor, length: Tensor, due: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Packed tokens that go back into the ring, dequantized: what `write_exact` takes.

    Args:
        view: the layer's state.
        spec: how it is packed.
        packed: `[B]` the first of them, a multiple of the unit, from the first packed token on.
        length: `[B]` tokens that the row keeps; less than a unit of them is not packed.
        due: `[B]` bool, which rows.
    """
    row = torch.arange(packed.shape[0], device=packed.device)[:, None]
    index = torch.arange(spec.unit, device=packed.device)
    position = spec.sink_length + packed[:, None] + index
    position = torch.where((position < length[:, None]) & due[:, None], position, -1)
    column = (packed // PAGE_TOKENS).clamp_max(view.table.shape[1] - 1)[:, None]
    page = view.table.gather(1, column)
    dtype, new = view.exact_key.dtype, []
    both = (
        (view.key, spec.key, view.exact_key.shape[3]),
        (view.value, spec.value, view.exact_value.shape[3]),
    )
    for (pages, one, size), smooth in zip(both, smooth_factors(view, spec), strict=True):
        dense = gather_pages(pages, one, page, dtype, size, smooth)
        new.append(dense[row, :, packed[:, None] % PAGE_TOKENS + index].transpose(1, 2))
    return new[0], new[1], position


def dense(view: CacheView, spec: KVSpec, tokens: int, lost: list[int]) -> tuple[Tensor, Tensor]:
    """Keys and values `[B, Hkv, tokens, D]`, left-aligned, zero past a row's end.

    Of each row the first `lost` packed tokens are zero as well: they were overwritten.
    """
    sinks = spec.sink_length
    position, visible = exact_positions(view, sinks)
    index = torch.arange(view.table.shape[1] * PAGE_TOKENS, device=position.device)
    inside = index < view.packed[:, None]
    if any(lost):
        inside &= index >= torch.tensor(lost, device=position.device)[:, None]
    # One more slot takes all that is not part of a row.
    target = torch.cat(
        [torch.where(inside, sinks + index, tokens), torch.where(visible, position, tokens)], 1
    )
    row = torch.arange(target.shape[0], device=target.device)[:, None]
    pairs = ((view.key, spec.key, view.exact_key), (view.value, spec.value, view.exact_value))
    both = []
    for (pages, one, exact), smooth in zip(pairs, smooth_factors(view, spec), strict=True):
        packed = gather_pages(pages, one, view.table, exact.dtype, exact.shape[3], smooth)
        x = torch.cat([packed, exact[:, :, :-1]], 2)
        out = x.new_zeros(x.shape[0], x.shape[1], tokens + 1, x.shape[3])
        out[row, :, target] = x.transpose(1, 2)
        both.append(out[:, :, :tokens])
    return both[0], both[1]
