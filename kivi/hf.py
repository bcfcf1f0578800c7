"""transformers: a Cache whose layers are packed, and the attention that reads them.

`KVCache.update` hands the model handles (`kivi.hf_handles`) in place of dense keys and values. The
attention function of `kivi.hf_attention` knows them and attends over the packed pages;
`F.scaled_dot_product_attention` called on handles does the same, and any other use of them
dequantizes. Padding is taken from the attention mask and never stored.
"""

from __future__ import annotations

import copy
import operator
import warnings
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StaticCache
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    get_layer_types_and_kwargs,
)

from kivi.attention import Impl, get_ops
from kivi.cache import LayerCache
from kivi.hf_attention import ATTENTION
from kivi.hf_handles import Columns
from kivi.hf_masks import Shared
from kivi.hf_schemes import Schemes, layer_schemes
from kivi.pages import CacheBytes
from kivi.spec import KVSpec, check_count

__all__ = ["ATTENTION", "KVCache", "PackedLayer"]


class PackedLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """One layer of a `KVCache`; its LayerCache is made from the first keys and values.

    Args:
        spec: how the layer is packed.
        sliding_window: the layer's attention window, None for full attention. What no query sees
            any more is forgotten, a page at a time.
        max_length: static size, or None.
        impl: see `kivi.cache.LayerCache`.
        check_finite: see `kivi.cache.LayerCache`.
        shared: what the layers of a cache share.
    """

    is_croppable = True
    is_sliding = False  # masks have all columns; what the window passed is the cache's matter
    columns: Columns

    def __init__(
        self,
        spec: KVSpec,
        sliding_window: int | None,
        max_length: int | None,
        impl: Impl,
        check_finite: bool,
        shared: Shared,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        get_ops(impl, spec)  # refuses before anything is allocated
        self.spec, self.sliding_window, self.max_length = spec, sliding_window, max_length
        self.impl, self.check_finite, self.shared = impl, check_finite, shared
        self.is_compileable = max_length is not None and not check_finite

    @property
    def cache(self) -> LayerCache:
        """The tokens, packed."""
        return self.columns.cache

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate for tensors like these `[B, Hkv, T, D]`."""
        b, h, _, d = key_states.shape
        kind = key_states.device.type
        autocast = torch.is_autocast_enabled(kind)
        cache = LayerCache(
            self.spec,
            b,
            h,
            d,
            value_states.shape[3],
            max_length=self.max_length,
            sliding_window=self.sliding_window,
            # Under autocast keys and values may come in two dtypes, and attention casts both.
            dtype=torch.get_autocast_dtype(kind) if autocast else key_states.dtype,
            device=key_states.device,
            impl=self.impl,
            check_finite=self.check_finite,
        )
        self.columns = Columns(cache, self.sliding_window, self.shared)
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **_: Any
    ) -> tuple[Tensor, Tensor]:
        """Take new keys and values `[B, Hkv, T, D]`; returns handles of all of them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        return self.columns.handles(key_states, value_states)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns and offset of the masks."""
        if self.is_initialized:
            return self.columns.total(query_length), 0
        return self.max_length or query_length, 0

    def get_seq_length(self) -> int | Tensor:  # type: ignore[override]
        """Columns seen; a tensor if static, as transformers' StaticLayer."""
        return self.columns.seen if self.is_initialized else 0

    def get_max_length(self) -> int:
        """Static size, or -1."""
        return -1 if self.max_length is None else self.max_length

    def reset(self) -> None:
        """Forget all tokens; memory and addresses stay."""
        if self.is_initialized:
            self.columns.reset()

    def crop(self, tokens_to_remove: int | Tensor) -> None:
        """Drop the last `-tokens_to_remove` columns. What was packed stays quantized.

        Raises:
            ValueError: see `check_crop`.
        """
        self.check_crop(tokens_to_remove)
        if self.is_initialized and tokens_to_remove:
            self.columns.crop(-int(tokens_to_remove))  # generate counts in tensors

    def check_crop(self, tokens_to_remove: int | Tensor) -> None:
        """Raise a ValueError where `crop` would.

        That is for a positive number, as transformers, for more columns than a row has tokens, if
        there is padding among them, or if a sliding window has forgotten what comes back into it.
        """
        if tokens_to_remove > 0:
            raise ValueError(
                f"tokens_to_remove={int(tokens_to_remove)} is not allowed; it must be 0 or negative"
            )
        if self.is_initialized and tokens_to_remove:
            self.columns.check_crop(-int(tokens_to_remove))

    def fork(self, shared: Shared) -> PackedLayer:
        """A layer that goes on from here on its own."""
        forked = copy.copy(self)
        forked.shared = shared
        if self.is_initialized:
            forked.columns = self.columns.fork(shared)
        return forked

    def reorder_cache(self, beam_idx: Tensor | list[int]) -> None:
        """Row i continues row `beam_idx[i]`; full pages are shared."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row `repeats` times."""
        if self.is_initialized:
            rows = range(self.cache.batch_size)
            self.columns.select([row for row in rows for _ in range(repeats)])

    def batch_select_indices(self, indices: Tensor | list[int]) -> None:
        """Keep the rows `indices`, numbers or one bool for each row."""
        if self.is_initialized:
            if isinstance(indices, Tensor):
                numbers = indices.nonzero()[:, 0] if indices.dtype == torch.bool else indices
                indices = numbers.tolist()
            self.columns.select(indices)


class KVCache(Cache):
    """A quantized cache for `model(...)` and `model.generate(..., past_key_values=cache)`.

    Making one sets the model's attention to `ATTENTION`, which serves other caches as transformers'
    own attention does.

    Args:
        model: a decoder model of transformers.
        scheme: a scheme or its name, a list with one for each layer, or a dict from layer numbers
            (negative from the end) to schemes with a "default".
        max_length: columns that a row can hold, padding included; makes the cache static, so that
            decode steps compile and `generate` compiles by itself on CUDA.
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
        scheme: Schemes,
        *,
        max_length: int | None = None,
        impl: Impl = "auto",
        check_finite: bool = False,
        **options: Any,
    ) -> None:
        if model.config.is_encoder_decoder:
            raise ValueError(
                f"model={type(model).__name__} is an encoder-decoder; only decoders are"
            )
        if max_length is not None:
            check_count("max_length", max_length, 1)
        config = model.config.get_text_config(decoder=True)
        types, _ = get_layer_types_and_kwargs(config)
        kinds = DynamicCache(config=config).layers
        self.schemes = layer_schemes(scheme, len(kinds), options)
        shared, foreign, layers = Shared(), set(), list[Any]()
        for i, kind in enumerate(kinds):
            packs = type(kind) in (DynamicLayer, DynamicSlidingWindowLayer)
            if packs and types[i] != "chunked_attention":
                window = getattr(kind, "sliding_window", None)
                spec = self.schemes[i].spec(i)
                layers.append(PackedLayer(spec, window, max_length, impl, check_finite, shared))
            else:
                foreign.add(type(kind).__name__)
                layers.append(kind)
        if foreign and max_length is not None:
            static = StaticCache(config=config, max_cache_len=max_length).layers
            pairs = zip(layers, static, strict=True)
            layers = [mine if isinstance(mine, PackedLayer) else its for mine, its in pairs]
        if foreign - {"DummyLayer"}:
            warnings.warn(
                f"layers of these kinds keep their own cache: {sorted(foreign)}", stacklevel=2
            )
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
        return [x.columns.packed_calls if x.is_initialized else 0 for x in self.packed_layers]

    @property
    def dense_calls(self) -> list[int]:
        """How often each packed layer was dequantized for the model."""
        return [x.columns.dense_calls if x.is_initialized else 0 for x in self.packed_layers]

    def nbytes(self) -> CacheBytes:
        """Bytes allocated and in use, all packed layers together."""
        each = [layer.cache.nbytes() for layer in self.packed_layers if layer.is_initialized]
        return CacheBytes(sum(b.allocated for b in each), sum(b.used for b in each))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i of every layer continues row `beam_idx[i]`."""
        rows = beam_idx.tolist()  # one look at the device, not one for each layer
        layers: list[Any] = self.layers
        for layer in layers:
            layer.reorder_cache(rows if isinstance(layer, PackedLayer) else beam_idx)

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last `-tokens_to_remove` columns of every layer, or of none if one refuses."""
        for layer in self.packed_layers:
            layer.check_crop(tokens_to_remove)
        super().crop(tokens_to_remove)

    def fork(self) -> KVCache:
        """A cache that goes on from here on its own: a prompt's full pages are stored once for all.

        See `kivi.cache.LayerCache.fork` for caches with a `max_length`.
        """
        forked, shared, layers = copy.copy(self), Shared(), list[Any](self.layers)
        forked.layers = [
            layer.fork(shared) if isinstance(layer, PackedLayer) else copy.deepcopy(layer)
            for layer in layers
        ]
        return forked

    def prefill_from(self, cache: Cache) -> None:
        """Store the exact keys and values of another cache, e.g. one shared by many schemes.

        Args:
            cache: a filled DynamicCache of the same model, without padding. Its layers must hold
                all tokens: sliding ones forget.

        Raises:
            ValueError: if this cache is not empty, or `cache` is empty or has other layers.
        """
        keys = [getattr(layer, "keys", None) for layer in cache.layers]
        tokens = 0 if not keys else int(cache.get_seq_length())
        full = [k is not None and k.dim() == 4 and k.shape[2] == tokens > 0 for k in keys]
        dummy = [type(layer).__name__ == "DummyLayer" for layer in self.layers]
        if len(full) != len(dummy) or not all(map(operator.or_, full, dummy)):
            raise ValueError(
                f"cache={cache!r} must have {len(dummy)} layers that hold all of {tokens} tokens"
            )
        if any(bool(layer.get_seq_length()) for layer in self.packed_layers):
            raise ValueError("prefill_from needs an empty cache; reset() this one first")
        sources: list[Any] = cache.layers
        for layer, source in zip(self.layers, sources, strict=True):
            if isinstance(layer, PackedLayer):
                if not layer.is_initialized:
                    layer.lazy_initialization(source.keys, source.values)
                layer.cache.append(source.keys, source.values)
                layer.columns.advance(tokens)
            elif isinstance(layer, CacheLayerMixin):
                layer.update(source.keys, source.values)
