"""Any order of calls on caches that fork and share pages, against plain lists of tokens."""

import gc
from typing import NamedTuple

import numpy as np
import pytest
import torch
from cache_checks import held_tensors, randn, references_are_right, same, state
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
)
from one_thread import one_thread  # noqa: F401
from oracle_kivi import allowed_keys, array, attention

from kivi import KVSpec, LayerCache, QuantSpec
from kivi.quantize import dequantize, quantize

HEADS, D, DV = 1, 16, 32
SPECS = [
    KVSpec(QuantSpec(2, "channel", 32), QuantSpec(2, "token", 32), 32, 3),
    KVSpec(None, None, 8, 0),
    KVSpec(QuantSpec(3, "token", 16), QuantSpec(1, "channel", 64), 0, 2),
    KVSpec(
        QuantSpec(8, "channel", 128, "least_squares"), QuantSpec(4, "token", 16, "symmetric"), 20
    ),
    KVSpec(QuantSpec(4, "channel", None), None, 5, 1),
]
FEW = st.one_of(st.sampled_from([1, 2, 31, 32, 33, 64]), st.integers(1, 70))
MANY = st.one_of(FEW, st.sampled_from([480, 512, 513, 600]))
SEED = st.integers(0, 2**20)
PADDING = st.sampled_from(["none", "left", "right", "holes"])


