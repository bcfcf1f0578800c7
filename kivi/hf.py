"""transformers: a Cache whose layers are packed, and the attention that reads them.

`KVCache.update` hands the model a handle in place of dense keys and values: a tensor subclass with
the true shape and no memory. The attention function registered here under the name "kivi" knows the
handle and attends over the packed pages. `F.scaled_dot_product_attention` called on a handle does
the same; any other use of it dequantizes, so that every model stays correct. Padding is taken from
the attention mask and never stored.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map
from transformers import AttentionInterface, DynamicCache, PreTrainedModel, StaticCache
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from kivi.attention import Impl, get_ops
from kivi.cache import CacheBytes, LayerCache
from kivi.kernels.reference import merge, partial_attention
from kivi.quantizer import KVQuantizer
from kivi.spec import KVSpec, check_count

ATTENTION = "kivi"
"""Name under which the attention and mask functions are registered."""

Schemes = str | KVQuantizer | Sequence[KVQuantizer] | Mapping[int | str, KVQuantizer]

_METADATA = {
    getattr(Tensor, name).__get__
    for name in (
        "shape",
        "dtype",
        "device",
        "ndim",
        "is_cuda",
        "requires_grad",
        "layout",
        "is_meta",
    )
} | {Tensor.size, Tensor.dim, Tensor.numel, Tensor.__len__, Tensor.__hash__}


class _Update:
    """New keys and values on their way into a layer: stored by the first attention over them."""

    def __init__(self, layer: PackedLayer, k: Tensor, v: Tensor) -> None:
        self.layer, self.k, self.v = layer, k, v
        self.before = layer.seen
        self.stored = False
        self.dense: tuple[Tensor, Tensor] | None = None

    def attend(
        self,
        q: Tensor,
        attention_mask: Tensor | None,
        scale: float | None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
    ) -> Tensor:
        """Attention `[B, Hq, T, Dv]` over the packed layer; stores the new tokens."""
        layer = self.layer
        valid, block = layer.masks.split(attention_mask, self.before, self.k)
        self.stored = True
        if not torch.compiler.is_compiling():
            layer.packed_calls += 1
        return layer.cache.decode(
            q,
            self.k,
            self.v,
            scale,
            valid=valid,
            mask=block,
            sliding_window=layer.sliding_window if sliding_window is None else sliding_window,
            softcap=softcap,
            s_aux=s_aux,
        )

    def materialize(self) -> tuple[Tensor, Tensor]:
        """Dense keys and values in the columns that the model's masks speak of."""
        if self.dense is None:
            self.layer.warn_dense()
            k, v = self.layer.columns(self.before, self.k, self.v, self.stored)
            if not self.stored:
                self.layer.cache.append(self.k, self.v)
                self.stored = True
            self.dense = k, v
        return self.dense


class CachedStates(torch.Tensor):
    """Handle for a layer's keys or values: true shape, dtype and device, no memory."""

    update: _Update
    is_value: bool

    @classmethod
    def of(cls, update: _Update, columns: int, is_value: bool) -> CachedStates:
        """The handle of an update over so many columns."""
        new = update.v if is_value else update.k
        shape = (*new.shape[:2], columns, new.shape[3])
        handle = new.new_zeros(()).expand(shape).as_subclass(cls)
        handle.update, handle.is_value = update, is_value
        return handle

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
        if func in _METADATA or getattr(func, "__name__", "") in ("__get__", "__set__"):
            return super().__torch_function__(func, types, args, kwargs)
        if func is F.scaled_dot_product_attention:
            out = _intercept(*args, **kwargs)
            if out is not None:
                return out

        def dense(x: Any) -> Any:
            return x.update.materialize()[x.is_value] if isinstance(x, cls) else x

        return func(*tree_map(dense, args), **tree_map(dense, kwargs))


