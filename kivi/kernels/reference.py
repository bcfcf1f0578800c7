"""The operators in plain torch: oracle for the kernels and source for torch.compile.

Attention is computed in float32, over blocks of pages whose partial results merge by their log-sum-
exp, so that no dense copy of a long cache is ever made.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kivi.quantize import Pages, dequantize_pages, quantize_pack, saturate
from kivi.spec import PAGE_TOKENS, KVSpec, Spec
from kivi.view import CacheView

__all__ = [
    "decode_attention",
    "exact_positions",
    "extend_attention",
    "gather_pages",
    "merge",
    "partial_attention",
    "quantize_pack",
    "smooth_factors",
]

# Log-sum-exp of nothing: finite, so that differences of two of them are not NaN.
NOTHING = -1e30
# Elements of a block of scores that may exist at a time (float32: 1 GiB).
BLOCK_SCORES = 2**28
BLOCK_PAGES = 64


def exact_positions(view: CacheView, sinks: int) -> tuple[Tensor, Tensor]:
    """Position of the token in each exact slot and whether it is part of the row, `[B, S + W]`."""
    ring = view.exact_key.shape[2] - sinks - 1
    length, packed = view.length[:, None], view.packed[:, None]
    slot = torch.arange(ring, device=length.device)
    last = length - 1 - sinks
    position = sinks + last - (last - slot) % ring
    visible = (position >= sinks + packed) & (last >= 0)
    if sinks:
        head = torch.arange(sinks, device=length.device).expand(length.shape[0], -1)
        position = torch.cat([head, position], 1)
        visible = torch.cat([head < length, visible], 1)
    return position, visible


def smooth_factors(view: CacheView, spec: KVSpec) -> tuple[Tensor | None, Tensor | None]:
    """What the channels of packed keys and values were divided by, `[B, Hkv, D]` each."""
    key = view.exact_key.shape[3] if spec.key and spec.key.smooth else 0
    value = bool(spec.value and spec.value.smooth)
    both = view.smooth
    assert both is not None or not (key or value)
    return (
        both[..., :key] if both is not None and key else None,
        both[..., key:] if both is not None and value else None,
    )


def gather_pages(
    pages: Pages,
    spec: Spec | None,
    table: Tensor,
    dtype: torch.dtype,
    head_dim: int | None = None,
    smooth: Tensor | None = None,
) -> Tensor:
    """Dense tokens `[B, Hkv, n * 512, D]` of the pages in `table [B, n]`.

    `head_dim`: see `dequantize_pages`. `smooth [B, Hkv, D]`: what the channels were divided by.
    """
    b, n = table.shape
    index = table.reshape(-1)
    words, *others = pages
    taken = Pages(words[index], *(None if x is None else x[index] for x in others))
    dense = dequantize_pages(taken, spec, dtype if smooth is None else torch.float32, head_dim)
    dense = dense.view(b, n, *dense.shape[1:]).transpose(1, 2).flatten(2, 3)
    return dense if smooth is None else saturate(dense * smooth.unsqueeze(2), dtype)


def partial_attention(
    q: Tensor, k: Tensor, v: Tensor, allow: Tensor, scale: float, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """Attention over a part of the keys.

    Args:
        q: `[B, Hq, T, D]`; Hq a multiple of Hkv.
        k: `[B, Hkv, N, D]`.
        v: `[B, Hkv, N, Dv]`.
        allow: bool, broadcastable to `[B, 1, T, N]`: what each query may see.
        scale: factor of the scores.
        softcap: scores become `softcap * tanh(score / softcap)`.

    Returns:
        out `[B, Hq, T, Dv]` and log-sum-exp `[B, Hq, T]`, float32; 0 and NOTHING for a query that
        sees no key.
    """
    b, hq, t, d = q.shape
    hkv = k.shape[1]
    grouped = (q.float() * scale).reshape(b, hkv, hq // hkv * t, d)
    scores = (grouped @ k.float().transpose(-1, -2)).view(b, hkv, hq // hkv, t, -1)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = torch.where(allow.unsqueeze(2), scores, NOTHING)
    top = scores.amax(-1, keepdim=True)
    p = torch.exp(scores - top)
    total = p.sum(-1, keepdim=True)
    # Where a query sees nothing, p is 1 everywhere and means nothing.
    sees = (top > NOTHING).view(b, hq, t, 1)
    out = (p.flatten(2, 3) @ v.float()).view(b, hq, t, -1) / total.view(b, hq, t, 1)
    lse = (top + torch.log(total)).view(b, hq, t)
    return torch.where(sees, out, 0.0), torch.where(sees.squeeze(-1), lse, NOTHING)


def merge(parts: list[tuple[Tensor, Tensor]], s_aux: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Merge partial attentions into the attention over all their keys.

    Args:
        parts: `(out [B, Hq, T, Dv], lse [B, Hq, T])` of disjoint sets of keys.
        s_aux: `[Hq]` logits of a virtual key without value in every softmax (GPT-OSS sinks).

    Returns:
        `(out, lse)` as if computed at once.
    """
    lses = [lse for _, lse in parts]
    if s_aux is not None:
        lses.append(s_aux.float().view(1, -1, 1).expand_as(lses[0]))
    top = torch.stack(lses).amax(0)
    weights = [torch.exp(lse - top) for lse in lses]
    total = torch.stack(weights).sum(0)
    out = sum(w.unsqueeze(-1) * o for (o, _), w in zip(parts, weights, strict=False))
    assert isinstance(out, Tensor)
    return out / total.unsqueeze(-1), top + torch.log(total)


