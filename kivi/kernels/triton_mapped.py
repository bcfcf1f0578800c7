"""Decode attention over tokens that were mapped or centered: the operator `kivi::mapped_attention`.

Packed keys are `M k - center`, and `<q, k> = <M^-T q, M k>`: the query is mapped for the pages, not
for the exact slots. What the pages give of values is mapped back before both are merged.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from kivi.grids import zero_code
from kivi.kernels.triton_formats import flat
from kivi.kernels.triton_portable import INTERPRETED, portable
from kivi.spec import KVSpec, QuantSpec, Spec
from kivi.transforms import inverse_hadamard


@cache
def inverse(size: int, block: int, device: torch.device) -> Tensor:
    """The matrix of `inverse_hadamard`, `[size, size]` float32. Made before a graph captures it."""
    return inverse_hadamard(torch.eye(size), block).to(device)


def prepare(spec: KVSpec, head_dims: tuple[int, int], device: torch.device) -> None:
    """Make what calls with this spec need on a device."""
    device = torch.empty(0, device=device).device  # as tensors name it
    for one, size in zip((spec.key, spec.value), head_dims, strict=True):
        if isinstance(one, QuantSpec) and one.block(size) > 1:
            inverse(size, one.block(size), device)


def _attention(
    q: Tensor,
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
    b, d = q.shape[0], q.shape[3]
    hkv, dv = exact_value.shape[1], exact_value.shape[3]
    q = q.contiguous()
    mapped = q.view(b, hkv, -1, d).float()
    if key_smooth is not None:
        mapped = mapped * key_smooth.unsqueeze(2)
    if blocks[0] > 1:
        mapped = mapped @ inverse(d, blocks[0], q.device)
    top = torch.finfo(q.dtype).max

    def unmap(x: Tensor) -> Tensor:
        if blocks[1] > 1:
            x = x @ inverse(dv, blocks[1], q.device)
        if value_smooth is None:
            return x
        by_head = x.view(b, hkv, -1, *x.shape[2:]) * value_smooth[:, :, None, None, None]
        return by_head.flatten(1, 2)

    return portable(
        q,
        mapped.clamp(-top, top).to(q.dtype).view(q.shape),
        (key_words, key_scale, key_zero, key_center),
        (value_words, value_scale, value_zero, value_center),
        (table, packed, exact_key, exact_value, length, query_position, s_aux),
        ((key_bits, key_channel, key_group), (value_bits, value_channel, value_group)),
        (offsets[0], offsets[1]),
        sinks,
        scale,
        sliding_window,
        softcap,
        unmap,
    )


_SCHEMA = """mapped_attention(
    Tensor q,
    Tensor key_words, Tensor? key_scale, Tensor? key_zero, Tensor? key_center,
    Tensor value_words, Tensor? value_scale, Tensor? value_zero, Tensor? value_center,
    Tensor table, Tensor packed, Tensor exact_key, Tensor exact_value, Tensor length,
    Tensor query_position, Tensor? key_smooth, Tensor? value_smooth, Tensor? s_aux,
    int key_bits, bool key_channel, int key_group,
    int value_bits, bool value_channel, int value_group,
    int[] blocks, float[] offsets,
    int sinks, float scale, int? sliding_window, float? softcap
) -> (Tensor, Tensor)"""


def _fake(q: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    out = q.new_empty(*q.shape[:3], others[11].shape[3])
    return out, q.new_empty(q.shape[:3], dtype=torch.float32)


_library = torch.library.Library(__name__.partition(".")[0], "FRAGMENT")
_library.define(_SCHEMA)
_library.impl("mapped_attention", _attention, "CUDA")
if INTERPRETED:
    _library.impl("mapped_attention", _attention, "CPU")
torch.library.register_fake("kivi::mapped_attention", _fake, lib=_library)


def _block(spec: Spec | None, head_dim: int) -> int:
    return spec.block(head_dim) if isinstance(spec, QuantSpec) else 1


def _offset(spec: Spec | None) -> float:
    return zero_code(spec.bits, spec.grid) if isinstance(spec, QuantSpec) else 0.0


def mapped_attention(
    q: Tensor,
    view: Any,
    spec: KVSpec,
    query_position: Tensor,
    s_aux: Tensor | None,
    scale: float,
    sliding_window: int | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """`triton_decode.decode_attention` for specs with a transform, centers or smoothing."""
    d, dv = q.shape[3], view.exact_value.shape[3]
    wide = d if spec.key and spec.key.smooth else 0
    key_smooth, value_smooth = None, None
    if wide:
        key_smooth = view.smooth[..., :wide]
    if spec.value and spec.value.smooth:
        value_smooth = view.smooth[..., wide:]
    out: tuple[Tensor, Tensor] = torch.ops.kivi.mapped_attention(
        q,
        *view.key[:4],
        *view.value[:4],
        view.table,
        view.packed,
        view.exact_key,
        view.exact_value,
        view.length,
        query_position,
        key_smooth,
        value_smooth,
        s_aux,
        *flat(spec.key, d),
        *flat(spec.value, dv),
        [_block(spec.key, d), _block(spec.value, dv)],
        [_offset(spec.key), _offset(spec.value)],
        spec.sink_length,
        scale,
        sliding_window,
        softcap,
    )
    return out
