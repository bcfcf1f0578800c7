"""Decode attention over packed pages: the operator `kivi::decode_attention` around its kernels.

The tokens of a row are split over programs so that every multiprocessor has some, whatever the
batch; a second small kernel then merges their partial results. `kivi::mapped_attention` is the same
for packed tokens that were mapped (rotated, smoothed) or centered before they were quantized.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kivi.grids import symmetric_offset
from kivi.kernels import triton_fast
from kivi.kernels.triton_direct import direct
from kivi.kernels.triton_mapped import mapped_attention, read, ready
from kivi.kernels.triton_portable import INTERPRETED, portable
from kivi.spec import KVSpec


def _attend(
    q: Tensor,
    key: tuple[Tensor, Tensor | None, Tensor | None],
    value: tuple[Tensor, Tensor | None, Tensor | None],
    state: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor],
    s_aux: Tensor | None,
    kind: triton_fast.Kind,
    scale: float,
    sliding_window: int | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    options = (scale, sliding_window, softcap)
    out = triton_fast.decode(q, key, value, state, s_aux, kind, *options)
    if out is not None:
        return out
    q, formats = q if q.stride(3) == 1 else q.contiguous(), kind.formats
    return portable(
        q,
        q,
        (*key, None),
        (*value, None),
        (*state, s_aux),
        formats,
        (symmetric_offset(formats[0][0] or 1), symmetric_offset(formats[1][0] or 1)),
        kind.sinks,
        *options,
    )


def _decode_attention(
    q: Tensor,
    key_words: Tensor,
    key_scale: Tensor | None,
    key_zero: Tensor | None,
    value_words: Tensor,
    value_scale: Tensor | None,
    value_zero: Tensor | None,
    table: Tensor,
    packed: Tensor,
    exact_key: Tensor,
    exact_value: Tensor,
    length: Tensor,
    query_position: Tensor,
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
    return _attend(
        q,
        (key_words, key_scale, key_zero),
        (value_words, value_scale, value_zero),
        (table, packed, exact_key, exact_value, length, query_position),
        s_aux,
        triton_fast.kind(
            ((key_bits, key_channel, key_group), (value_bits, value_channel, value_group)),
            sinks,
            None,
        ),
        scale,
        sliding_window,
        softcap,
    )


_SCHEMA = """decode_attention(
    Tensor q, Tensor key_words, Tensor? key_scale, Tensor? key_zero,
    Tensor value_words, Tensor? value_scale, Tensor? value_zero,
    Tensor table, Tensor packed, Tensor exact_key, Tensor exact_value, Tensor length,
    Tensor query_position, Tensor? s_aux,
    int key_bits, bool key_channel, int key_group,
    int value_bits, bool value_channel, int value_group,
    int sinks, float scale, int? sliding_window, float? softcap
) -> (Tensor, Tensor)"""


def _fake(q: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    exact_value = others[9]
    out = q.new_empty(*q.shape[:3], exact_value.shape[3])
    return out, q.new_empty(q.shape[:3], dtype=torch.float32)


_library = torch.library.Library(__name__.partition(".")[0], "FRAGMENT")
_library.define(_SCHEMA)
_library.impl("decode_attention", _decode_attention, "CUDA")
if INTERPRETED:
    _library.impl("decode_attention", _decode_attention, "CPU")
torch.library.register_fake("kivi::decode_attention", _fake, lib=_library)


def decode_attention(
    q: Tensor,
    view: Any,
    spec: KVSpec,
    query_position: Tensor,
    scale: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of a few query tokens that are already in the cache's exact slots.

    Packed tokens must be older than every query.

    Args:
        q: `[B, Hq, T, D]`.
        view: the layer's state (CacheView), the T new tokens included; contiguous tensors.
        spec: how the layer is packed.
        query_position: `[B, T]` int64; a query sees the tokens at or before its own position.
        scale: factor of the scores.
        sliding_window: a query sees only this many tokens, itself included.
        softcap: scores become `softcap * tanh(score / softcap)`.
        s_aux: `[Hq]` sink logits (GPT-OSS).

    Returns:
        out `[B, Hq, T, Dv]` in q's dtype; log-sum-exp `[B, Hq, T]` float32.
    """
    if s_aux is not None:
        s_aux = s_aux.contiguous()
    short = direct(q, s_aux, cpu=INTERPRETED)
    # As the operator takes them: Triton compiles anew for numbers of other types.
    scale, softcap = float(scale), None if softcap is None else float(softcap)
    if short:
        shape, device, k, v = q.shape, q.device, view[0], view[1]
        found, plan, third = ready(q, shape, device, view, spec, s_aux, softcap)
        if plan is not None and sliding_window is None:
            pages = (k[0], k[1], k[third[0]], v[0], v[1], v[third[1]])
            others = (*pages, *view[2:7], query_position)
            smooth = None if found.mapped is None else view[7]
            return triton_fast.run(plan, q, shape, device, others, s_aux, smooth, scale, softcap)
    else:  # compilers complain of a cache in the way
        found = read(spec, q.shape[3], view[5].shape[3])
    if found.mapped is not None:
        options = (query_position, s_aux, scale, sliding_window, softcap)
        return mapped_attention(q, view, found, short, *options)
    key, value, state = view[0][:3], view[1][:3], (*view[2:7], query_position)
    if short:
        kind = triton_fast.kind(found.formats, spec.sink_length, None)
        return _attend(q, key, value, state, s_aux, kind, scale, sliding_window, softcap)
    of_spec = (*found.formats[0], *found.formats[1], spec.sink_length)
    out: tuple[Tensor, Tensor] = torch.ops.kivi.decode_attention(
        q, *key, *value, *state, s_aux, *of_spec, scale, sliding_window, softcap
    )
    return out
