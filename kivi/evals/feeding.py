"""How text reaches a cache: an exact prefill, then chunks that attend to what the cache kept.

A single forward over a text never reads a quantized cache, so every evaluation feeds this way. A
token of a chunk sees the chunk's own tokens exactly and everything before through the cache; with
chunk 1 that is decoding as `generate` does it.
"""

from __future__ import annotations

import copy
import inspect
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

# transformers' classes by duck typing: this package does not import transformers.
Model: TypeAlias = Any
"""A causal language model with the transformers interface."""
Cache: TypeAlias = Any
"""A transformers cache."""
MakeCache: TypeAlias = Callable[[], Cache]
"""Makes a new, empty cache of the scheme under test."""
OnWork: TypeAlias = Callable[[int], None]
"""Told how much `work` has been done since its last call, for progress bars."""

EXACT_CHUNK = 512
"""Tokens at a time through the exact cache, where the chunk changes nothing but peak memory."""
STEP_TOKENS = 32
"""Tokens of a row that a forward costs at least, about: the cache is read for one as for 32."""


def work(rows: int, tokens: int) -> int:
    """Cost of one forward, in tokens."""
    return rows * max(tokens, STEP_TOKENS)


def work_in_chunks(rows: int, tokens: int, chunk: int) -> int:
    """Cost of feeding tokens in chunks."""
    return sum(work(rows, min(chunk, tokens - start)) for start in range(0, tokens, chunk))


def ignore(amount: int) -> None:
    """The OnWork that does nothing."""


class CacheSize(NamedTuple):
    """Bytes a cache has really allocated, and of these in use."""

    allocated: int
    used: int


def cache_size(cache: Cache) -> CacheSize:
    """Size of a cache: its own account, or the bytes of its tensors where it keeps none."""
    if hasattr(cache, "nbytes"):
        size = cache.nbytes()
        return CacheSize(size.allocated, size.used)
    total = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    return CacheSize(total, total)


def check_chunk(chunk: int) -> None:
    """Raise a ValueError unless tokens can be fed `chunk` at a time."""
    if chunk < 1:
        raise ValueError(f"chunk={chunk} is not allowed; feed at least 1 token at a time")


def check_context(model: Model, tokens: int, name: str = "context") -> None:
    """Raise a ValueError if a model was not made for so many positions."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and tokens > limit:
        raise ValueError(f"{name}={tokens} is not allowed; this model has {limit} positions")


def text_windows(
    tokens: Tensor, *, count: int, length: int, seed: int = 0, bos: int | None = None
) -> Tensor:
    """Stretches of a text that do not overlap, spread evenly over it.

    Args:
        tokens: `[N]` the text.
        count: S, stretches.
        length: T, tokens in each.
        seed: where in its share of the text each stretch lies.
        bos: a token to begin every stretch with; it counts.

    Returns:
        `[S, T]` int64.

    Raises:
        ValueError: if the text is too short.
    """
    if count < 1 or length < 1:
        raise ValueError(f"count={count}, length={length}: both must be at least 1")
    own = length - (bos is not None)
    share = len(tokens) // count
    if tokens.ndim != 1 or share < own:
        raise ValueError(
            f"the text has {tokens.numel()} tokens; {count} sequences of {own} tokens need "
            f"{count * own}: use a longer text, a shorter context or fewer tokens"
        )
    rng = random.Random(seed)
    starts = [i * share + rng.randint(0, share - own) for i in range(count)]
    rows = torch.stack([tokens[start : start + own] for start in starts]).long()
    if bos is None:
        return rows
    return torch.cat([rows.new_full((count, 1), bos), rows], dim=1)


@dataclass(frozen=True, eq=False)
class Prefix:
    """Prompts after their exact prefill, which is the same for every scheme.

    Args:
        ids: `[B, P]` the prompt tokens.
        cache: the full-precision cache that holds them; nobody writes to it.
        size: bytes of that cache.
    """

    ids: Tensor
    cache: Cache
    size: CacheSize

    @property
    def complete(self) -> bool:
        """Whether the exact cache holds every token: a sliding layer forgets, a state has none."""
        keys = [getattr(layer, "keys", None) for layer in self.cache.layers]
        return all(k is not None and k.shape[-2] == self.ids.shape[1] for k in keys)


@torch.inference_mode()
def prefill(model: Model, ids: Tensor, cache: Cache | None = None) -> Cache:
    """Run prompts `[B, P]` through a new cache in one exact forward; the model's own by default."""
    # Logits of a whole prompt can be larger than its cache.
    last = {"logits_to_keep": 1} if "logits_to_keep" in _parameters(model) else {}
    return model(
        input_ids=ids.to(model.device), past_key_values=cache, use_cache=True, **last
    ).past_key_values


def exact_prefix(model: Model, ids: Tensor) -> Prefix:
    """The exact prefill of prompts `[B, P]`, done once for all schemes."""
    cache = prefill(model, ids)
    return Prefix(ids, cache, cache_size(cache))


@torch.inference_mode()
def start_cache(model: Model, make_cache: MakeCache, prefix: Prefix) -> Cache:
    """A new cache that holds the prompts: loaded where it can be, prefilled where it can't."""
    cache = make_cache()
    weighs = getattr(cache, "weighs_tokens", False)
    if prefix.complete and hasattr(cache, "prefill_from") and not weighs:
        cache.prefill_from(prefix.cache)
        return cache
    return prefill(model, prefix.ids, cache)


@torch.inference_mode()
def feed(model: Model, cache: Cache, ids: Tensor, chunk: int) -> Iterator[Tensor]:
    """Feed `[B, N]` tokens through a cache and yield the logits `[B, n, V]` of each chunk."""
    check_chunk(chunk)
    for piece in ids.to(model.device).split(chunk, dim=1):
        yield model(input_ids=piece, past_key_values=cache, use_cache=True).logits


@torch.inference_mode()
def exact_logits(model: Model, prefix: Prefix, ids: Tensor, on_work: OnWork = ignore) -> Tensor:
    """Full-precision logits `[B, N, V]` of tokens that follow a prefix, in the model's dtype."""
    pieces = []
    for logits in feed(model, copy.deepcopy(prefix.cache), ids, EXACT_CHUNK):
        pieces.append(logits)
        on_work(work(*logits.shape[:2]))
    return torch.cat(pieces, dim=1)


def _parameters(model: Model) -> frozenset[str]:
    return frozenset(inspect.signature(model.forward).parameters)
