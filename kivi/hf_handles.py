"""Handles: what a model gets in place of keys and values, and the layer behind them. Torch only.

A `CachedStates` is a tensor subclass with a layer's true shape and no memory. Attention that knows
it runs over the packed pages; any other use of it dequantizes, so that every model stays correct.
transformers counts columns, padding included, while a LayerCache counts the tokens of each row:
`Columns` stands between the two.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C import _is_any_autocast_enabled
from torch.utils._pytree import tree_map

from kivi.cache import LayerCache
from kivi.checks import tracing
from kivi.hf_causal import METADATA, CausalMask
from kivi.hf_masks import Shared, stand_in
from kivi.steps import Lasting

_NOTHING = nullcontext()


def _as(x: Tensor, dtype: torch.dtype) -> Tensor:
    """In a dtype. Asking torch to do nothing takes a while."""
    return x if x.dtype == dtype else x.to(dtype)


class Columns(Lasting):
    """A LayerCache as transformers sees it: in columns, padding included.

    Args:
        cache: the layer's tokens.
        window: the layer's attention window, None for full attention.
        shared: of all layers of a cache.
    """

    def __init__(self, cache: LayerCache, window: int | None, shared: Shared) -> None:
        self.cache, self.window, self.shared = cache, window, shared
        cache.steps = shared.steps
        self.seen: int | Tensor = 0
        if cache.max_length is not None:
            with torch.inference_mode(False):  # it counts on after that mode
                self.seen = torch.zeros((), dtype=torch.int64, device=cache.device)
            if not tracing():
                torch._dynamo.mark_static_address(self.seen)
        # First column and `valid [B, T]` of the forwards that held padding.
        self.padding: list[tuple[int, Tensor]] = []
        self.packed_calls = self.dense_calls = 0

    def handles(self, k: Tensor, v: Tensor) -> tuple[CachedStates, CachedStates]:
        """Handles of all keys and values, the new ones `[B, Hkv, T, D]` included.

        Raises:
            ValueError: for another number of rows than the cache has.
        """
        if k.shape[0] != self.cache.batch_size:
            raise ValueError(
                f"input of {k.shape[0]} rows is not allowed; this cache has {self.cache.batch_size}"
            )
        traced, dtype = tracing(), self.cache.dtype
        update = Update(self, _as(k, dtype), _as(v, dtype), traced)
        b, heads, t, d = k.shape
        shape = b, heads, self.total(t), d, v.shape[3]
        key, value = (stand_in if traced else self.shared.stand_in)(shape, dtype, k.device)
        return CachedStates.of(update, key, False), CachedStates.of(update, value, True)

    def total(self, t: int) -> int:
        """Columns that a mask has for t new ones."""
        return int(self.seen) + t if self.cache.max_length is None else self.cache.max_length

    def advance(self, t: int, padding: tuple[int, Tensor] | None = None) -> None:
        """Count t new columns, some of which may have been padding."""
        if padding is not None:
            self.padding.append(padding)
        if isinstance(self.seen, Tensor):
            self.seen.add_(t)
        else:
            self.seen += t

    def dense(self, update: Update) -> tuple[Tensor, Tensor]:
        """All keys and values `[B, Hkv, N, D]` in their columns; those of `update` are exact.

        What the layer's window has forgotten is 0: no mask of such a layer shows it.

        Raises:
            ValueError: for more columns than `max_length`, or if the scheme has dropped tokens.
        """
        t, spec = update.k.shape[2], self.cache.spec
        longest = max(self.cache.lengths()) + t * (not update.stored)
        own = spec.window if spec.window == spec.narrow(self.window) else None
        if own is not None and longest > spec.sink_length + own:
            raise ValueError(f"window={own} has dropped tokens; this model needs all of them dense")
        before = int(self.seen) - t * update.stored
        total = self.total(0 if update.stored else t)
        if before + t > total:
            raise ValueError(f"max_length={total} is too small for {before} columns and {t} more")
        row = torch.arange(update.k.shape[0], device=update.k.device)[:, None]
        held = row.new_ones(len(row), before, dtype=torch.bool)
        for first, valid in self.padding:
            held[:, first : first + valid.shape[1]] = valid[:, : max(0, before - first)]
        token = (held.cumsum(1) - 1).clamp_min(0)
        both = []
        for past, new in zip(self.cache.dequantize(), (update.k, update.v), strict=True):
            dense = new.new_zeros(*new.shape[:2], total, new.shape[3])
            if past.shape[2]:
                tokens = past[row, :, token].transpose(1, 2)
                dense[:, :, :before] = torch.where(held[:, None, :, None], tokens, 0)
            dense[:, :, before : before + t] = new
            both.append(dense)
        return both[0], both[1]

    def check_crop(self, columns: int) -> None:
        """Raise a ValueError where `crop` would."""
        kept = int(self.seen) - columns
        if not all(bool(v[:, max(0, kept - first) :].all()) for first, v in self.padding):
            raise ValueError(f"the last {columns} columns hold padding, which cannot be cropped")
        self.cache.check_crop(columns)

    def crop(self, columns: int) -> None:
        """Drop the last columns, which `check_crop` allows. What was packed stays quantized."""
        kept = int(self.seen) - columns
        self.cache.crop(columns)
        self.advance(-columns)
        self.padding = [(first, v[:, : kept - first]) for first, v in self.padding if first < kept]

    def select(self, rows: list[int]) -> None:
        """Continue the rows `rows`; full pages are shared."""
        self.cache.select(rows)
        self.padding = [(first, valid[rows]) for first, valid in self.padding]

    def fork(self, shared: Shared) -> Columns:
        """Columns that go on from here on their own; full pages are shared."""
        forked = Columns(self.cache.fork(), self.window, shared)
        forked.advance(int(self.seen))
        forked.padding = list(self.padding)
        return forked

    def reset(self) -> None:
        """Forget all tokens; memory and addresses stay."""
        self.cache.reset()
        self.seen = self.seen.zero_() if isinstance(self.seen, Tensor) else 0
        self.padding = []


class Update:
    """New keys and values on their way into a layer: stored by the first attention over them.

    Args:
        columns: the layer.
        k: `[B, Hkv, T, D]`.
        v: `[B, Hkv, T, Dv]`.
        traced: whether it was made in what becomes a graph; eager steps need not ask again.
    """

    def __init__(self, columns: Columns, k: Tensor, v: Tensor, traced: bool) -> None:
        self.columns, self.k, self.v, self.traced = columns, k, v, traced
        self.stored = False
        self._dense: tuple[Tensor, Tensor] | None = None

    def attend(
        self,
        q: Tensor,
        mask: Tensor | None,
        scale: float | None,
        *,
        causal: bool = True,
        window: int | None = None,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
    ) -> Tensor | None:
        """Attend over the packed layer and store the new tokens.

        Args:
            q: `[B, Hq, T, D]`.
            mask: what each query sees of the columns, `[B or 1, 1, T, N]` bool. Without one a
                single query sees all, and several see as `causal` says.
            scale: factor of the scores, default `D ** -0.5`.
            causal: whether queries see only what is before them, where there is no mask.
            window: a query sees only so many tokens; default the layer's.
            softcap: see `kivi.cache.LayerCache.decode`.
            s_aux: see `kivi.cache.LayerCache.decode`.

        Returns:
            `[B, Hq, T, Dv]`, or None where only dense tensors will do; then nothing is stored.

        Raises:
            ValueError: for more columns than `max_length`, and as `LayerCache.decode`.
        """
        columns, t = self.columns, self.k.shape[2]
        if self.stored or q.shape[2] != t or (mask is None and t > 1 and not causal):
            return None
        window = columns.window if window is None else window
        # Columns of padding are not tokens, and the mask shows them if nothing says what they are.
        mask = CausalMask.made(mask) if columns.padding else mask
        mask = None if isinstance(mask, CausalMask) else mask
        reading = columns.shared.read(mask, columns.cache, columns.seen, t, window)
        if reading is None:
            return None
        kind = q.device.type
        autocast = _is_any_autocast_enabled() and torch.is_autocast_enabled(kind)
        with torch.autocast(kind, enabled=False) if autocast else _NOTHING:
            out = columns.cache.decode(
                _as(q, self.k.dtype),
                self.k,
                self.v,
                scale,
                valid=reading.valid,
                mask=reading.block,
                sliding_window=window,
                softcap=softcap,
                s_aux=s_aux,
            )
        out = _as(out, q.dtype)
        self.stored = True
        if self.traced and tracing():  # else a graph that broke off in between
            columns.advance(t)
            return out
        columns.advance(t, None if reading.valid is None else (int(reading.before), reading.valid))
        columns.packed_calls += 1
        if torch.is_grad_enabled() and q.requires_grad:
            out = _NoGradient.apply(out, q)  # type: ignore[no-untyped-call]
        return out

    def materialize(self, user: str) -> tuple[Tensor, Tensor]:
        """Dense keys and values `[B, Hkv, N, D]`; stores the new tokens, as there is no mask: all.

        Args:
            user: what needs them, for the warning.

        Raises:
            ValueError: in a compiled step, where nobody knows how many tokens there are.
        """
        if tracing():
            raise ValueError(
                "this model needs dense keys and values, which a compiled step cannot give: "
                "generate with disable_compile=True or make the cache without max_length"
            )
        if self._dense is None:
            columns = self.columns
            self._dense = columns.dense(self)
            if not self.stored:
                columns.cache.append(self.k, self.v)
                self.stored = True
                columns.advance(self.k.shape[2])
            columns.dense_calls += 1
            if not columns.shared.warned:
                columns.shared.warned = True
                warnings.warn(
                    f"{user} needs dense keys and values: its layers are dequantized at every step "
                    "(see KVCache.dense_calls)",
                    stacklevel=3,
                )
        return self._dense


class _NoGradient(torch.autograd.Function):
    """Makes a backward pass through packed attention fail, where it would be silently wrong."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, q: Tensor) -> Tensor:
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise RuntimeError(
            "attention over a quantized cache has no gradient; train without a cache"
        )


