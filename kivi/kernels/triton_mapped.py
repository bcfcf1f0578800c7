"""Decode attention over tokens that were mapped or centered: the operator `kivi::mapped_attention`.

Packed keys are `M k - center`, and `<q, k> = <M^-T q, M k>`: the query is mapped for the pages, not
for the exact slots. What the pages give of values is mapped back before both are merged.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kivi.grids import zero_code
from kivi.kernels import triton_fast
from kivi.kernels.triton_formats import Formats, flat, is_plain
from kivi.kernels.triton_portable import INTERPRETED, portable
from kivi.spec import PAGE_TOKENS, KVSpec, QuantSpec
from kivi.transforms import inverse_hadamard


@cache
def inverse(size: int, block: int, device: torch.device) -> Tensor:
    """The matrix of `inverse_hadamard`, `[size, size]` float32. Made before a graph captures it."""
    return inverse_hadamard(torch.eye(size), block).to(device)


def map_query(q: Tensor, smooth: Tensor | None, block: int) -> Tensor:
    """The query `[B, Hq, T, D]` that goes with mapped keys, in q's dtype.

    Args:
        q: the query.
        smooth: `[B, Hkv, D]`, what the keys' channels were divided by.
        block: channels that were rotated together; 1: none.
    """
    x = q.float()
    if smooth is not None:
        x = x * smooth.repeat_interleave(q.shape[1] // smooth.shape[1], 1).unsqueeze(2)
    if block > 1:
        x = x @ inverse(q.shape[3], block, q.device)
    top = torch.finfo(q.dtype).max
    return x.clamp(-top, top).to(q.dtype)


def prepare(spec: KVSpec, head_dims: tuple[int, int], device: torch.device) -> None:
    """Make what calls with this spec need on a device."""
    for one, size in zip((spec.key, spec.value), head_dims, strict=True):
        if isinstance(one, QuantSpec) and one.block(size) > 1:
            # As tensors name the device.
            inverse(size, one.block(size), torch.empty(0, device=device).device)


def _attend(
    q: Tensor,
    key: tuple[Tensor, Tensor | None, Tensor | None, Tensor | None],
    value: tuple[Tensor, Tensor | None, Tensor | None, Tensor | None],
    state: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor],
    smooth: Tensor | None,
    s_aux: Tensor | None,
    formats: Formats,
    mapped: triton_fast.Mapped,
    sinks: int,
    scale: float,
    sliding_window: int | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """`key`, `value`: words, scale, zero and center; the rest as `triton_fast.decode` says."""
    options = (sinks, scale, sliding_window, softcap)
    plain = [x[1] is not None and x[2] is None for x in (key, value)]
    centers = [
        mapped.center if x[3] is None else PAGE_TOKENS // x[3].shape[2] for x in (key, value)
    ]
    if all(plain) and centers[0] == centers[1]:
        kind = triton_fast.kind(formats, sinks, mapped._replace(center=centers[0]))
        own = (*key[:2], key[3]), (*value[:2], value[3])
        out = triton_fast.decode(
            q, *own, state, s_aux, kind, scale, sliding_window, softcap, smooth
        )
        if out is not None:
            return out
    b, d = q.shape[0], q.shape[3]
    hkv, dv = state[3].shape[1], state[3].shape[3]
    q = q.contiguous()
    factors = None if smooth is None or not mapped.smooth[0] else smooth[..., :d]

    def unmap(x: Tensor) -> Tensor:
        if mapped.block[1] > 1:
            x = x @ inverse(dv, mapped.block[1], q.device)
        if smooth is None or not mapped.smooth[1]:
            return x
        by_head = x.view(b, hkv, -1, *x.shape[2:]) * smooth[:, :, None, None, None, -dv:]
        return by_head.flatten(1, 2)

    query = map_query(q, factors, mapped.block[0])
    return portable(q, query, key, value, (*state, s_aux), formats, mapped.zero, *options, unmap)


def _mapped_attention(
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
    smooth: Tensor | None,
    s_aux: Tensor | None,
    key_bits: int,
    key_channel: bool,
    key_group: int,
    value_bits: int,
    value_channel: bool,
    value_group: int,
    key_block: int,
    value_block: int,
    key_smooth: bool,
    value_smooth: bool,
    key_zero_code: float,
    value_zero_code: float,
    sinks: int,
    scale: float,
    sliding_window: int | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    return _attend(
        q,
        (key_words, key_scale, key_zero, key_center),
        (value_words, value_scale, value_zero, value_center),
        (table, packed, exact_key, exact_value, length, query_position),
        smooth,
        s_aux,
        ((key_bits, key_channel, key_group), (value_bits, value_channel, value_group)),
        triton_fast.Mapped(
            0,
            (key_block, value_block),
            (key_smooth, value_smooth),
            (key_zero_code, value_zero_code),
        ),
        sinks,
        scale,
        sliding_window,
        softcap,
    )


_SCHEMA = """mapped_attention(
    Tensor q,
    Tensor key_words, Tensor? key_scale, Tensor? key_zero, Tensor? key_center,
    Tensor value_words, Tensor? value_scale, Tensor? value_zero, Tensor? value_center,
    Tensor table, Tensor packed, Tensor exact_key, Tensor exact_value, Tensor length,
    Tensor query_position, Tensor? smooth, Tensor? s_aux,
    int key_bits, bool key_channel, int key_group,
    int value_bits, bool value_channel, int value_group,
    int key_block, int value_block, bool key_smooth, bool value_smooth,
    float key_zero_code, float value_zero_code,
    int sinks, float scale, int? sliding_window, float? softcap
) -> (Tensor, Tensor)"""


def _fake(q: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    out = q.new_empty(*q.shape[:3], others[11].shape[3])
    return out, q.new_empty(q.shape[:3], dtype=torch.float32)


_library = torch.library.Library(__name__.partition(".")[0], "FRAGMENT")
_library.define(_SCHEMA)
_library.impl("mapped_attention", _mapped_attention, "CUDA")
if INTERPRETED:
    _library.impl("mapped_attention", _mapped_attention, "CPU")
torch.library.register_fake("kivi::mapped_attention", _fake, lib=_library)


def mapping(spec: KVSpec, head_dim: int, value_head_dim: int) -> tuple[Formats, triton_fast.Mapped]:
    """What the kernels are told of a spec; the center they see."""
    both = (spec.key, head_dim), (spec.value, value_head_dim)
    ours = [(x if isinstance(x, QuantSpec) else None, size) for x, size in both]
    smooth = [x is not None and x.smooth is not None for x, _ in ours]
    zero = [zero_code(x.bits, x.grid) if x else 0.0 for x, _ in ours]
    block = [x.block(size) if x else 1 for x, size in ours]
    mapped = triton_fast.Mapped(0, (block[0], block[1]), (smooth[0], smooth[1]), (zero[0], zero[1]))
    return (flat(*both[0]), flat(*both[1])), mapped


class Known(NamedTuple):
    """What the kernels are told of a spec for these head dimensions, itself included.

    `mapped`: None for plain formats.
    """

    spec: KVSpec
    formats: Formats
    mapped: triton_fast.Mapped | None


def read(spec: KVSpec, head_dim: int, value_head_dim: int) -> Known:
    """What the operators are told of a spec."""
    if is_plain(spec.key) and is_plain(spec.value):
        return Known(spec, (flat(spec.key, head_dim), flat(spec.value, value_head_dim)), None)
    return Known(spec, *mapping(spec, head_dim, value_head_dim))


def _kind(known: Known) -> triton_fast.Kind | None:
    """As which kind `triton_fast` serves a spec; None if it does not."""
    spec, formats, mapped = known
    if mapped is None:
        return triton_fast.kind(formats, spec.sink_length, None)
    both = [x for x in (spec.key, spec.value) if isinstance(x, QuantSpec) and not x.has_zero]
    centers = [x.center or 0 for x in both]
    if len(both) < 2 or centers[0] != centers[1]:
        return None
    return triton_fast.kind(formats, spec.sink_length, mapped._replace(center=centers[0]))


class Ready(NamedTuple):
    """What calls with one spec and tensors of the same shapes share; see `triton_fast.run`.

    `third`: where zeros or centers stand among a page's tensors, of keys and of values; where there
    are none, scales.
    """

    known: Known
    plan: triton_fast.Plan | None
    third: tuple[int, int]


_READY: dict[tuple[Any, ...], Ready] = {}


def forget() -> None:
    """Forget all plans."""
    _READY.clear()
    triton_fast._plan.cache_clear()


def ready(
    q: Tensor,
    shape: tuple[int, ...],
    device: torch.device,
    view: Any,
    spec: KVSpec,
    s_aux: Tensor | None,
    softcap: float | None,
) -> Ready:
    """How a call goes the short way. `shape`, `device`: the query's.

    A spec that is known stays alive, so that its id is nobody else's: to hash and compare specs
    takes as long as a launch.
    """
    key, value, gpu = view[0], view[1], triton_fast._gpu(device)
    of_q, exact, columns = (device, q.dtype, shape), view[5].shape, view[2].shape[1]
    options = softcap is not None, None if s_aux is None else s_aux.dtype
    tensors = key[2] is not None, value[2] is not None, key[3] is not None, value[3] is not None
    call = (id(spec), gpu, of_q, exact, columns, options, tensors)
    found = _READY.get(call)
    if found is None:
        known, plan = read(spec, shape[3], exact[3]), None
        kind, own = _kind(known), tensors[:2] if known.mapped is None else tensors[2:]
        if kind is not None:
            plan = triton_fast._plan(gpu, *of_q, exact, columns, kind, *own, *options)
        at = 2 if known.mapped is None else 3
        if len(_READY) >= 4096:
            _READY.clear()
        third = at if own[0] else 1, at if own[1] else 1
        found = _READY[call] = Ready(known, plan, third)
    return found


def mapped_attention(
    q: Tensor,
    view: Any,
    known: Known,
    short: bool,
    query_position: Tensor,
    s_aux: Tensor | None,
    scale: float,
    sliding_window: int | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """`triton_decode.decode_attention` for specs with a transform, centers or smoothing."""
    key, value, state = view.key[:4], view.value[:4], (*view[2:7], query_position)
    formats, mapped, smooth = known.formats, known.mapped, view.smooth
    options = (known.spec.sink_length, scale, sliding_window, softcap)
    assert mapped is not None
    if short:
        return _attend(q, key, value, state, smooth, s_aux, formats, mapped, *options)
    result: tuple[Tensor, Tensor] = torch.ops.kivi.mapped_attention(
        q,
        *key,
        *value,
        *state,
        smooth,
        s_aux,
        *formats[0],
        *formats[1],
        *mapped.block,
        *mapped.smooth,
        *mapped.zero,
        *options,
    )
    return result
