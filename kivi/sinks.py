"""Sinks that stay visible while a scheme drops what follows them (`KVSpec.window`).

Pages, masks and kernels know the window as a sliding one, which hides the sinks that lie before it.
Here attention over these few is added. Positions are those within the cache (StreamingLLM,
2309.17453, section 3.2): with S sinks and a window of W a query stands at most at S + W - 1. From
tokens of the window it is as far as ever; towards the sinks it is turned back by all that was
dropped, if the model's rotary embedding is known.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kivi.kernels.reference import merge, partial_attention
from kivi.spec import KVSpec
from kivi.transforms import keep_tables, turn
from kivi.view import CacheView


def before_sinks(
    query_position: Tensor, mask: Tensor | None, spec: KVSpec, window: int | None
) -> tuple[Tensor, Tensor | None]:
    """What attention over the window takes: positions that stay, and the mask `[B, 1, T, T]`.

    `window`: of the queries, None where no row reaches out of it.
    """
    if window is None or window != spec.window:
        return query_position, mask
    if mask is not None and query_position.shape[1] > window:
        mask = mask & (query_position[:, None, :, None] - query_position[:, None, None, :] < window)
    return query_position.clone(), mask  # it may be a view of a counter


def _prepare(spec: KVSpec, device: torch.device) -> None:
    """Make what a capture cannot, also where no query reaches out of the window in a warm-up."""
    if torch.compiler.is_compiling():
        return
    if spec.rope is not None:
        keep_tables(spec.rope, device)
    if device.type == "cuda":
        torch.cuda.current_blas_handle()


def with_sinks(
    out: Tensor,
    lse: Tensor | None,
    q: Tensor,
    view: CacheView,
    spec: KVSpec,
    query_position: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """Attention over the window, joined by the sinks that lie before it.

    Args:
        out: `[B, Hq, T, Dv]`, attention over what the window shows, sinks in it included.
        lse: `[B, Hq, T]`, its log-sum-exp; None if there was nothing before the window.
        q: `[B, Hq, T, D]`.
        view: the layer's state, with sinks in their slots.
        spec: how the layer is kept.
        query_position: `[B, T]` int64.
        scale: factor of the scores.
        window: of the queries, None where no row reaches out of it.
        softcap: scores become `softcap * tanh(score / softcap)`.

    Returns:
        `[B, Hq, T, Dv]` like `out`.
    """
    sinks = spec.sink_length
    if sinks and spec.window is not None:
        _prepare(spec, q.device)
    if not sinks or lse is None or window is None or window != spec.window:
        return out
    index = torch.arange(sinks, device=q.device)
    held = (index < view.length[:, None])[:, None, :, None]
    before = (query_position[:, :, None] - index >= window).unsqueeze(1)
    k, v = (torch.where(held, x[:, :, :sinks], 0) for x in (view.exact_key, view.exact_value))
    if spec.rope is not None:
        dropped = (sinks + window - 1 - query_position).clamp_max(0)
        q = turn(q.float(), dropped.unsqueeze(1), spec.rope)
    allow = before & held.transpose(-1, -2)
    both, _ = merge([(out.float(), lse), partial_attention(q, k, v, allow, scale, softcap)])
    return both.to(out.dtype)