class CachedStates(torch.Tensor):
    """Handle for a layer's keys or values: true shape, dtype and device, no memory."""

    update: Update
    is_value: bool

    @classmethod
    def of(cls, update: Update, shape: Tensor, is_value: bool) -> CachedStates:
        """The handle of an update, in the shape of a tensor without memory of its own."""
        handle = shape.as_subclass(cls)
        handle.update, handle.is_value = update, is_value
        return handle

    @staticmethod
    def common(key: Tensor, value: Tensor) -> Update | None:
        """The update whose keys and values both are handles of, if they are."""
        if isinstance(key, CachedStates) and isinstance(value, CachedStates):
            return key.update if key.update is value.update else None
        return None

    @staticmethod
    def dense(x: Any, user: str) -> Any:
        """The tensor that a handle stands for; anything else as it is."""
        return x.update.materialize(user)[x.is_value] if isinstance(x, CachedStates) else x

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Metadata as it is, attention over the pages, anything else over dequantized tensors."""
        kwargs = kwargs or {}
        # Compiled code cannot compare the getters of properties.
        if func in METADATA or (tracing() and getattr(func, "__name__", "") == "__get__"):
            return super().__torch_function__(func, types, args, kwargs)  # type: ignore[no-untyped-call]
        if func is F.scaled_dot_product_attention:
            out = _attend(*args, **kwargs)
            if out is not None:
                return out
        user = getattr(func, "__name__", str(func))
        dense_args, dense_kwargs = tree_map(lambda x: cls.dense(x, user), (args, kwargs))
        return func(*dense_args, **dense_kwargs)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor | None:
    """`F.scaled_dot_product_attention` on handles; None where only dense tensors will do."""
    update = CachedStates.common(key, value)
    # What torch calls causal starts at the first column, not at the first new one.
    if update is None or dropout_p or (is_causal and not tracing() and update.columns.seen):
        return None
    return update.attend(query, attn_mask, scale, causal=is_causal)