def _within(position: Tensor, query: Tensor, sliding_window: int | None) -> Tensor:
    """Which keys `[B, N]` lie at or before queries `[B, T]` and in the window, `[B, 1, T, N]`."""
    distance = query[:, :, None] - position[:, None, :]
    near = distance >= 0
    if sliding_window is not None:
        near = near & (distance < sliding_window)
    return near.unsqueeze(1)


def _cached_parts(
    q: Tensor,
    view: CacheView,
    spec: KVSpec,
    query_position: Tensor,
    scale: float,
    sliding_window: int | None,
    softcap: float | None,
) -> list[tuple[Tensor, Tensor]]:
    """Partial attentions over the exact slots and over blocks of packed pages."""
    b, hq, t, _ = q.shape
    sinks, n, smooth = spec.sink_length, view.table.shape[1], smooth_factors(view, spec)

    def part(k: Tensor, v: Tensor, position: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
        # What is not part of the row is zeroed: a NaN there would survive a weight of 0.
        inside = visible[:, None, :, None]
        allow = _within(position, query_position, sliding_window) & visible[:, None, None, :]
        k, v = torch.where(inside, k, 0), torch.where(inside, v, 0)
        return partial_attention(q, k, v, allow, scale, softcap)

    position, visible = exact_positions(view, sinks)
    slots = position.shape[1]
    parts = [part(view.exact_key[:, :, :slots], view.exact_value[:, :, :slots], position, visible)]
    block = BLOCK_PAGES if t <= 32 else max(1, BLOCK_SCORES // (b * hq * t * PAGE_TOKENS))
    for start in range(0, n, block):
        table = view.table[:, start : start + block]
        index = torch.arange(table.shape[1] * PAGE_TOKENS, device=q.device) + start * PAGE_TOKENS
        visible = index < view.packed[:, None]
        sizes = view.exact_key.shape[3], view.exact_value.shape[3]
        k = gather_pages(view.key, spec.key, table, q.dtype, sizes[0], smooth[0])
        v = gather_pages(view.value, spec.value, table, q.dtype, sizes[1], smooth[1])
        parts.append(part(k, v, (sinks + index).expand(b, -1), visible))
    return parts


def decode_attention(
    q: Tensor,
    view: CacheView,
    spec: KVSpec,
    query_position: Tensor,
    scale: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of a few query tokens that are already in the cache's exact slots.

    Args:
        q: `[B, Hq, T, D]`.
        view: the layer's state, the T new tokens included.
        spec: how the layer is packed.
        query_position: `[B, T]` int64; a query sees the tokens at or before its own position.
        scale: factor of the scores.
        sliding_window: a query sees only this many tokens, itself included.
        softcap: scores become `softcap * tanh(score / softcap)`.
        s_aux: `[Hq]` sink logits (GPT-OSS).

    Returns:
        out `[B, Hq, T, Dv]` in q's dtype; log-sum-exp `[B, Hq, T]` float32.
    """
    parts = _cached_parts(q, view, spec, query_position, scale, sliding_window, softcap)
    out, lse = merge(parts, s_aux)
    return out.to(q.dtype), lse


def extend_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    view: CacheView | None,
    spec: KVSpec,
    query_position: Tensor,
    scale: float,
    valid: Tensor | None = None,
    mask: Tensor | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Attention of many query tokens over a packed past and their own exact keys and values.

    Args:
        q: `[B, Hq, T, D]`.
        k: `[B, Hkv, T, D]`, the new keys; `v` `[B, Hkv, T, Dv]` likewise.
        v: see k.
        view: the past, without the new tokens; None if there is none.
        spec: how the layer is packed.
        query_position: `[B, T]` int64, of the new tokens.
        scale: factor of the scores.
        valid: `[B, T]` bool; new tokens that are not valid are not seen. Default: all are.
        mask: `[B or 1, 1, T, T]` bool, replaces causal order and window among the new tokens.
        sliding_window: see `decode_attention`.
        softcap: see `decode_attention`.
        s_aux: see `decode_attention`.

    Returns:
        out `[B, Hq, T, Dv]` in q's dtype; log-sum-exp `[B, Hq, T]`, or None where the plain causal
        kernel of PyTorch did the work.
    """
    b, hq, t, _ = q.shape
    windowed = sliding_window is not None and t > sliding_window
    plain = valid is None and mask is None and softcap is None and s_aux is None
    if view is None and plain and not windowed:
        gqa = k.shape[1] != hq
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=gqa)
        return out, None
    parts = []
    if view is not None:
        parts = _cached_parts(q, view, spec, query_position, scale, sliding_window, softcap)
    seen = torch.ones(b, t, dtype=torch.bool, device=q.device) if valid is None else valid
    if valid is not None:
        # What padding holds must not matter, a NaN least of all.
        q, k, v = (torch.where(valid[:, None, :, None], x, 0) for x in (q, k, v))
    rows = max(1, BLOCK_SCORES // (b * hq * t))
    blocks = []
    for start in range(0, t, rows):
        part = slice(start, start + rows)
        if mask is None:
            allow = _within(query_position, query_position[:, part], sliding_window)
        else:
            allow = mask[:, :, part]
        allow = allow & seen[:, None, None, :]
        blocks.append(partial_attention(q[:, :, part], k, v, allow, scale, softcap))
    new = (torch.cat([o for o, _ in blocks], 2), torch.cat([lse for _, lse in blocks], 2))
    out, lse = merge([*parts, new], s_aux)
    return out.to(q.dtype), lse
