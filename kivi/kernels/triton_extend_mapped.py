"""Attention of many new tokens over a mapped past: the operator `kivi::mapped_extend`.

As in triton_mapped.py the query is mapped for the pages; what they give is mapped back before it is
merged with what the exact slots and the new tokens give. The Hopper kernel does it all; for the
portable one, pages are a launch of their own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kivi.kernels import triton_extend_hopper as hopper
from kivi.kernels import triton_extend_portable as portable
from kivi.kernels import triton_fast
from kivi.kernels.triton_mapped import inverse, map_query, mapping
from kivi.kernels.triton_portable import INTERPRETED
from kivi.spec import TILE_ROWS, KVSpec


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
    smooth: Tensor | None,
    s_aux: Tensor | None,
    key_bits: int,
    key_channel: bool,
    key_group: int,
    value_bits: int,
    value_channel: bool,
    value_group: int,
    key_smooth: bool,
    value_smooth: bool,
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
    query_position = query_position.contiguous()
    valid = None if valid is None else valid.contiguous().view(torch.uint8)
    key, value = (key_bits, key_channel, key_group), (value_bits, value_channel, value_group)
    one = (key_zero is None or key_center is None) and (value_zero is None or value_center is None)
    if mask is None and one and hopper.serves(q, dv, key, value, scale):
        assert key_scale is not None and value_scale is not None
        both, zero = (blocks[0], blocks[1]), (offsets[0], offsets[1])
        how = triton_fast.Mapped(0, both, (key_smooth, value_smooth), zero)
        return hopper.extend(
            q,
            k,
            v,
            (key_words, key_scale, key_zero, key_center),
            (value_words, value_scale, value_zero, value_center),
            (table, packed, exact_key, exact_value, length, query_position),
            valid,
            smooth,
            s_aux,
            (key, value),
            how,
            sinks,
            scale,
            sliding_window,
            softcap,
        )
    mapped = map_query(q, smooth[..., :d] if smooth is not None and key_smooth else None, blocks[0])
    rows = hq // hkv * t
    plan = portable.tuning(rows, max(d, dv), q.dtype, (key_bits, value_bits))
    programs, tile = b * hkv * -(-rows // plan.rows), TILE_ROWS * plan.planes
    sizes = (portable.reach(table, sliding_window), exact_key.shape[2] - 1 + t)
    splits = [portable.division(programs, -(-n // tile), plan.resident, q.device) for n in sizes]

    def launch(part: Tensor, part_lse: Tensor) -> None:
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
                query_position,
                valid,
                mask,
                s_aux,
                part,
                part_lse,
                key,
                value,
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
        if smooth is not None and value_smooth:
            found *= smooth[..., -dv:].repeat_interleave(hq // hkv, 1)[:, :, None, None]

    return portable.merged(q, dv, sum(splits), s_aux, launch)


_SCHEMA = """mapped_extend(
    Tensor q, Tensor k, Tensor v,
    Tensor key_words, Tensor? key_scale, Tensor? key_zero, Tensor? key_center,
    Tensor value_words, Tensor? value_scale, Tensor? value_zero, Tensor? value_center,
    Tensor table, Tensor packed, Tensor exact_key, Tensor exact_value, Tensor length,
    Tensor query_position, Tensor? valid, Tensor? mask,
    Tensor? smooth, Tensor? s_aux,
    int key_bits, bool key_channel, int key_group,
    int value_bits, bool value_channel, int value_group,
    bool key_smooth, bool value_smooth, int[] blocks, float[] offsets,
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
        view.smooth if any(mapped.smooth) else None,
        s_aux,
        *key,
        *value,
        *mapped.smooth,
        [*mapped.block],
        [*mapped.zero],
        spec.sink_length,
        scale,
        sliding_window,
        softcap,
    )
    return out
