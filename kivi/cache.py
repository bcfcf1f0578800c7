"""LayerCache: one layer's cache. Sinks, packed pages and an exact window, for ragged batches.

The first S tokens of a row are in sink slots, the most recent (at least R) in a ring of exact ones,
the rest in pages. Counters are device tensors, mirrored on the host in eager mode.
"""

from __future__ import annotations

import copy
from contextlib import nullcontext

import torch
from torch import Tensor

from kivi import checks, saliency, steps, store
from kivi.attention import Impl, Ops, get_ops
from kivi.pages import CacheBytes, PageTable
from kivi.quantize import zeros
from kivi.room import Buffers, Part
from kivi.sinks import before_sinks, with_sinks
from kivi.smoothing import new_smooth
from kivi.spec import KVSpec
from kivi.steps import Counts, Step
from kivi.view import CacheView

_OF_ROWS = ("_exact_key", "_exact_value", "_length", "_packed", "_smooth")
_NOTHING = nullcontext()


class LayerCache(steps.Lasting, Part):
    """One layer's quantized cache.

    Args:
        spec: how keys and values are kept.
        batch_size: B, rows.
        num_kv_heads: Hkv.
        head_dim: D of the keys.
        value_head_dim: D of the values, default the keys'.
        max_length: tokens that a row can hold. With it all buffers are allocated at once and keep
            their addresses; without it the cache grows by pages.
        sliding_window: the longest window that queries will have: what no query can see any more
            is forgotten, a page at a time. None keeps all tokens.
        dtype: of keys, values and queries: float16, bfloat16 or float32.
        device: where the cache lives.
        impl: "auto", "eager", "compile" or "triton".
        check_finite: refuse keys and values with NaN or infinities (reads the device each time).
        alike: what layers that step alike share, if it grows; None for a layer of its own.

    Raises:
        ValueError: for a size, dtype or implementation that is not allowed, or group sizes that do
            not fit the head dimension.
    """

    def __init__(
        self,
        spec: KVSpec,
        batch_size: int,
        num_kv_heads: int,
        head_dim: int,
        value_head_dim: int | None = None,
        *,
        max_length: int | None = None,
        sliding_window: int | None = None,
        dtype: torch.dtype = torch.float16,
        device: torch.device | str = "cpu",
        impl: Impl = "auto",
        check_finite: bool = False,
        alike: steps.Steps | None = None,
    ) -> None:
        head_dims = head_dim, head_dim if value_head_dim is None else value_head_dim
        self.device, self.dtype, self.spec = checks.check_device(device), dtype, spec
        self.steps = steps.Steps(False) if alike is None or max_length is not None else alike
        room = self.steps.room(spec, sliding_window)
        own = (batch_size, num_kv_heads, head_dims, dtype, self.device)

        def ops() -> Ops:
            checks.check_layer(spec, *own[:4], max_length, sliding_window)
            return get_ops(impl, spec, *own[2:])

        self._ops: Ops = ops() if alike is None else room.once((own, max_length, impl), ops)
        self.max_length, self.check_finite, self._captured = max_length, check_finite, False
        self.batch_size, self.num_kv_heads = batch_size, num_kv_heads
        (self.head_dim, self.value_head_dim), self.sliding_window = head_dims, sliding_window
        self._pages = PageTable(spec, *own, max_length, spec.narrow(sliding_window), room)
        self._table, self._length = self.steps.none(batch_size, self.device)
        self._packed = self._length if max_length is None else steps.copied(self._length)

        def make(layers: int) -> Buffers:
            shape = layers * batch_size, num_kv_heads, steps.exact_slots(spec)
            exact = zeros([(*shape, d) for d in head_dims], dtype, self.device)
            return [*exact, new_smooth(spec, *exact)]

        self._exact_key, self._exact_value, self._smooth = room.take("exact", own, make)
        self._host: Counts | None = ([0] * batch_size, [0] * batch_size)
        if max_length is not None:
            self._write_table()

    def lengths(self) -> list[int]:
        """Tokens held by each row (reads the device after compiled steps)."""
        return list(self._mirror()[0])

    def packed_lengths(self) -> list[int]:
        """Packed tokens of each row."""
        return list(self._mirror()[1])

    def nbytes(self) -> CacheBytes:
        """Bytes allocated and in use."""
        lengths, packed = self._mirror()
        of_tokens = (self._exact_key, self._exact_value)
        exact = (sum(lengths) - sum(packed)) * sum(t[0, :, 0].nbytes for t in of_tokens)
        exact += sum(t.nbytes for t in (self._table, self._length, self._packed, self._smooth))
        own = sum({id(x := getattr(self, n)): x.nbytes for n in (*_OF_ROWS, "_table")}.values())
        return CacheBytes(self._pages.pool.nbytes + own, self._pages.used_nbytes(packed) + exact)

    def dequantize(self) -> tuple[Tensor, Tensor]:
        """Dense keys and values `[B, Hkv, max(lengths), D]`, 0 past a row's end or forgotten."""
        lengths, packed = self._mirror()
        return store.dense(self._view(), self.spec, max(lengths), self._pages.forgotten(packed))

    def prefill(self, k: Tensor, v: Tensor, valid: Tensor | None = None) -> None:
        """Store a prompt in an empty cache; attention over it is the caller's, exact.

        Args:
            k: `[B, Hkv, T, D]`, after RoPE.
            v: `[B, Hkv, T, Dv]`.
            valid: `[B, T]` bool; columns that are not valid (padding) are not stored.

        Raises:
            ValueError: for wrong shapes or dtypes, a cache that holds tokens, more tokens than
                `max_length`, or elements that are not finite under `check_finite`.
        """
        if not checks.tracing() and any(n := self.lengths()):
            raise ValueError(f"prefill needs an empty cache, not {n} tokens: append() or reset()")
        self.append(k, v, valid)

    @torch.no_grad()
    def append(self, k: Tensor, v: Tensor, valid: Tensor | None = None) -> None:
        """Store T >= 0 more tokens of each row. Arguments and errors as in `prefill`."""
        traced = self._check(k, v, valid)
        if k.shape[2]:
            step, host = self._step(k.shape[2], valid, traced)
            if k.shape[2] <= steps.SLACK:
                store.write_new(self._view(), k, v, step, self._ops.write_new)
            self._store(self._view(), k, v, step, host)

    def decode(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float | None = None,
        *,
        valid: Tensor | None = None,
        mask: Tensor | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
    ) -> Tensor:
        """Attend over the cache and T new tokens (exact, causal among them), then store these.

        On an empty cache this is exact prefill attention.

        Args:
            q: `[B, Hq, T, D]`, Hq a multiple of Hkv.
            k: `[B, Hkv, T, D]`.
            v: `[B, Hkv, T, Dv]`.
            scale: factor of the scores, default `D ** -0.5`.
            valid: `[B, T]` bool; columns that are not valid (padding) are neither seen nor stored,
                and what their queries return means nothing.
            mask: `[B or 1, 1, T, T]` bool in place of causal order among the new tokens.
            sliding_window: a query sees only so many tokens, itself included; default the layer's.
            softcap: scores become `softcap * tanh(score / softcap)`.
            s_aux: `[Hq]` logits of a virtual key without a value (attention sinks of GPT-OSS).

        Returns:
            `[B, Hq, T, Dv]` in q's dtype.

        Raises:
            ValueError: as `prefill`, for a q that does not fit k, and for a window longer than the
                layer's.
        """
        traced = self._check(k, v, valid)
        window = self.spec.narrow(checks.check_window(sliding_window, self.sliding_window))
        checks.check_query(q, k, mask, softcap, s_aux)
        b, _, t, d = k.shape
        if t == 0:
            return q.new_empty(b, q.shape[1], 0, self.value_head_dim)
        scale = d**-0.5 if scale is None else scale
        # torch.no_grad() takes a while even where it changes nothing.
        with torch.no_grad() if torch.is_grad_enabled() else _NOTHING:
            step, host = self._step(t, valid, traced)
            query = step.position if valid is None else step.position.clamp_min(0)
            options = (steps.needed(window, host, self.max_length), softcap, s_aux)
            query, mask = before_sinks(query, mask, self.spec, options[0])
            fused = t <= steps.SLACK and mask is None
            view = self._view(step.length if fused else None)
            if t <= steps.SLACK:
                store.write_new(view, k, v, step, self._ops.write_new)
            if fused:
                out, lse = self._ops.decode_attention(q, view, self.spec, query, scale, *options)
            else:
                past = view if traced or any(self._mirror()[0]) else None
                given = q, k, v, past, self.spec, query, scale
                out, lse = self._ops.extend_attention(*given, valid, mask, *options)
            step = saliency.weighed(step, self.spec, q, scale) if step.units else step
            self._store(self._view() if fused else view, k, v, step, host)
            if self.spec.window is None:
                return out  # type: ignore[no-any-return]
            return with_sinks(out, lse, q, self._view(), self.spec, query, scale, *options[:2])

    @torch.inference_mode(False)
    def select(self, indices: Tensor | list[int]) -> None:
        """Make row i a continuation of the old row `indices[i]`: reorder, repeat or drop rows.

        Full pages are shared; a page that will still be written is copied where two rows need it.

        Args:
            indices: old rows, at least one, in any order, any of them more than once.

        Raises:
            ValueError: if an index is not a row.
        """
        rows = checks.check_rows(indices, self.batch_size)
        lengths, packed = ([counts[r] for r in rows] for counts in self._mirror())
        index = torch.tensor(rows, device=self.device)
        new = [getattr(self, name).index_select(0, index) for name in _OF_ROWS]
        self._pages.rebuild(self._mirror()[1], rows, packed)
        for name, tensor in zip(_OF_ROWS, new, strict=True):
            if self.max_length is not None and len(rows) == self.batch_size:  # addresses stay
                getattr(self, name).copy_(tensor)
            else:
                setattr(self, name, tensor)
        self.batch_size, self._host = len(rows), (lengths, packed)
        self._write_table()

    @torch.inference_mode(False)
    def fork(self) -> LayerCache:
        """A cache that continues from here on its own; full pages are stored once for both.

        Forking a cache with `max_length`, or giving it more rows, makes room for all of both and so
        may move the pool: capture CUDA graphs after it.
        """
        child, (lengths, packed) = copy.copy(self), map(list, self._mirror())
        for name in (*_OF_ROWS, "_table"):
            setattr(child, name, getattr(self, name).clone())
        child._pages = self._pages.rebuild(packed, list(range(self.batch_size)), packed, fork=True)
        child._host = (lengths, packed)
        child._write_table()
        return child

    def crop(self, tokens: int) -> None:
        """Drop the last tokens of every row.

        What was packed stays quantized: where the cut falls into a packed unit, the rest of that
        unit moves back into the exact window, dequantized.

        Args:
            tokens: how many, 0 to the length of the shortest row.

        Raises:
            ValueError: for a count outside of that, or more than 128 if a sliding window has
                forgotten what the rows would see then.
        """
        (kept, target), unit = self.check_crop(tokens), None
        if target != self._mirror()[1]:
            counts = torch.tensor([target, kept], device=self.device)
            due = counts[0] < self._packed
            unit = store.unpack_unit(self._view(), self.spec, counts[0], counts[1], due)
        self._forget(kept, target)
        if unit is not None:
            store.write_exact(self._view(), self.spec, *unit)

    def check_crop(self, tokens: int) -> Counts:
        """What `crop` raises, and the counts after it; nothing changes."""
        counts, window = self._mirror(), self.spec.narrow(self.sliding_window)
        return steps.cut(self.spec, counts, tokens, window, self._pages.forgotten(counts[1]))

    def reset(self) -> None:
        """Forget all tokens; buffers and, with `max_length`, addresses stay."""
        self._forget([0] * self.batch_size, [0] * self.batch_size)

    def _forget(self, lengths: list[int], packed: list[int]) -> None:
        """Set the counters to what is kept; pages still to be written become the rows' own."""
        self._pages.rebuild(self._mirror()[1], list(range(self.batch_size)), packed)
        self._count(*(torch.tensor(counts, device=self.device) for counts in (lengths, packed)))
        self._host = (list(lengths), list(packed))
        self._write_table()

    def _count(self, length: Tensor, packed: Tensor | None) -> None:
        """Set the counters. Those of a growing cache are replaced: layers share them (`Steps`)."""
        if self.max_length is None:
            self._length = steps.kept(length)
            self._packed = self._packed if packed is None else steps.kept(packed)
            return
        self._length.copy_(length)
        if packed is not None:
            self._packed.copy_(packed)

    def _mirror(self) -> Counts:
        """Lengths and packed lengths on the host; from the device after steps it did not see."""
        if self._host is None or self._captured:
            lengths, packed = torch.stack([self._length, self._packed]).tolist()
            self._host = (lengths, packed)
        return self._host

    def _view(self, length: Tensor | None = None) -> CacheView:
        exact = (self._exact_key, self._exact_value, self._length if length is None else length)
        return CacheView(*self._pages.pool.pages(), self._table, self._packed, *exact, self._smooth)

    def _write_table(self) -> None:
        """Write the block table; with a max_length, tell torch.compile that tensors stay put."""
        table = self.steps.table(self._pages.padded(), self.device)
        if self.max_length is not None and table.shape == self._table.shape:
            self._table.copy_(table)
        else:
            self._table = table if self.max_length is None else steps.copied(table)
        for tensor in self._view().tensors() if self.max_length is not None else ():
            torch._dynamo.mark_static_address(tensor)

    def _check(self, k: Tensor, v: Tensor, valid: Tensor | None) -> bool:
        """Refuses what does not fit; whether the call is traced."""
        like, static = (self._exact_key, self._exact_value), self.max_length is not None
        return checks.check_new_tokens(k, v, valid, like, static, self.check_finite)

    def _step(self, t: int, valid: Tensor | None, traced: bool) -> tuple[Step, Counts | None]:
        """What storing t columns will do, with pages reserved; refuses what does not fit."""
        held = self._length, self._packed
        if traced:
            return steps.traced_step(held, self.spec, t, valid, self.max_length), None
        if self._pages.rounds:  # a step that failed may have overwritten what is still seen
            self.check_crop(0)
        step, host = self.steps.next(held, self.spec, self._mirror(), t, valid, self.max_length)
        if step.units and self._pages.reserve(host[1]):
            self._write_table()
        return step, host

    def _store(
        self, view: CacheView, k: Tensor, v: Tensor, step: Step, host: Counts | None
    ) -> None:
        """Store the columns; the counters, which make them count, change last."""
        if host is not None and self._pages.rounds:  # should packing fail, this much is gone
            self._pages.lost = self._pages.forgotten(host[1])
        if step.units or k.shape[2] > steps.SLACK:
            ring = self._pages.ring if self._pages.rounds else None
            ops = self._ops.quantize_pack, ring, self._ops.write_new, self._ops.store_pages
            store.store(view, self.spec, k, v, step, *ops)
        self._count(step.length, step.packed if step.units else None)
        self._host = host
        if host is None and not torch.compiler.is_compiling():
            self._captured = True  # replays of a CUDA graph pass the host by
