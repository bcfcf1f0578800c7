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
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StaticCache
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    get_layer_types_and_kwargs,
)

from kivi import hf_save
from kivi.attention import Impl
from kivi.hf_attention import ATTENTION
from kivi.hf_layer import PackedLayer
from kivi.hf_masks import Shared
from kivi.hf_rope import find_rope
from kivi.hf_schemes import Schemes, layer_schemes
from kivi.pages import CacheBytes
from kivi.spec import KVSpec, check_count

__all__ = ["ATTENTION", "KVCache", "PackedLayer"]


class KVCache(Cache):
    """A quantized cache for `model(...)` and `model.generate(..., past_key_values=cache)`.

    Making one sets the model's attention to `ATTENTION`, which serves other caches as transformers'
    own attention does. Layers with a sliding window keep that window; what their queries cannot see
    any more is forgotten. Layers of other kinds keep transformers' own cache, with a warning.

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
        ValueError: for an encoder-decoder model, an unknown scheme or option, schemes that do not
            fit the model's layers, or one that drops tokens without a rotary embedding to turn.
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
        self.max_length, self.check_finite = max_length, check_finite
        self._model = hf_save.comparable(model.config)
        shared, foreign, layers, specs = Shared(), set[str](), list[Any](), list[KVSpec]()
        for i, kind in enumerate(kinds):
            packs = type(kind) in (DynamicLayer, DynamicSlidingWindowLayer)
            if packs and types[i] != "chunked_attention":
                window = getattr(kind, "sliding_window", None)
                spec = self.schemes[i].spec(i)
                if spec.asks_for_rope:
                    spec = spec.with_rope(find_rope(model, i))
                    if spec.window is not None and spec.rope is None:
                        raise ValueError(
                            f"scheme={self.schemes[i].name!r} drops tokens, which takes a rotary "
                            f"embedding; none was found in model={type(model).__name__}, layer {i}"
                        )
                # Equal ones as one object: to compare them takes a while.
                spec = next((one for one in specs if one == spec), spec)
                specs.append(spec)
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
    def weighs_tokens(self) -> bool:
        """Whether a scheme asks for a prompt's queries, which `prefill_from` does not give."""
        return any(layer.spec.weighs_tokens for layer in self.packed_layers)

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

    def save(self, path: str | Path) -> None:
        """Write the cache to a safetensors file; pages that rows share are written once.

        Raises:
            ValueError: if there are layers that keep transformers' own cache, or schemes with
                options that JSON cannot write.
            OSError: if the file cannot be written.
        """
        kinds = {type(layer).__name__ for layer in self.layers}
        if kinds - {"PackedLayer", "DummyLayer"}:
            raise ValueError(f"layers of kinds {sorted(kinds)} cannot be saved, only PackedLayer")
        layers = [getattr(layer, "columns", None) for layer in self.layers]
        saved = (self._model, self.schemes, self.max_length, self.check_finite, layers)
        hf_save.save(path, hf_save.Saved(*saved))

    @classmethod
    def load(cls, path: str | Path, model: PreTrainedModel, *, impl: Impl = "auto") -> KVCache:
        """A cache that `save` wrote, on the model's device.

        Args:
            path: the file.
            model: the model that filled the cache (its shape is compared, not its weights).
            impl: see `KVCache`.

        Raises:
            ValueError: for a file that is damaged, truncated, of another kind, version or model,
                or if a scheme is missing here or has become another one.
            OSError: if there is no file that can be read.
        """
        saved = hf_save.load(path, hf_save.comparable(model.config), device=model.device, impl=impl)
        length, finite = saved.max_length, saved.check_finite
        cache = cls(model, saved.schemes, max_length=length, impl=impl, check_finite=finite)
        for layer, columns in zip(cache.layers, saved.layers, strict=True):
            if isinstance(layer, PackedLayer) and columns is not None:
                layer.columns, layer.is_initialized = columns, True
                columns.shared, columns.cache.steps = layer.shared, layer.shared.steps
        return cache

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
