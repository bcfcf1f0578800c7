"""Attention that reads fewer bits and values where it is sure: `KVSpec.sparse`, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from kivi.kernels.reference import NOTHING, exact_positions, gather_pages, smooth_factors
from kivi.spec import PAGE_TOKENS, KVSpec, OpaqueSpec, Spec
from kivi.view import CacheView


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
    """As `reference.decode_attention`, with the most significant bits of keys first.

    A query and head whose largest probability then is at least `spec.sparse.threshold` is done; the
    others take all bits. Of the values it takes those of the largest probabilities, a part
    `spec.sparse.values` of what the query sees; the others count as 0.
    """
    sparse, rough = spec.sparse, spec.key
    assert sparse is not None
    if isinstance(rough, OpaqueSpec):
        rough = rough.coarse()
    position, visible = _tokens(view, spec)
    distance = query_position[:, :, None] - position[:, None, :]
    allow = (distance >= 0) & visible[:, None, :]
    if sliding_window is not None:
        allow = allow & (distance < sliding_window)
    full, fine = _probabilities(q, view, spec, spec.key, allow, scale, softcap, s_aux)
    few, coarse = _probabilities(q, view, spec, rough, allow, scale, softcap, s_aux)
    sure = few.amax(-1, keepdim=True) >= sparse.threshold
    p = torch.where(sure, few, full)
    seen = allow.sum(-1)[:, None, None]
    last = (seen * sparse.values).ceil().long().clamp_min(1) - 1
    ranked = p.sort(-1, descending=True).values
    least = ranked.gather(-1, last.expand(p.shape[:-1]).unsqueeze(-1))
    p = torch.where(p >= least, p, 0.0)
    v = _dense(view, spec, spec.value, 1)
    v = torch.where(visible[:, None, :, None], v.float(), 0.0)
    out = (p.flatten(2, 3) @ v).view(*q.shape[:3], -1)
    return out.to(q.dtype), torch.where(sure.squeeze(-1), coarse, fine).flatten(1, 2)


def _tokens(view: CacheView, spec: KVSpec) -> tuple[Tensor, Tensor]:
    """Positions of packed tokens and exact slots, and which are part of the row, `[B, N]`."""
    exact, held = exact_positions(view, spec.sink_length)
    index = torch.arange(view.table.shape[1] * PAGE_TOKENS, device=exact.device)
    packed = (index + spec.sink_length).expand(len(exact), -1)
    return torch.cat([packed, exact], 1), torch.cat([index < view.packed[:, None], held], 1)


def _dense(view: CacheView, spec: KVSpec, one: Spec | None, value: int) -> Tensor:
    """Keys or values of `_tokens`, `[B, Hkv, N, D]`, packed ones as `one` reads them."""
    pairs = ((view.key, view.exact_key), (view.value, view.exact_value))
    stored, slots = pairs[value]
    smooth, dtype = smooth_factors(view, spec)[value], slots.dtype
    packed = gather_pages(stored, one, view.table, dtype, slots.shape[3], smooth)
    return torch.cat([packed, slots[:, :, :-1]], 2)


def _probabilities(
    q: Tensor,
    view: CacheView,
    spec: KVSpec,
    key: Spec | None,
    allow: Tensor,
    scale: float,
    softcap: float | None,
    s_aux: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Softmax over all tokens `[B, Hkv, Hq/Hkv, T, N]` and its log-sum-exp, keys as `key` reads."""
    k = _dense(view, spec, key, 0).float()
    grouped = (q.float() * scale).unflatten(1, (k.shape[1], -1))
    scores = grouped @ k.unsqueeze(2).transpose(-1, -2)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = torch.where(allow[:, None, None], scores, NOTHING)
    lse = scores.logsumexp(-1)
    if s_aux is not None:
        sink = s_aux.float().view(1, k.shape[1], -1, 1)
        lse = torch.logaddexp(lse, sink.expand_as(lse))
    p = torch.where(allow[:, None, None], (scores - lse.unsqueeze(-1)).exp(), 0.0)
    return p, lse
