"""The attention and mask functions that `KVCache` sets: packed attention, or what others expect."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from kivi.hf_handles import CachedStates

ATTENTION = str(__package__)
"""Name under which the attention and mask functions are registered: the package's."""


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
    position_bias: Tensor | None = None,
    sinks: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """The attention interface of transformers. Returns `[B, T, Hq, Dv]` and no weights."""
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    plain = position_bias is None and sinks is None
    update = CachedStates.common(key, value)
    if update is not None and plain and not dropout:
        out = update.attend(
            query,
            attention_mask,
            scaling,
            causal=causal,
            window=sliding_window,
            softcap=softcap,
            s_aux=s_aux,
        )
        if out is not None:
            return out.transpose(1, 2).contiguous(), None
    reason = f"{type(module).__name__} (its mask, dropout, bias or shared keys)"
    key, value = CachedStates.dense(key, reason), CachedStates.dense(value, reason)
    if softcap is None and s_aux is None and sinks is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, causal, position_bias
        )
    # What SDPA cannot do the model's own function can; it wants its mask as numbers to add.
    if attention_mask is None and causal and query.shape[2] > 1:
        shape = (query.shape[2], key.shape[2])
        attention_mask = torch.ones(shape, dtype=torch.bool, device=query.device).tril()[None, None]
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        least = torch.finfo(query.dtype).min
        attention_mask = torch.where(attention_mask, 0.0, least).to(query.dtype)
    sources = (sys.modules[cls.__module__] for cls in type(module).__mro__)
    eager = next(
        m.eager_attention_forward for m in sources if hasattr(m, "eager_attention_forward")
    )
    out, _ = eager(
        module,
        query,
        key,
        value,
        attention_mask,
        scaling=scaling,
        dropout=dropout,
        softcap=softcap,
        s_aux=s_aux,
        sinks=sinks,
        position_bias=position_bias,
        is_causal=causal,
    )
    return out, None


AttentionInterface.register(ATTENTION, attention_forward)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
