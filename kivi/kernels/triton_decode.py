"""Decode attention over packed pages: the operator `kivi::decode_attention` around its kernels.

The tokens of a row are split over programs so that every multiprocessor has some, whatever the
batch; a second small kernel then merges their partial results.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from kivi.grids import symmetric_offset
from kivi.kernels import triton_fast
from kivi.kernels.triton_attend import attend
from kivi.kernels.triton_tile_rows import LOG2E, combine
from kivi.kernels.triton_tiles import padded
from kivi.packing import widths
from kivi.spec import PAGE_TOKENS, TILE_ROWS, KVSpec, QuantSpec, Spec

INTERPRETED = not isinstance(attend, triton.JITFunction)
# Whether codes are read as denormals, and that by inline assembly (triton_tiles).
DENORMAL = torch.version.hip is None
FAST = DENORMAL and not INTERPRETED
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_HEAD_DIM = 512


class Tuning(NamedTuple):
    """How the work is divided.

    `rows` of a block, `step`: tokens of a plane at a time, `warps` of a program, `resident`:
    programs that a multiprocessor holds at once, `registers` of a thread at most (None: any).
    """

    rows: int
    step: int
    warps: int
    resident: int
    registers: int | None = None


@cache
def tuning(
    rows: int,
    head_dim: int,
    key: tuple[int, bool, int],
    value: tuple[int, bool, int],
    dtype: torch.dtype,
) -> Tuning:
    """What fits the registers.

    Args:
        rows: query rows of a KV head.
        head_dim: the larger one.
        key: bits (0: none), whether scales are per channel, and the group size.
        value: likewise.
        dtype: of the queries.
    """
    # Above two warps registers spill: then it is cheaper to read the pages again.
    width = padded(head_dim) * (dtype.itemsize // 2)
    block = max(8, min(64, 2048 // width, triton.next_power_of_2(rows)))
    size = width * block
    warps = min(8, max(1, size // 1024))
    simple = all(bits in (1, 2, 4, 8) and (c or g >= 32) for bits, c, g in (key, value))
    small = any(channel and group == 16 for _, channel, group in (key, value))
    step = 32 if simple and not small and size <= 1024 else 16
    return Tuning(block, step, warps, 8 // warps)


@cache
def _multiprocessors(device: torch.device) -> int:
    if device.type == "cpu":
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@cache
def _planes(key_bits: int, value_bits: int) -> int:
    """Planes of a chunk: as many as the widest part has in a tile, not too many for registers."""
    return min(8, *(16 // max(widths(bits)) if bits else 4 for bits in (key_bits, value_bits)))


def _division(programs: int, chunks: int, plan: Tuning, device: torch.device) -> int:
    """Into how many shares the chunks of a row go; nothing here may read the device."""
    return max(1, min(plan.resident * _multiprocessors(device) // programs, chunks))


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
    b, hq, t, d = q.shape
    hkv, slots, dv = exact_value.shape[1:]
    if q.stride(3) != 1:
        q = q.contiguous()
    rows = hq // hkv * t
    formats = (key_bits, key_channel, key_group), (value_bits, value_channel, value_group)
    if triton_fast.serves(q, dv, rows, *formats, sliding_window):
        assert key_scale is not None and value_scale is not None
        with torch.cuda.device(q.device):
            return triton_fast.decode(
                q,
                (key_words, key_scale, key_zero),
                (value_words, value_scale, value_zero),
                table,
                packed,
                exact_key,
                exact_value,
                length,
                query_position,
                s_aux,
                (key_bits, value_bits),
                (key_group, value_group),
                sinks,
                scale,
                softcap,
            )
    key, value = (key_bits, key_channel, key_group), (value_bits, value_channel, value_group)
    plan = tuning(rows, max(d, dv), key, value, q.dtype)
    planes = _planes(key_bits, value_bits)
    blocks = -(-rows // plan.rows)
    programs, columns = b * hkv * blocks, table.shape[1]
    own_cost = (slots - 1) // (TILE_ROWS * planes) + 1
    chunks = columns * (PAGE_TOKENS // TILE_ROWS // planes) + own_cost
    splits = _division(programs, chunks, plan, q.device)
    out = torch.empty((b, hq, t, dv), dtype=q.dtype, device=q.device)
    lse = torch.empty((b, hq, t), dtype=torch.float32, device=q.device)
    part, part_lse = out, lse
    if splits > 1:
        part = torch.empty((b, hq, t, splits, dv), dtype=torch.float32, device=q.device)
        part_lse = torch.empty((b, hq, t, splits), dtype=torch.float32, device=q.device)
    options = {} if plan.registers is None else {"maxnreg": plan.registers}
    wide = INTERPRETED and q.dtype == torch.bfloat16
    factor = scale * LOG2E.value if softcap is None else scale * 2 * LOG2E.value / softcap
    with torch.cuda.device(q.device) if q.is_cuda else nullcontext():
        attend[(programs * splits,)](
            q,
            key_words,
            key_scale,
            key_zero,
            value_words,
            value_scale,
            value_zero,
            table,
            packed,
            length,
            query_position.contiguous(),
            exact_key,
            exact_value,
            s_aux,
            part,
            part_lse,
            q.stride(0),
            q.stride(1),
            q.stride(2),
            factor,
            (softcap or 0.0) * LOG2E.value,
            sliding_window or 0,
            hkv,
            columns,
            t,
            rows,
            blocks,
            splits,
            sinks,
            slots - sinks - 1,
            own_cost,
            D=d,
            DV=dv,
            K_BITS=key_bits,
            K_CHANNEL=key_channel,
            K_G=key_group,
            K_OFFSET=symmetric_offset(key_bits) if key_bits else 0.0,
            V_BITS=value_bits,
            V_CHANNEL=value_channel,
            V_G=value_group,
            V_OFFSET=symmetric_offset(value_bits) if value_bits else 0.0,
            PLANES=planes,
            ROWS=plan.rows,
            STEP=plan.step,
            WINDOW=sliding_window is not None,
            CAP=softcap is not None,
            FINAL=splits == 1,
            DENORMAL=DENORMAL,
            FAST=FAST,
            WIDE=wide,
            num_warps=plan.warps,
            num_stages=1,
            **options,
        )
        if splits > 1:
            combine[(b * hq * t,)](
                part,
                part_lse,
                s_aux,
                out,
                lse,
                hq,
                t,
                splits,
                DV=dv,
                STEP=16,
                WIDE=wide,
            )
    return out, lse


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


def supports(
    key: Spec | None,
    value: Spec | None,
    head_dim: int,
    value_head_dim: int,
    dtype: torch.dtype,
) -> str | None:
    """Why `decode_attention` cannot serve a layer; None if it can."""
    if dtype not in DTYPES:
        return f"dtype={dtype} is not one of {DTYPES}"
    for name, spec, size in (("key", key, head_dim), ("value", value, value_head_dim)):
        if size > MAX_HEAD_DIM:
            return f"the {name} head dimension {size} is more than {MAX_HEAD_DIM}"
        if spec is not None and not isinstance(spec, QuantSpec):
            return f"{name}: the kernels do not take {type(spec).__name__}, a format of its own"
        for field in ("clip", "transform", "center", "token_norm", "smooth"):
            wanted = getattr(spec, field, None)
            if spec is not None and wanted != getattr(QuantSpec, field):
                return f"{name}: the kernels do not take {field}={wanted!r}"
        if spec is not None and spec.grid not in ("asymmetric", "symmetric", "least_squares"):
            return f"{name}: the kernels do not take grid={spec.grid!r}"
        try:
            _flat(spec, size)
        except ValueError as error:
            return f"{name}: {error}"
    return None


def _flat(spec: Spec | None, head_dim: int) -> tuple[int, bool, int]:
    """Bits (0: none), whether scales are per channel, and the group size."""
    if spec is None:
        return 0, False, head_dim
    assert isinstance(spec, QuantSpec)
    return spec.bits, spec.axis == "channel", spec.group(head_dim)


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
    out: tuple[Tensor, Tensor] = torch.ops.kivi.decode_attention(
        q,
        *view.key[:3],
        *view.value[:3],
        view.table,
        view.packed,
        view.exact_key,
        view.exact_value,
        view.length,
        query_position,
        s_aux,
        *_flat(spec.key, q.shape[3]),
        *_flat(spec.value, view.exact_value.shape[3]),
        spec.sink_length,
        scale,
        sliding_window,
        softcap,
    )
    return out