def _intercept(
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
    t = query.shape[2]
    if not (isinstance(key, CachedStates) and isinstance(value, CachedStates)):
        return None
    bias = attn_mask is not None and attn_mask.dtype != torch.bool
    bidirectional = attn_mask is None and t > 1 and not is_causal
    if key.update.stored or bias or bidirectional or dropout_p or t != key.update.k.shape[2]:
        return None
    return key.update.attend(query, attn_mask, scale)


class _Masks:
    """Splits the masks of transformers; shared by the layers of a cache, which get the same ones."""

    def __init__(self) -> None:
        # The last few masks and their parts: full and sliding layers alternate.
        self.known: list[tuple[Tensor, Tensor | None, Tensor | None]] = []

    def split(
        self, mask: Tensor | None, before: int | Tensor, new: Tensor
    ) -> tuple[Tensor | None, Tensor | None]:
        """Which new tokens are valid `[B, T]`, and what they see of each other `[B, 1, T, T]`.

        Both are None where a plain causal call does.
        """
        if mask is None:
            return None, None
        for known, valid, block in self.known:
            if known is mask:
                return valid, block
        b, t = new.shape[0], new.shape[2]
        column = torch.arange(t, device=mask.device) + before
        block = mask.index_select(-1, column).expand(b, -1, -1, -1)
        valid = block.diagonal(dim1=-2, dim2=-1)[:, 0]
        block = block if t > 1 else None
        if not torch.compiler.is_compiling():
            # One look at the device for each forward, not for each layer.
            valid = None if bool(valid.all()) else valid
            self.known = [*self.known[-3:], (mask, valid, block)]
        return valid, block


class PackedLayer(CacheLayerMixin):  # type: ignore[misc]
    """One layer of a `KVCache`; its LayerCache is made from the first keys and values.

    Args:
        spec: how the layer is packed.
        sliding_window: the layer's attention window, None for full attention.
        max_length: static size, or None.
        impl: see `kivi.cache.LayerCache`.
        check_finite: see `kivi.cache.LayerCache`.
        masks: shared by the layers of a cache.
    """

    is_croppable = True
    is_sliding = False  # all tokens are kept; the window is the attention's matter

    def __init__(
        self,
        spec: KVSpec,
        sliding_window: int | None,
        max_length: int | None,
        impl: Impl,
        check_finite: bool,
        masks: _Masks,
    ) -> None:
        super().__init__()
        get_ops(impl, spec)  # refuses before anything is allocated
        self.spec, self.sliding_window, self.max_length = spec, sliding_window, max_length
        self.impl, self.check_finite, self.masks = impl, check_finite, masks
        self.is_compileable = max_length is not None
        self.packed_calls = self.dense_calls = 0
        # Columns seen, padding included, as transformers counts them.
        self.seen: int | Tensor = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate for tensors like these `[B, Hkv, T, D]`."""
        b, h, _, d = key_states.shape
        self.cache = LayerCache(
            self.spec,
            b,
            h,
            d,
            value_states.shape[3],
            max_length=self.max_length,
            dtype=key_states.dtype,
            device=key_states.device,
            impl=self.impl,
            check_finite=self.check_finite,
        )
        if self.max_length is not None:
            self.seen = torch.zeros((), dtype=torch.int64, device=key_states.device)
            if not torch.compiler.is_compiling():
                torch._dynamo.mark_static_address(self.seen)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
        """Take new keys and values `[B, Hkv, T, D]`; returns handles of all of them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        update, t = _Update(self, key_states, value_states), key_states.shape[2]
        if isinstance(self.seen, Tensor):
            update.before = self.seen.clone()
            self.seen.add_(t)
        else:
            self.seen += t
        columns = self.get_mask_sizes(0)[0]
        return CachedStates.of(update, columns, False), CachedStates.of(update, columns, True)

    def warn_dense(self) -> None:
        """Count a call that dequantized, and say so the first time."""
        if not torch.compiler.is_compiling():
            self.dense_calls += 1
            warnings.warn(
                "this model's attention uses the cache without AttentionInterface or "
                "scaled_dot_product_attention; its layers are dequantized at every step",
                stacklevel=2,
            )

    def columns(
        self, before: int | Tensor, k: Tensor, v: Tensor, stored: bool
    ) -> tuple[Tensor, Tensor]:
        """All keys and values where transformers expects them: rows end at the last column."""
        past = self.cache.dequantize()
        lengths = torch.tensor(self.cache.lengths(), device=k.device)
        end = int(before) + (k.shape[2] if stored else 0)
        column = torch.arange(self.get_mask_sizes(0)[0], device=k.device)
        token = column[None, :] - (end - lengths)[:, None]
        inside = (token >= 0) & (column < end)
        row = torch.arange(k.shape[0], device=k.device)[:, None]
        out = []
        for x, new in zip(past, (k, v), strict=True):
            x = F.pad(x, (0, 0, 0, 1))  # so that there is something to take
            dense = x[row, :, token.clamp(0, x.shape[2] - 1)].transpose(1, 2)
            dense = torch.where(inside[:, None, :, None], dense, 0)
            if not stored:
                dense[:, :, end : end + new.shape[2]] = new
            out.append(dense)
        return out[0], out[1]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns and offset of the masks."""
        if self.max_length is not None:
            return self.max_length, 0
        return int(self.seen) + query_length, 0

    def get_seq_length(self) -> int | Tensor:  # type: ignore[override]
        """Columns seen; a tensor if static, as transformers' StaticLayer."""
        return self.seen

    def get_max_length(self) -> int:
        """Static size, or -1."""
        return -1 if self.max_length is None else self.max_length

    def get_max_cache_shape(self) -> int:
        """Name of `get_max_length` before transformers 5.18."""
        return self.get_max_length()

    def reset(self) -> None:
        """Forget all tokens; memory and addresses stay."""
        if isinstance(self.seen, Tensor):
            self.seen.zero_()
        else:
            self.seen = 0
        if self.is_initialized:
            self.cache.reset()

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last `-tokens_to_remove` tokens. What was packed stays quantized.

        Raises:
            ValueError: for a positive number, as transformers.
        """
        if tokens_to_remove > 0:
            raise ValueError(
                f"tokens_to_remove={tokens_to_remove} is not allowed; it must be 0 or negative"
            )
        if self.is_initialized and tokens_to_remove:
            self.cache.crop(-tokens_to_remove)
            if isinstance(self.seen, Tensor):
                self.seen.add_(tokens_to_remove)
            else:
                self.seen += tokens_to_remove

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows continue the rows `beam_idx`; full pages are shared."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row `repeats` times."""
        if self.is_initialized:
            rows = range(self.cache.batch_size)
            self.cache.select([row for row in rows for _ in range(repeats)])

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows `indices`."""
        if self.is_initialized:
            self.cache.select(indices)


class KVCache(Cache):  # type: ignore[misc]
    """A quantized cache for `model(...)` and `model.generate(..., past_key_values=cache)`.

    Making one sets the model's attention to "kivi", which serves other caches through SDPA.

    Args:
        model: a decoder model of transformers.
        scheme: a name, a scheme, a list with one scheme for each layer, or a dict from layer
            numbers (negative from the end) to schemes with a "default".
        max_length: columns that a row can hold; makes the cache static, so that decode steps
            compile and `generate` compiles by itself on CUDA.
        impl: "auto", "eager", "compile" or "triton".
        check_finite: refuse keys and values with NaN or infinities.
        options: the scheme's options, where `scheme` is a name.

    Raises:
        ValueError: for an encoder-decoder model, an unknown scheme or option, or schemes that do
            not fit the model's layers.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        scheme: Schemes = "kivi",
        *,
        max_length: int | None = None,
        impl: Impl = "auto",
        check_finite: bool = False,
        **options: Any,
    ) -> None:
        config = model.config.get_text_config(decoder=True)
        if model.config.is_encoder_decoder:
            raise ValueError(
                f"model={type(model).__name__} is an encoder-decoder; only decoders are"
            )
        if max_length is not None:
            check_count("max_length", max_length, 1)
            plain = StaticCache(config=config, max_cache_len=max_length).layers
        kinds = DynamicCache(config=config).layers
        schemes = _layer_schemes(scheme, len(kinds), options)
        chunked = [t == "chunked_attention" for t in getattr(config, "layer_types", None) or []]
        masks, layers, foreign = _Masks(), [], set()
        for i, kind in enumerate(kinds):
            if type(kind) in (DynamicLayer, DynamicSlidingWindowLayer) and not (
                chunked and chunked[i]
            ):
                window = getattr(kind, "sliding_window", None)
                spec = schemes[i].spec(i)
                layers.append(PackedLayer(spec, window, max_length, impl, check_finite, masks))
            else:
                foreign.add(type(kind).__name__)
                layers.append(kind if max_length is None else plain[i])
        if foreign - {"DummyLayer"}:
            warnings.warn(
                f"layers of these kinds keep transformers' own cache: {sorted(foreign)}",
                stacklevel=2,
            )
        self.schemes = schemes
        if model._can_set_attn_implementation():
            model.set_attn_implementation(ATTENTION)
        super().__init__(layers=layers)

    @property
    def packed_layers(self) -> list[PackedLayer]:
        """The layers that are quantized."""
        return [layer for layer in self.layers if isinstance(layer, PackedLayer)]

    @property
    def packed_calls(self) -> list[int]:
        """How often attention ran over the pages of each packed layer (eager calls only)."""
        return [layer.packed_calls for layer in self.packed_layers]

    @property
    def dense_calls(self) -> list[int]:
        """How often each packed layer was dequantized for the model."""
        return [layer.dense_calls for layer in self.packed_layers]

    def nbytes(self) -> CacheBytes:
        """Bytes allocated and in use, all packed layers together."""
        each = [layer.cache.nbytes() for layer in self.packed_layers if layer.is_initialized]
        return CacheBytes(sum(b.allocated for b in each), sum(b.used for b in each))

    def prefill_from(self, cache: Cache) -> None:
        """Store the exact keys and values of another cache, e.g. one shared by many schemes.

        Args:
            cache: a filled DynamicCache of the same model, without padding.

        Raises:
            ValueError: if this cache is not empty, or `cache` has another number of layers.
        """
        if len(cache.layers) != len(self.layers) or any(bool(x.seen) for x in self.packed_layers):
            raise ValueError(
                f"cache={cache!r} must have {len(self.layers)} layers, and self be empty"
            )
        for layer, source in zip(self.layers, cache.layers, strict=True):
            if isinstance(layer, PackedLayer):
                if not layer.is_initialized:
                    layer.lazy_initialization(source.keys, source.values)
                layer.cache.append(source.keys, source.values)
                layer.seen += source.keys.shape[2]
            else:
                layer.update(source.keys, source.values)


