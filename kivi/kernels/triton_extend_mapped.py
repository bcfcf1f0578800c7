"""Attention of many new tokens over a mapped past: the operator `kivi::mapped_extend`.

As in triton_mapped.py the query is mapped for the pages, in a launch of their own; what they give
is mapped back before it is merged with what the exact slots and the new tokens give.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from kivi.kernels import triton_extend_portable as portable
from kivi.kernels.triton_mapped import inverse, map_query, mapping
from kivi.kernels.triton_portable import INTERPRETED
from kivi.kernels.triton_tile_rows import combine
from kivi.spec import PAGE_TOKENS, TILE_ROWS, KVSpec


def _extend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_words: Tensor,
    key_scale: Tensor | None,
    key_zero: Tensor | None,
    key_center: Tensor | None,
    value_words: Tensor,
    value_scale: Tensor | None,
    value_zero: Tensor | None,
    value_center: Tensor | None,
    table: Tensor,
    packed: Tensor,
    exact_key: Tensor,
    exact_value: Tensor,
    length: Tensor,
    query_position: Tensor,
    valid: Tensor | None,
    mask: Tensor | None,
    key_smooth: Tensor | None,
    value_smooth: Tensor | None,
    s_aux: Tensor | None,
    key_bits: int,
    key_channel: bool,
    key_group: int,
    value_bits: int,
    value_channel: bool,
    value_group: int,
    blocks: list[int],
    offsets: list[float],
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
    valid = None if valid is None else valid.contiguous().view(torch.uint8)
    mapped = map_query(q, key_smooth, blocks[0])

    rows = hq // hkv * t
    plan = portable.tuning(rows, max(d, dv), q.dtype, (key_bits, value_bits))
    programs, tile = b * hkv * -(-rows // plan.rows), TILE_ROWS * plan.planes
    past = table.shape[1] * PAGE_TOKENS
    if sliding_window is not None:
        past = min(past, sliding_window + t)
    sizes = (past, exact_key.shape[2] - 1 + t)
    splits = [portable.division(programs, -(-n // tile), plan.resident, q.device) for n in sizes]
    part = torch.empty((b, hq, t, sum(splits), dv), dtype=torch.float32, device=q.device)
    part_lse = torch.empty((b, hq, t, sum(splits)), dtype=torch.float32, device=q.device)
    out = torch.empty((b, hq, t, dv), dtype=q.dtype, device=q.device)
    lse = torch.empty((b, hq, t), dtype=torch.float32, device=q.device)
    with torch.cuda.device(q.device) if q.is_cuda else nullcontext():
        for pages_only, queries, count, first in (
            (True, mapped, splits[0], 0),
            (False, q, splits[1], splits[0]),
        ):
            portable.launch(
                queries,
                k,
                v,
                (key_words, key_scale, key_zero, value_words, value_scale, value_zero),
                (table, packed, exact_key, exact_value, length),
                query_position.contiguous(),
                valid,
                mask,
                s_aux,
                part,
                part_lse,
                (key_bits, key_channel, key_group),
                (value_bits, value_channel, value_group),
                sinks,
                scale,
                sliding_window,
                softcap,
                count,
                plan,
                sum(splits),
                first,
                pages_only,
                (key_center, value_center),
                (offsets[0], offsets[1]),
            )
        found = part[:, :, :, : splits[0]]
        if blocks[1] > 1:
            found.copy_(found @ inverse(dv, blocks[1], q.device))
        if value_smooth is not None:
            found *= value_smooth.repeat_interleave(hq // hkv, 1)[:, :, None, None]
        wide = INTERPRETED and q.dtype == torch.bfloat16
        combine[(b * hq * t,)](
            part, part_lse, s_aux, out, lse, hq, t, sum(splits), DV=dv, STEP=16, WIDE=wide
        )
    return out, lse


_SCHEMA = """mapped_extend(
    Tensor q, Tensor k, Tensor v,
    Tensor key_words, Tensor? key_scale, Tensor? key_zero, Tensor? key_center,
    Tensor value_words, Tensor? value_scale, Tensor? value_zero, Tensor? value_center,
    Tensor table, Tensor packed, Tensor exact_key, Tensor exact_value, Tensor length,
    Tensor query_position, Tensor? valid, Tensor? mask,
    Tensor? key_smooth, Tensor? value_smooth, Tensor? s_aux,
    int key_bits, bool key_channel, int key_group,
    int value_bits, bool value_channel, int value_group,
    int[] blocks, float[] offsets,
    int sinks, float scale, int? sliding_window, float? softcap
) -> (Tensor, Tensor)"""


def _fake(q: Tensor, k: Tensor, v: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    out = q.new_empty(*q.shape[:3], v.shape[3])
    return out, q.new_empty(q.shape[:3], dtype=torch.float32)


_library = torch.library.Library(__name__.partition(".")[0], "FRAGMENT")
_library.define(_SCHEMA)
_library.impl("mapped_extend", _extend, "CUDA")
if INTERPRETED:
    _library.impl("mapped_extend", _extend, "CPU")
torch.library.register_fake("kivi::mapped_extend", _fake, lib=_library)


def mapped_extend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    view: Any,
    spec: KVSpec,
    query_position: Tensor,
    scale: float,
    valid: Tensor | None,
    mask: Tensor | None,
    sliding_window: int | None,
    softcap: float | None,
    s_aux: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`triton_extend.extend_attention` for specs with a transform, centers or smoothing."""
    d, dv = q.shape[3], v.shape[3]
    (key, value), mapped = mapping(spec, d, dv)
    wide = d if mapped.smooth[0] else 0
    out: tuple[Tensor, Tensor] = torch.ops.kivi.mapped_extend(
        q,
        k,
        v,
        *view.key[:4],
        *view.value[:4],
        *view[2:7],
        query_position,
        valid,
        mask,
        view.smooth[..., :wide] if wide else None,
        view.smooth[..., wide:] if mapped.smooth[1] else None,
        s_aux,
        *key,
        *value,
        [*mapped.block],
        [*mapped.zero],
        spec.sink_length,
        scale,
        sliding_window,
        softcap,
    )
    return out
