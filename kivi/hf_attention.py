"""The attention and mask functions that `KVCache` sets: packed attention, or what others expect."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, causal_mask_function, sdpa_mask

from kivi.checks import tracing
from kivi.hf_causal import CausalMask
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


def mask_of(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **_: Any,
) -> Tensor | None:
    """The mask interface of transformers: as `sdpa_mask`, a handle where all is plainly causal."""
    make: Callable[..., Any] = partial(
        sdpa_mask,
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,  # type: ignore[arg-type]  # a tensor for static caches
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        local_size=local_size,
        allow_is_bidirectional_skip=allow_is_bidirectional_skip,
        use_vmap=use_vmap,
        device=device,
    )
    # Read once: of a static cache it is on the device, and counts on before a mask may be made.
    before = 0 if q_length == 1 or tracing() else int(q_offset)
    plain = allow_is_causal_skip and local_size is None and kv_offset == 0
    if plain and before > 0 and _sees_all(attention_mask, before + q_length):
        make_all = partial(make, q_offset=before, allow_is_causal_skip=False)
        return CausalMask.of(make_all, (batch_size, 1, q_length, kv_length), device)
    mask: Tensor | None = make(allow_is_causal_skip=allow_is_causal_skip)
    return mask


def _sees_all(mask: Tensor | None, columns: int) -> bool:
    """Whether a mask `[B, N]` of columns that are not padding says nothing of the first ones."""
    if mask is None:
        return True
    return mask.dim() == 2 and mask.shape[1] >= columns and bool(mask.bool().all())


AttentionInterface.register(ATTENTION, attention_forward)
AttentionMaskInterface.register(ATTENTION, mask_of)