class Row(NamedTuple):
    """A row of the model: its tokens `[H, D]` as the cache must hold them, sinks first.

    `lost`: packed tokens at the start that a sliding window has forgotten.
    """

    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    packed: int
    lost: int = 0

    def copy(self) -> "Row":
        return Row(list(self.keys), list(self.values), self.packed, self.lost)

    def flushed(self, spec: KVSpec, ring: int | None) -> "Row":
        """The row after all units that are due have left the window."""
        start = spec.sink_length + self.packed
        count = max(0, len(self.keys) - start - spec.residual_length) // spec.unit * spec.unit
        for held, one in ((self.keys, spec.key), (self.values, spec.value)):
            if count:
                unit = torch.stack(held[start : start + count], 1)[None]
                held[start : start + count] = dequantize(quantize(unit, one))[0].unbind(1)
        packed = self.packed + count
        lost = 0 if ring is None else (-(-packed // 512) - ring) * 512
        return self._replace(packed=packed, lost=max(self.lost, lost))

    def cropped(self, spec: KVSpec, count: int) -> "Row":
        kept = len(self.keys) - count
        whole = max(0, kept - spec.sink_length) // spec.unit * spec.unit
        return Row(self.keys[:kept], self.values[:kept], min(self.packed, whole), self.lost)

    def sees_all(self, spec: KVSpec, window: int | None) -> bool:
        """Whether nothing is lost that the next query would see."""
        first = len(self.keys) - (window or 0) + 1 - spec.sink_length
        return self.lost <= max(0, min(first, self.packed))


class Pair:
    """A cache and its model."""

    def __init__(self, cache: LayerCache, rows: list[Row]) -> None:
        self.cache, self.rows = cache, rows


class CacheMachine(RuleBasedStateMachine):
    """Prefill, append, decode, crop, select, fork, reset, drop and refused calls."""

    pairs = Bundle("pairs")

    def __init__(self) -> None:
        super().__init__()
        self.live: list[Pair] = []

    @initialize(
        target=pairs,
        spec=st.sampled_from(SPECS),
        batch=st.integers(1, 3),
        max_length=st.sampled_from([None, 1300]),
        dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
        keeps=st.sampled_from([None, 1, 40, 300]),
        held=st.sampled_from([0, 0, 1000, 1200]),
    )
    def start(self, spec, batch, max_length, dtype, keeps, held):
        self.spec, self.max_length, self.dtype, self.keeps = spec, max_length, dtype, keeps
        # Pages for a window, 128 tokens that may be cropped, and a page that begins anywhere.
        reach = (keeps or 0) - 1 + 128 - spec.residual_length
        self.ring = None if keeps is None else 1 + -(-max(0, reach - 1) // 512)
        cache = LayerCache(
            spec, batch, HEADS, D, DV, max_length=max_length, sliding_window=keeps, dtype=dtype
        )
        self.live.append(Pair(cache, [Row([], [], 0) for _ in range(batch)]))
        if held:
            self.append(self.live[0], held, 0, "none")
        return self.live[0]

    # -------------------------------------------------------------- columns

    def columns(self, pair: Pair, t: int, seed: int, padding: str):
        """T columns and which of them are tokens; padding is NaN. None where they do not fit."""
        b = len(pair.rows)
        k = randn(b, HEADS, t, D, dtype=self.dtype, seed=seed)
        v = randn(b, HEADS, t, DV, dtype=self.dtype, seed=seed + 1)
        count = torch.tensor([t - (seed + row) % (t + 1) // 2 for row in range(b)])[:, None]
        index = torch.arange(t)
        valid = {
            "none": torch.ones(b, t, dtype=torch.bool),
            "left": index >= t - count,
            "right": index < count,
            "holes": (index + count) % 3 > 0,
        }[padding]
        if self.max_length is not None:
            longest = max(
                len(r.keys) + int(n) for r, n in zip(pair.rows, valid.sum(1), strict=True)
            )
            if longest > self.max_length:
                return None
        k, v = (torch.where(valid[:, None, :, None], x, torch.nan) for x in (k, v))
        return k, v, valid, None if padding == "none" else valid

    def store(self, pair: Pair, k, v, valid) -> None:
        for i, row in enumerate(pair.rows):
            for column in valid[i].nonzero().flatten().tolist():
                row.keys.append(k[i, :, column])
                row.values.append(v[i, :, column])
            pair.rows[i] = row.flushed(self.spec, self.ring)

    # -------------------------------------------------------------- rules

    @rule(pair=pairs, t=MANY, seed=SEED, padding=PADDING)
    def append_some(self, pair, t, seed, padding):
        self.append(pair, t, seed, padding)

    def append(self, pair, t, seed, padding):
        columns = self.columns(pair, t, seed, padding)
        if columns is None:
            return
        k, v, valid, given = columns
        empty = not any(row.keys for row in pair.rows)
        (pair.cache.prefill if empty else pair.cache.append)(k, v, given)
        self.store(pair, k, v, valid)

    @rule(
        pair=pairs,
        t=FEW,
        seed=SEED,
        padding=PADDING,
        window=st.sampled_from([None, None, 1, 40, 500]),
        own=st.booleans(),
    )
    def decode(self, pair, t, seed, padding, window, own):
        columns = self.columns(pair, t, seed, padding)
        if columns is None:
            return
        k, v, valid, given = columns
        b = len(pair.rows)
        q = randn(b, 2 * HEADS, t, D, dtype=self.dtype, seed=seed + 2)
        mask = None
        if own:
            random = torch.rand(b, 1, t, t, generator=torch.Generator().manual_seed(seed)) < 0.5
            mask = random | torch.eye(t, dtype=torch.bool)
        if self.keeps is not None and window is not None:
            window = min(window, self.keeps)
        out = pair.cache.decode(q, k, v, valid=given, mask=mask, sliding_window=window)
        eps = torch.finfo(self.dtype).eps
        for i, row in enumerate(pair.rows):
            seen = valid[i].numpy()
            allowed = allowed_keys(
                len(row.keys),
                seen,
                window or self.keeps,
                None if mask is None else mask[i, 0].numpy(),
            )
            both = [
                np.concatenate([array(torch.stack(held, 1)), array(x[i])], 1)
                if held
                else array(x[i])
                for held, x in ((row.keys, k), (row.values, v))
            ]
            expected = attention(array(q[i]), *both, allowed, D**-0.5)[:, seen]
            assert np.allclose(array(out[i])[:, seen], expected, rtol=eps, atol=max(eps, 1e-5) / 2)
        self.store(pair, k, v, valid)

    @rule(pair=pairs, share=st.floats(0, 1), few=st.booleans())
    def crop(self, pair, share, few):
        shortest = min(len(row.keys) for row in pair.rows)
        count = int(share * (min(shortest, 70) if few else shortest))
        rows = [row.cropped(self.spec, count) for row in pair.rows]
        if all(row.sees_all(self.spec, self.keeps) for row in rows):
            pair.cache.crop(count)
            pair.rows = rows
        else:
            before = state(pair.cache)
            with pytest.raises(ValueError, match=f"sliding_window={self.keeps} has forgotten"):
                pair.cache.crop(count)
            assert state(pair.cache) == before

    @rule(pair=pairs, data=st.data())
    def select(self, pair, data):
        b = len(pair.rows)
        same_size = st.lists(st.integers(0, b - 1), min_size=b, max_size=b)
        indices = data.draw(
            st.one_of(same_size, st.lists(st.integers(0, b - 1), min_size=1, max_size=4))
        )
        pair.cache.select(indices)
        pair.rows = [pair.rows[i].copy() for i in indices]

    @precondition(lambda self: len(self.live) < 4)
    @rule(target=pairs, pair=pairs)
    def fork(self, pair):
        self.live.append(Pair(pair.cache.fork(), [row.copy() for row in pair.rows]))
        return self.live[-1]

    @precondition(lambda self: len(self.live) > 1)
    @rule(target=pairs, pair=consumes(pairs))
    def drop(self, pair):
        """Delete a fork, or what was forked: its pages go to whoever needs some."""
        self.live.remove(pair)
        del pair.cache
        gc.collect()
        return multiple()

    @rule(pair=pairs)
    def reset(self, pair):
        pair.cache.reset()
        pair.rows = [Row([], [], 0) for _ in pair.rows]

    @rule(
        pair=pairs, which=st.sampled_from(["k", "valid", "q", "crop", "select", "long", "prefill"])
    )
    def refused(self, pair, which):
        cache, b = pair.cache, len(pair.rows)
        k, v = randn(b, HEADS, 2, D, dtype=self.dtype), randn(b, HEADS, 2, DV, dtype=self.dtype)
        before = state(cache)
        with pytest.raises(ValueError):
            if which == "k":
                cache.append(k[..., :8], v)
            elif which == "valid":
                cache.append(k, v, torch.ones(b, 3, dtype=torch.bool))
            elif which == "q":
                cache.decode(k[:, :, :1], k, v)
            elif which == "crop":
                cache.crop(1 + min(len(row.keys) for row in pair.rows))
            elif which == "select":
                cache.select([b])
            elif which == "long" and self.max_length is not None:
                cache.append(k.repeat(1, 1, 700, 1), v.repeat(1, 1, 700, 1))
            elif which == "prefill" and any(row.keys for row in pair.rows):
                cache.prefill(k, v)
            else:
                raise ValueError
        assert state(cache) == before

    # -------------------------------------------------------------- what always holds

    @invariant()
    def caches_hold_what_the_models_hold(self):
        for pair in self.live:
            lengths = [len(row.keys) for row in pair.rows]
            assert pair.cache.lengths() == lengths
            assert pair.cache.packed_lengths() == [row.packed for row in pair.rows]
            k, v = pair.cache.dequantize()
            for i, row in enumerate(pair.rows):
                for dense, held in ((k, row.keys), (v, row.values)):
                    assert dense.shape[2] == max(lengths)
                    assert not dense[i, :, lengths[i] :].any()
                    if held:
                        expected = torch.stack(held, 1)
                        expected[:, self.spec.sink_length :][:, : row.lost] = 0
                        assert same(dense[i, :, : lengths[i]], expected)

    @invariant()
    def pages_are_counted(self):
        if self.live:
            assert references_are_right(*(pair.cache for pair in self.live))

    @invariant()
    def a_page_that_will_be_written_belongs_to_one_row(self):
        for pair in self.live:
            for row, pages in zip(pair.rows, pair.cache._pages.rows, strict=True):
                full = row.packed // 512
                if self.ring is not None:  # pages come round, in a static cache unseen by the host
                    assert len(pages) <= self.ring
                    static = self.max_length is not None and self.ring < 3
                    slot = slice(full % self.ring, full % self.ring + (row.packed % 512 > 0))
                    pages = pages if static else pages[slot]
                    full = 0
                assert all(pair.cache._pages.pool.references[p] == 1 for p in pages[full:])

    @invariant()
    def bytes_are_those_held(self):
        for pair in self.live:
            said = pair.cache.nbytes()
            assert said.used <= said.allocated == sum(held_tensors(pair.cache).values())


TestCacheMachine = CacheMachine.TestCase
TestCacheMachine.settings = settings(settings(), max_examples=40, stateful_step_count=20)
