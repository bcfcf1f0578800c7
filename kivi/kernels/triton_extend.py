"""Attention of many new tokens over a packed past: the operator `kivi::extend_attention`."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kivi.grids import symmetric_offset
from kivi.kernels import triton_extend_hopper as hopper
from kivi.kernels import triton_extend_portable as portable
from kivi.kernels import triton_fast
from kivi.kernels.triton_extend_mapped import mapped_extend
from kivi.kernels.triton_formats import flat, is_plain
from kivi.kernels.triton_portable import INTERPRETED
from kivi.spec import TILE_ROWS, KVSpec


def _extend_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_words: Tensor | None,
    key_scale: Tensor | None,
    key_zero: Tensor | None,
    value_words: Tensor | None,
    value_scale: Tensor | None,
    value_zero: Tensor | None,
    table: Tensor | None,
    packed: Tensor | None,
    exact_key: Tensor | None,
    exact_value: Tensor | None,
    length: Tensor | None,
    query_position: Tensor,
    valid: Tensor | None,
    mask: Tensor | None,
    s_aux: Tensor | None,
    key_bits: int,
    key_channel: bool,
    key_group: int,
    value_bits: int,
    value_channel: bool,
    value_group: int,
    sinks: int,
    scale: float,
    sliding_window: int | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    b, hq, t, d = q.shape
    hkv, dv = v.shape[1], v.shape[3]
    if scale < 0:  # the running maximum is of scores that are not scaled yet
        q, scale = -q, -scale
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    if mask is not None:
        mask = mask if mask.stride(3) == 1 else mask.contiguous()
        mask = mask.expand(b, -1, -1, -1).view(torch.uint8)
    query_position = query_position.contiguous()
    valid = None if valid is None else valid.contiguous().view(torch.uint8)
    key, value = (key_bits, key_channel, key_group), (value_bits, value_channel, value_group)
    if table is not None and mask is None and hopper.serves(q, dv, key, value, scale):
        assert key_words is not None and value_words is not None
        assert key_scale is not None and value_scale is not None and length is not None
        assert packed is not None and exact_key is not None and exact_value is not None
        zero = symmetric_offset(key_bits), symmetric_offset(value_bits)
        mapped = triton_fast.Mapped(0, (1, 1), (False, False), zero)
        return hopper.extend(
            q,
            k,
            v,
            (key_words, key_scale, key_zero, None),
            (value_words, value_scale, value_zero, None),
            (table, packed, exact_key, exact_value, length, query_position),
            valid,
            None,
            s_aux,
            (key, value),
            mapped,
            sinks,
            scale,
            sliding_window,
            softcap,
        )
    rows = hq // hkv * t
    plan = portable.tuning(rows, max(d, dv), q.dtype, (key_bits, value_bits))
    programs, tile = b * hkv * -(-rows // plan.rows), TILE_ROWS * plan.planes
    slots = 0 if exact_key is None else exact_key.shape[2] - 1
    seen = portable.reach(table, sliding_window) + slots + t
    splits = portable.division(programs, -(-seen // tile), plan.resident, q.device)

    def launch(out: Tensor, lse: Tensor) -> None:
        portable.launch(
            q,
            k,
            v,
            (key_words, key_scale, key_zero, value_words, value_scale, value_zero),
            (table, packed, exact_key, exact_value, length),
            query_position,
            valid,
            mask,
            s_aux,
            out,
            lse,
            key,
            value,
            sinks,
            scale,
            sliding_window,
            softcap,
            splits,
            plan,
        )

    return portable.merged(q, dv, splits, s_aux, launch)


_SCHEMA = """extend_attention(
    Tensor q, Tensor k, Tensor v, Tensor? key_words, Tensor? key_scale, Tensor? key_zero,
    Tensor? value_words, Tensor? value_scale, Tensor? value_zero,
    Tensor? table, Tensor? packed, Tensor? exact_key, Tensor? exact_value, Tensor? length,
    Tensor query_position, Tensor? valid, Tensor? mask, Tensor? s_aux,
    int key_bits, bool key_channel, int key_group,
    int value_bits, bool value_channel, int value_group,
    int sinks, float scale, int? sliding_window, float? softcap
) -> (Tensor, Tensor)"""


def _fake(q: Tensor, k: Tensor, v: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    out = q.new_empty(*q.shape[:3], v.shape[3])
    return out, q.new_empty(q.shape[:3], dtype=torch.float32)


_library = torch.library.Library(__name__.partition(".")[0], "FRAGMENT")
_library.define(_SCHEMA)
_library.impl("extend_attention", _extend_attention, "CUDA")
if INTERPRETED:
    _library.impl("extend_attention", _extend_attention, "CPU")
torch.library.register_fake("kivi::extend_attention", _fake, lib=_library)


def extend_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    view: Any,
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

    The past must be older than every new token.

    Args:
        q: `[B, Hq, T, D]`.
        k: `[B, Hkv, T, D]`, the new keys; `v` `[B, Hkv, T, Dv]` likewise.
        v: see k.
        view: the past (CacheView), without the new tokens, contiguous; None if there is none.
        spec: how the layer is packed.
        query_position: `[B, T]` int64, of the new tokens; those of valid tokens increase.
        scale: factor of the scores.
        valid: `[B, T]` bool; new tokens that are not valid are not seen, and what their queries
            return means nothing. Default: all are.
        mask: `[B or 1, 1, T, T]` bool, replaces causal order and window among the new tokens.
        sliding_window: a query sees only this many tokens, itself included.
        softcap: scores become `softcap * tanh(score / softcap)`.
        s_aux: `[Hq]` sink logits (GPT-OSS).

    Returns:
        out `[B, Hq, T, Dv]` in q's dtype; log-sum-exp `[B, Hq, T]`, or None where the plain causal
        kernel of PyTorch did the work.
    """
    if s_aux is not None:
        s_aux = s_aux.contiguous()
    windowed = sliding_window is not None and q.shape[2] > sliding_window
    plain = valid is None and mask is None and softcap is None and s_aux is None
    if view is None and plain and not windowed:
        gqa = k.shape[1] != q.shape[1]
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=gqa)
        return out, None
    if view is not None and not (is_plain(spec.key) and is_plain(spec.value)):
        options = (scale, valid, mask, sliding_window, softcap, s_aux)
        return mapped_extend(q, k, v, view, spec, query_position, *options)
    past = (None,) * 11 if view is None else (*view.key[:3], *view.value[:3], *view[2:7])
    result: tuple[Tensor, Tensor] = torch.ops.kivi.extend_attention(
        q,
        k,
        v,
        *past,
        query_position,
        valid,
        mask,
        s_aux,
        *flat(spec.key, q.shape[3]),
        *flat(spec.value, v.shape[3]),
        spec.sink_length,
        scale,
        sliding_window,
        softcap,
    )
    return result
