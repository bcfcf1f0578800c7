"""Steps: what storing new tokens does to a layer's counters, on the device and on the host."""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from kivi.pages import CROP, page_count, table_of
from kivi.room import Room
from kivi.spec import PAGE_TOKENS, TILE_ROWS, KVSpec, check_count

SLACK = TILE_ROWS
"""Tokens that fit into the ring before a unit must have left it."""


Counts = tuple[list[int], list[int]]
"""Lengths and packed lengths of the rows, on the host."""

Held = tuple[Tensor, Tensor]
"""Lengths and packed lengths of the rows on the device, each `[B]`."""

Stretch = tuple[int, int, int]
"""Columns whose exact slots lie side by side: the first column, its slot, how many."""


class Step(NamedTuple):
    """What storing T columns does to the counters; computed before anything changes.

    `position [B, T]` of each column in its row, -1 for padding; `length [B]` and `packed [B]`
    afterwards; `units`: at most so many units leave the window of a row. `place`: exact slots as
    `stretches`, if the host knows them and they are those of all rows; else rows `[B, 1]` and slots
    `[B, T]` of up to SLACK columns, None for more. `before`: tokens and packed tokens that every
    row had, if the host knows that. Tensors may be views of the counters, and shared by layers:
    none is written. `zeros [B, n]`, int64, if pages may be begun: for all pages that units enter.
    `whole`: pages that columns fill to the end, if nothing else leaves; 0 if that is not known.
    `weigh` tells formats that ask for it which tokens matter (`kivi.saliency`).
    """

    position: Tensor
    length: Tensor
    packed: Tensor
    units: int
    place: list[Stretch] | tuple[Tensor, Tensor] | None
    before: tuple[int, int] | None = None
    zeros: Tensor | None = None
    whole: int = 0
    weigh: Callable[[Tensor, Tensor | int], Tensor] | None = None


def ring_slots(spec: KVSpec) -> int:
    """W: room for R tokens, a unit that is not yet full, and SLACK new tokens."""
    return spec.residual_length + spec.unit + SLACK


def exact_slots(spec: KVSpec) -> int:
    """E: sinks, the ring, and a bin."""
    return spec.sink_length + ring_slots(spec) + 1


def slots(spec: KVSpec, position: Tensor) -> Tensor:
    """The exact slot of a position; the bin, S + W, for a negative one."""
    sinks, ring = spec.sink_length, ring_slots(spec)
    if sinks:
        slot = torch.where(position < sinks, position, sinks + (position - sinks) % ring)
    else:
        slot = position % ring
    return slot.masked_fill(position < 0, sinks + ring)


def rows(x: Tensor) -> Tensor:
    """The numbers of the rows of x `[B, ...]`, `[B, 1]`."""
    return torch.arange(x.shape[0], device=x.device)[:, None]


def stretches(spec: KVSpec, lengths: list[int], t: int) -> list[Stretch] | None:
    """Where t new tokens of each row go, the last ones if the ring is too small for all.

    None if rows differ in length.
    """
    first, sinks, ring = lengths[0], spec.sink_length, ring_slots(spec)
    if lengths.count(first) != len(lengths):
        return None
    early = min(t, max(0, sinks - first))
    found, column = [(0, first, early)] if early else [], max(early, t - ring)
    while column < t:
        slot = (first + column - sinks) % ring
        found.append((column, sinks + slot, min(t - column, ring - slot)))
        column += found[-1][2]
    return found


def plan(
    held: Held,
    spec: KVSpec,
    t: int,
    valid: Tensor | None,
    units: int,
    counts: Counts | None = None,
) -> Step:
    """The step that stores t columns, those of `valid [B, t]` only; at most `units` units leave.

    `counts` of the rows, if the host knows them and no column is padding.

    A decode step in eager mode launches every operation here on its own: no more than it needs.
    """
    before, packed = held
    if valid is None:
        position = before[:, None]
        if t > 1:
            position = position + torch.arange(t, device=before.device)
        length = before + t
    else:
        position = torch.where(valid, before[:, None] + valid.cumsum(1) - 1, -1)
        length = before + valid.sum(1)
    place: list[Stretch] | tuple[Tensor, Tensor] | None
    place = None if counts is None else stretches(spec, counts[0], t)
    if place is None and t <= SLACK:
        place = rows(position), slots(spec, position)
    if not units:
        return Step(position, length, packed, 0, place)
    same = counts is not None and all(x.count(x[0]) == len(x) for x in counts)
    known = (counts[0][0], counts[1][0]) if counts is not None and same else None
    window = length - packed - (spec.sink_length + spec.residual_length)
    packed = packed + window.clamp_min(0) // spec.unit * spec.unit
    zeros, whole = None, 0
    if known is not None and t > SLACK:
        pages = page_count(known[1] + units * spec.unit) - known[1] // PAGE_TOKENS
        zeros = length.new_zeros(length.shape[0], pages)
        column = spec.sink_length + known[1] - known[0]  # the first one that leaves
        if column >= 0 == known[1] % PAGE_TOKENS and column + pages * PAGE_TOKENS <= t:
            whole = pages
    return Step(position, length, packed, units, place, known, zeros, whole)


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


