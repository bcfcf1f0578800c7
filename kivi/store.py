"""How tokens move through a layer's buffers: into exact slots, into pages and back."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kivi.kernels.reference import exact_positions, gather_pages, smooth_factors
from kivi.opaque import is_told
from kivi.packing import units_per_tile
from kivi.pages import page_count
from kivi.smoothing import find_smooth
from kivi.spec import PAGE_TOKENS, KVSpec, QuantSpec
from kivi.steps import SLACK, Step, Stretch, ring_slots, rows, slots, stretches
from kivi.view import CacheView


def write_exact(view: CacheView, spec: KVSpec, k: Tensor, v: Tensor, position: Tensor) -> None:
    """Put columns `[B, Hkv, T, D]` into the exact slots of their positions `[B, T]`."""
    _write(view, k, v, (rows(position), slots(spec, position)))


def write_new(
    view: CacheView, k: Tensor, v: Tensor, step: Step, write: Callable[..., bool] | None = None
) -> None:
    """Put new columns `[B, Hkv, T, D]` into the exact slots that the step knows.

    `write` does it in one launch, or says that it cannot.
    """
    assert step.place is not None
    if write is None or not write(view.exact_key, view.exact_value, k, v, step.place):
        _write(view, k, v, step.place)


def _write(
    view: CacheView, k: Tensor, v: Tensor, place: list[Stretch] | tuple[Tensor, Tensor]
) -> None:
    for exact, new in ((view.exact_key, k), (view.exact_value, v)):
        if isinstance(place, list):
            for column, slot, count in place:
                part = new if count == new.shape[2] else new.narrow(2, column, count)
                exact.narrow(2, slot, count).copy_(part)
        else:
            row, slots_of = place
            exact[row, :, slots_of] = new.transpose(1, 2)


def pack_units(
    view: CacheView,
    spec: KVSpec,
    sources: Sequence[Tensor],
    first: Tensor,
    due: Tensor | None,
    quantize_pack: Callable[..., None],
) -> None:
    """Quantize and pack units of keys and values.

    Args:
        view: where to.
        spec: how.
        sources: keys and values, each `[B, Hkv, m, U, D]`, and their weights if there are any.
        first: `[B, m]` the units' first tokens, counted from the first packed token.
        due: `[B, m]` bool; the other units go to the bin. None if there are none.
        quantize_pack: the operator.
    """
    column = (first // PAGE_TOKENS).clamp_max(view.table.shape[1] - 1)
    page, offset = view.table.gather(1, column), first % PAGE_TOKENS
    page = page if due is None else page * due
    specs, sinks = (spec.key, spec.value), spec.sink_length
    factors = smooth_factors(view, spec)
    for x, pages, one, f in zip(sources[:2], view[:2], specs, factors, strict=True):
        unit = x.shape[3]
        # Units that may fall into one word tile are written one call after the other.
        stride = units_per_tile(one.bits, unit) if isinstance(one, QuantSpec) else 1
        for start in range(min(stride, x.shape[2])):
            pick = slice(start, None, stride)
            run, *weight = (s[:, :, pick].transpose(1, 2) for s in (x, *sources[2:]))
            told = (sinks + first[:, pick], *weight) if is_told(one) else ()
            quantize_pack(pages, one, run, page[:, pick], offset[:, pick], None, f, *told)


def store(
    view: CacheView,
    spec: KVSpec,
    k: Tensor,
    v: Tensor,
    step: Step,
    quantize_pack: Callable[..., None],
    ring: int | None = None,
    write: Callable[..., bool] | None = None,
    store_pages: Callable[..., bool] | None = None,
) -> None:
    """Store T columns: units leave the window into pages, the new tokens enter it.

    Up to SLACK columns must already lie in their exact slots (`write_new`).

    Args:
        view: the state before; pages and exact slots are written, counters are not.
        spec: how the layer is packed.
        k: `[B, Hkv, T, D]`.
        v: `[B, Hkv, T, Dv]`.
        step: what to do.
        quantize_pack: the operator.
        ring: a page is written again this many columns later; what would be lost so at once is
            not packed at all.
        write: see `write_new`.
        store_pages: packs whole pages of keys and values, or says that it cannot.
    """
    t, unit, sinks, units = k.shape[2], spec.unit, spec.sink_length, step.units
    if step.whole and store_pages is not None and (ring is None or step.whole <= ring):
        assert step.before is not None
        length, packed = step.before
        page = _part(view.table, 1, packed // PAGE_TOKENS, packed // PAGE_TOKENS + step.whole)
        if store_pages(view, spec, k, v, sinks + packed - length, page, step.zeros, step.place):
            return
    if units and step.before is not None:
        _pack_alike(view, spec, k, v, step, quantize_pack, ring, store_pages)
    elif units:
        start = view.packed
        if ring is not None:
            start = torch.maximum(start, (-(-step.packed // PAGE_TOKENS) - ring) * PAGE_TOKENS)
            units = min(units, ring * PAGE_TOKENS // unit)
        body = _leaving(view, spec, k, v, step.position, start, units)
        find_smooth(view, spec, body, step.packed)
        body += [] if step.weigh is None else [step.weigh(body[0], sinks + start)]
        first = start[:, None]
        if units > 1:
            first = first + torch.arange(units, device=k.device) * unit
        sources = [x.unflatten(2, (units, unit)) for x in body]
        pack_units(view, spec, sources, first, first < step.packed[:, None], quantize_pack)
    if t > SLACK and step.place is not None:
        write_new(view, k, v, step, write)
    elif t > SLACK:
        _enter(view, spec, k, v, step)


def _part(x: Tensor, dim: int, first: int, last: int) -> Tensor:
    """`x[first:last]` in dimension `dim`; itself if that is all: a view takes a while as well."""
    size = x.shape[dim]
    last = min(last, size)
    return x if first == 0 and last == size else x.narrow(dim, first, last - first)


def _pack_alike(
    view: CacheView,
    spec: KVSpec,
    k: Tensor,
    v: Tensor,
    step: Step,
    quantize_pack: Callable[..., None],
    ring: int | None,
    store_pages: Callable[..., bool] | None,
) -> None:
    """`store`'s packing where the host knows which tokens leave, the same of all rows.

    Of many columns a page at a time, once the one that was begun is full: a unit at a time, a
    prompt would be dozens of launches in every layer.
    """
    assert step.before is not None
    t, unit, (length, start) = k.shape[2], spec.unit, step.before
    end = start + step.units * unit
    if ring is not None:
        start = max(start, (page_count(end) - ring) * PAGE_TOKENS)
    begin = spec.sink_length + start  # in the row
    # Few columns lie in the ring already, many do not.
    held = end - start if t <= SLACK else max(0, length - begin)
    places = stretches(spec, [begin], held) or []
    body = []
    for x, exact in ((k, view.exact_key), (v, view.exact_value)):
        parts = [exact.narrow(2, slot, count) for _, slot, count in places]
        parts += [_part(x, 2, max(0, begin - length), t)] if t > SLACK else []
        body.append(parts[0] if len(parts) == 1 else torch.cat(parts, 2))
    find_smooth(view, spec, body, step.packed)
    body += [] if step.weigh is None else [step.weigh(body[0][:, :, : end - start], begin)]
    head = min(end, page_count(start) * PAGE_TOKENS) - start if t > SLACK else end - start
    if head:
        units = [_part(x, 2, 0, head).unflatten(2, (-1, unit)) for x in body]
        first = torch.arange(start, start + head, unit, device=k.device).expand(k.shape[0], -1)
        pack_units(view, spec, units, first, None, quantize_pack)
    if start + head < end:
        page = _part(view.table, 1, page_count(start), page_count(end))
        rest = [_part(x, 2, head, x.shape[2]) for x in body]
        assert step.zeros is not None
        zeros = _part(step.zeros, 1, 0, page.shape[1])
        _pack_pages(view, spec, rest, begin + head, page, zeros, quantize_pack, store_pages)


def _pack_pages(
    view: CacheView,
    spec: KVSpec,
    sources: Sequence[Tensor],
    begin: int,
    page: Tensor,
    zeros: Tensor,
    quantize_pack: Callable[..., None],
    store_pages: Callable[..., bool] | None,
) -> None:
    """Quantize and pack tokens from the start of a page on, a page at a time.

    What follows them fills the last page, exact tokens as well or nothing: it does not count, and
    what will leave the window for its place overwrites it.

    Args:
        view: where to.
        spec: how.
        sources: keys and values `[B, Hkv, T, D]`, and their weights if there are any.
        begin: their first token in its row.
        page: `[B, n]`.
        zeros: `[B, n]`, where in its page each run begins.
        quantize_pack: the operator.
        store_pages: see `store`.
    """
    n, factors, specs = page.shape[1], smooth_factors(view, spec), (spec.key, spec.value)
    whole = min(n, *(x.shape[2] // PAGE_TOKENS for x in sources))
    for first, last in ((0, whole), (whole, n)):
        if first == last:
            continue
        where, start = _part(page, 1, first, last), _part(zeros, 1, 0, last - first)
        parts = [_part(x, 2, first * PAGE_TOKENS, last * PAGE_TOKENS) for x in sources]
        if first == whole:  # one page
            parts = [F.pad(x, (0, 0, 0, PAGE_TOKENS - x.shape[2])) for x in parts]
        if store_pages is not None and store_pages(view, spec, *parts[:2], 0, where, start, None):
            continue
        runs = [x.unflatten(2, (last - first, -1)).transpose(1, 2) for x in parts]
        told = list[Tensor]()
        if any(map(is_told, specs)):
            number = torch.arange(first, last, device=page.device)
            told = [(begin + number * PAGE_TOKENS).expand_as(where), *runs[2:]]
        for run, pages, one, f in zip(runs[:2], view[:2], specs, factors, strict=True):
            quantize_pack(pages, one, run, where, start, None, f, *(told if is_told(one) else ()))


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