def _layer_schemes(scheme: Schemes, layers: int, options: dict[str, Any]) -> list[KVQuantizer]:
    """One scheme for each layer."""
    if isinstance(scheme, str):
        return [KVQuantizer.get(scheme, **options)] * layers
    if options:
        raise ValueError(f"options {sorted(options)} need a scheme's name; got scheme={scheme!r}")
    if isinstance(scheme, KVQuantizer):
        return [scheme] * layers
    if isinstance(scheme, Mapping):
        numbers = {k for k in scheme if k != "default"}
        wrong = [n for n in numbers if n not in range(-layers, layers)]
        chosen = {n % layers: scheme[n] for n in numbers if not wrong and isinstance(n, int)}
        if wrong or ("default" not in scheme and len(chosen) < layers):
            raise ValueError(
                f"scheme has layers {sorted(map(str, scheme))}; allowed are {-layers} to {layers - 1}, "
                "and 'default' unless every layer is named"
            )
        return [chosen.get(i) or scheme["default"] for i in range(layers)]
    if len(scheme) != layers:
        raise ValueError(f"scheme has {len(scheme)} entries; the model has {layers} layers")
    return list(scheme)


def attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface. Returns `[B, T, Hq, Dv]` and no weights."""
    if isinstance(key, CachedStates) and not key.update.stored and not dropout:
        out = key.update.attend(query, attention_mask, scaling, sliding_window, softcap, s_aux)
        return out.transpose(1, 2).contiguous(), None
    if isinstance(key, CachedStates):  # a layer that shares another's keys, or training
        key, value = key.update.materialize()
    if softcap is None and s_aux is None:
        return sdpa_attention_forward(  # type: ignore[no-any-return]
            module, query, key, value, attention_mask, dropout, scaling, is_causal
        )
    t, n = query.shape[2], key.shape[2]
    allow = torch.ones(t, n, dtype=torch.bool, device=query.device).tril(n - t)[None, None]
    if attention_mask is not None:
        allow = attention_mask[..., :n]
    scale = query.shape[3] ** -0.5 if scaling is None else scaling
    part = partial_attention(query, key, value, allow, scale, softcap)
    out = merge([part], s_aux)[0].to(query.dtype)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(ATTENTION, attention_forward)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