def traced_step(
    held: Held, spec: KVSpec, t: int, valid: Tensor | None, max_length: int | None
) -> Step:
    """The step that stores t columns, where the host cannot see the counters."""
    step = plan(held, spec, t, valid, (t - 1) // spec.unit + 1)
    if max_length is not None:
        torch._assert_async((step.length <= max_length).all(), "more tokens than max_length")
    return step


def next_step(
    held: Held,
    spec: KVSpec,
    counts: Counts,
    t: int,
    valid: Tensor | None,
    max_length: int | None,
) -> tuple[Step, Counts]:
    """The step that stores t columns, and the counts after it.

    Args:
        held: the counters.
        spec: how it is packed.
        counts: what they hold.
        t: columns.
        valid: `[B, t]`, which columns are not padding; None if none is.
        max_length: of a cache that does not grow.

    Raises:
        ValueError: for a row of more than `max_length` tokens.
    """
    new = [t] * len(counts[0]) if valid is None else valid.sum(1).tolist()
    host, units = plan_on_host(spec, counts, new, max_length)
    return plan(held, spec, t, valid, units, counts if valid is None else None), host


class Steps:
    """What the layers of a growing cache do alike: steps, worked out by the first, and room.

    Every operation costs the host as much as a layer's attention takes. No layer may write to its
    counters or its block table then, only replace them: they are the same tensors in all layers.

    Args:
        remembers: False for a layer of its own.
    """

    def __init__(self, remembers: bool = True) -> None:
        self._remembers = remembers
        self._last: dict[Hashable, tuple[Counts, int, tuple[Step, Counts]]] = {}
        self._table: dict[torch.device, tuple[list[list[int]], Tensor]] = {}
        self._none: dict[Hashable, tuple[Tensor, Tensor]] = {}
        self._kinds: dict[int, tuple[KVSpec, tuple[int, int, int]]] = {}
        self._rooms: list[tuple[KVSpec, int | None, Room]] = []

    def _kind(self, spec: KVSpec) -> tuple[int, int, int]:
        """What a step depends on. A spec that is known stays alive: its id is nobody else's."""
        found = self._kinds.get(id(spec))
        if found is None:
            sizes = spec.sink_length, spec.residual_length, spec.unit
            found = self._kinds[id(spec)] = spec, sizes
        return found[1]

    def room(self, spec: KVSpec, window: int | None) -> Room:
        """Where layers with this spec and this window of queries find buffers."""
        for own, longest, room in self._rooms:
            if (own is spec or own == spec) and longest == window:
                return room
        self._rooms.append((spec, window, Room()))
        return self._rooms[-1][2]

    def none(self, batch_size: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """The block table and the lengths of rows without tokens."""
        kind = batch_size, device
        found = self._none.get(kind)
        if found is None:
            with torch.inference_mode(False):
                lengths = torch.zeros(batch_size, dtype=torch.int64, device=device)
                found = lengths.new_zeros(batch_size, 0), lengths
            self._none = {kind: found} if self._remembers else {}
        return found

    def table(self, padded: list[list[int]], device: torch.device) -> Tensor:
        """What `table_of` says."""
        if not self._remembers:
            return table_of(padded, device)
        last = self._table.get(device)
        if last is None or last[0] != padded:
            last = self._table[device] = padded, table_of(padded, device)
        return last[1]

    def __reduce__(self) -> tuple[type[Steps], tuple[bool]]:
        return Steps, (self._remembers,)

    def next(
        self,
        held: Held,
        spec: KVSpec,
        counts: Counts,
        t: int,
        valid: Tensor | None,
        max_length: int | None,
    ) -> tuple[Step, Counts]:
        """What `next_step` says."""
        if valid is not None or max_length is not None or not self._remembers:
            return next_step(held, spec, counts, t, valid, max_length)
        kind = held[0].device, self._kind(spec)
        last = self._last.get(kind)
        if last is None or last[1] != t or last[0] != counts:
            with torch.inference_mode(False):  # layers keep them
                last = counts, t, next_step(held, spec, counts, t, None, None)
            self._last[kind] = last
        return last[2]


@torch.inference_mode(False)
def copied(x: Tensor) -> Tensor:
    """A copy that outlives inference mode."""
    return x.clone()


def kept(x: Tensor) -> Tensor:
    """A tensor that outlives inference mode, the same one if it does."""
    return copied(x) if x.is_inference() else x


class Lasting:
    """What keeps tensors beyond the mode that they were made in; so do its copies."""

    @torch.inference_mode(False)
    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        new = memo[id(self)] = copy.copy(self)
        state: Any = self.__getstate__()
        new.__dict__.update(copy.deepcopy(state, memo))
        return new


def needed(window: int | None, counts: Counts | None, max_length: int | None) -> int | None:
    """The window of queries, or None where no row reaches out of it: kernels need not look then.

    Args:
        window: the window.
        counts: after the step, None if the host does not know them.
        max_length: the most that a row can hold.
    """
    if window is None:
        return None
    longest = max_length if counts is None else max(counts[0])
    return None if longest is None or longest <= window else window


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
