"""Host side of the portable decode kernel: how its work is divided, and its launch."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from kivi.kernels.triton_attend import attend
from kivi.kernels.triton_tile_rows import LOG2E, combine
from kivi.kernels.triton_tiles import padded
from kivi.packing import widths
from kivi.spec import PAGE_TOKENS, TILE_ROWS

INTERPRETED = not isinstance(attend, triton.JITFunction)
# Whether codes are read as denormals, and that by inline assembly (triton_tiles).
DENORMAL = torch.version.hip is None
FAST = DENORMAL and not INTERPRETED


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


def centered(center: Tensor | None) -> int:
    """Tokens that share a center; 32 where there are none."""
    return TILE_ROWS if center is None else PAGE_TOKENS // center.shape[2]


def _division(programs: int, chunks: int, plan: Tuning, device: torch.device) -> int:
    """Into how many shares the chunks of a row go; nothing here may read the device."""
    return max(1, min(plan.resident * _multiprocessors(device) // programs, chunks))


def portable(
    q: Tensor,
    mapped_q: Tensor,
    key: tuple[Tensor | None, ...],
    value: tuple[Tensor | None, ...],
    state: tuple[Tensor | None, ...],
    formats: tuple[tuple[int, bool, int], tuple[int, bool, int]],
    offsets: tuple[float, float],
    sinks: int,
    scale: float,
    sliding_window: int | None,
    softcap: float | None,
    unmap: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Launch the portable kernel.

    Args:
        q: `[B, Hq, T, D]`, for the exact slots; channels next to each other.
        mapped_q: for the pages, with the strides of q; q itself if nothing is mapped.
        key: words, scale, zero and center of the pages; `value` likewise.
        value: see key.
        state: table, packed, exact_key, exact_value, length, query_position and s_aux.
        formats: bits (0: none), whether per-channel and group size, of keys and of values.
        offsets: zeros over scales where no zero is stored.
        sinks: see `decode_attention`, as what follows.
        scale: see sinks.
        sliding_window: see sinks.
        softcap: see sinks.
        unmap: from what pages give, `[..., Dv]` float32, to values. None: they are values.
    """
    table, packed, exact_key, exact_value, length, query_position, s_aux = state
    assert table is not None and exact_value is not None and query_position is not None
    b, hq, t, d = q.shape
    hkv, slots, dv = exact_value.shape[1:]
    rows = hq // hkv * t
    (key_bits, key_channel, key_group), (value_bits, value_channel, value_group) = formats
    plan = tuning(rows, max(d, dv), *formats, q.dtype)
    planes = _planes(key_bits, value_bits)
    blocks = -(-rows // plan.rows)
    programs, columns = b * hkv * blocks, table.shape[1]
    own_cost = (slots - 1) // (TILE_ROWS * planes) + 1
    chunks = columns * (PAGE_TOKENS // TILE_ROWS // planes) + own_cost
    splits = _division(programs, chunks, plan, q.device)
    if unmap is not None:  # the exact slots are one more share
        splits = 1 + _division(programs, chunks - own_cost, plan, q.device)
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
            mapped_q,
            *key[:3],
            *value[:3],
            key[3],
            value[3],
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
            K_OFFSET=offsets[0],
            V_BITS=value_bits,
            V_CHANNEL=value_channel,
            V_G=value_group,
            V_OFFSET=offsets[1],
            K_C=centered(key[3]),
            V_C=centered(value[3]),
            ALONE=unmap is not None,
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
        if unmap is not None:
            part[..., :-1, :] = unmap(part[..., :-1, :])
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
