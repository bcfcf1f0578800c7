"""PackedLayer: what transformers asks of a layer's cache, answered by a LayerCache."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from kivi.attention import Impl, get_ops
from kivi.cache import LayerCache
from kivi.hf_handles import Columns
from kivi.hf_masks import Shared
from kivi.spec import KVSpec


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
        if max_length is None:
            shared.steps.room(spec, sliding_window).layers += 1
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
            alike=self.shared.steps,
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
