"""Host side of the portable kernel of extend_attention: tile shapes, and its launch."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from kivi.grids import symmetric_offset
from kivi.kernels.triton_flash import extend
from kivi.kernels.triton_portable import FAST, INTERPRETED, _multiprocessors, centered
from kivi.kernels.triton_tile_rows import LOG2E, combine
from kivi.kernels.triton_tiles import padded
from kivi.spec import PAGE_TOKENS


class Tuning(NamedTuple):
    """How the work is divided.

    `rows` of a block, `planes`: of 32 tokens in a tile, `warps` of a program, `stages` of its
    pipeline, `resident`: programs that a multiprocessor holds at once, `registers` of a thread at
    most (None: any).
    """

    rows: int
    planes: int
    warps: int
    stages: int
    resident: int
    registers: int | None = None


# A share of the past for each of so many programs at most: partial results cost memory.
MAX_SPLITS = 32


def division(programs: int, tiles: int, resident: int, device: torch.device) -> int:
    """Into how many shares the tiles of a row go; nothing here may read the device."""
    tiles = max(1, tiles)  # rows that have no pages yet
    slots = resident * _multiprocessors(device)
    most = max(1, min(MAX_SPLITS, tiles // 4, 2 * slots // programs + 4))
    # Rounds of programs, in units of a whole row; a share costs about what a tile or two do.
    return min(
        range(1, most + 1),
        key=lambda n: -(-programs * n // slots) * (1 / n + 2 / tiles) + (n > 1) * 4 / tiles,
    )


@cache
def tuning(rows: int, head_dim: int, dtype: torch.dtype, bits: tuple[int, int]) -> Tuning:
    """What fits the registers, and for 16-bit queries 99 KiB of shared memory.

    Args:
        rows: query rows of a KV head.
        head_dim: the larger one.
        dtype: of the queries.
        bits: of keys and values.
    """
    width = padded(head_dim)
    if dtype == torch.float32:
        return Tuning(16, 1, 4, 1, 2)
    block = max(16, min(128, 16384 // width, triton.next_power_of_2(rows)))
    warps = 8 if block * width >= 16384 else 4
    # Codes of 3 bits come from two tiles of words.
    stages = 2 if width <= 256 and 3 not in bits else 1
    return Tuning(block, 2 if width <= 128 else 1, warps, stages, 8 // warps)


def reach(table: Tensor | None, sliding_window: int | None) -> int:
    """Packed tokens that a query can see."""
    past = 0 if table is None else table.shape[1] * PAGE_TOKENS
    return past if sliding_window is None else min(past, sliding_window)


def merged(
    q: Tensor,
    value_head_dim: int,
    splits: int,
    s_aux: Tensor | None,
    launch: Callable[[Tensor, Tensor], None],
) -> tuple[Tensor, Tensor]:
    """What an operator returns; `launch` fills out and log-sum-exp, or so many shares of each."""
    b, hq, t, _ = q.shape
    out = torch.empty((b, hq, t, value_head_dim), dtype=q.dtype, device=q.device)
    lse = torch.empty((b, hq, t), dtype=torch.float32, device=q.device)
    with torch.cuda.device(q.device) if q.is_cuda else nullcontext():
        if splits == 1:
            launch(out, lse)
            return out, lse
        size = (b, hq, t, splits)
        part = torch.empty((*size, value_head_dim), dtype=torch.float32, device=q.device)
        part_lse = torch.empty(size, dtype=torch.float32, device=q.device)
        launch(part, part_lse)
        # fmt: off
        combine[(b * hq * t,)](
            part, part_lse, s_aux, out, lse, hq, t, splits,
            DV=value_head_dim, STEP=16, WIDE=INTERPRETED and q.dtype == torch.bfloat16,
        )
        # fmt: on
    return out, lse


def launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pages: tuple[Tensor | None, ...],
    past: tuple[Tensor | None, ...],
    query_position: Tensor,
    valid: Tensor | None,
    mask: Tensor | None,
    s_aux: Tensor | None,
    out: Tensor,
    lse: Tensor,
    key: tuple[int, bool, int],
    value: tuple[int, bool, int],
    sinks: int,
    scale: float,
    sliding_window: int | None,
    softcap: float | None,
    splits: int,
    plan: Tuning,
    total: int | None = None,
    first: int = 0,
    pages_only: bool | None = None,
    centers: tuple[Tensor | None, Tensor | None] = (None, None),
    offsets: tuple[float, float] | None = None,
) -> None:
    """Fill out and lse; with more than one split, they take partial results.

    Where two launches share the work, `pages_only` says which one this is, and out and lse take
    `total` splits, of which this one's begin at `first`. `centers`: of keys and values; `offsets`:
    zeros over scales where no zero is stored, those of symmetric grids by default.
    """
    b, hq, t, d = q.shape
    hkv, dv = v.shape[1], v.shape[3]
    table, exact_key = past[0], past[2]
    slots = 0 if exact_key is None else exact_key.shape[2] - 1
    ratio = hq // hkv
    blocks = -(-ratio * t // plan.rows)
    if offsets is None:
        offsets = (symmetric_offset(key[0] or 1), symmetric_offset(value[0] or 1))
    options = {} if plan.registers is None else {"maxnreg": plan.registers}
    extend[(b * hkv * blocks * splits,)](
        q,
        k,
        v,
        *pages,
        *centers,
        *past,
        query_position,
        valid,
        mask,
        s_aux,
        out,
        lse,
        *q.stride()[:3],
        *k.stride()[:3],
        *v.stride()[:3],
        0 if mask is None else mask.stride(0),
        0 if mask is None else mask.stride(2),
        scale * LOG2E.value if softcap is None else scale * 2 * LOG2E.value / softcap,
        (softcap or 0.0) * LOG2E.value,
        sliding_window or 0,
        hkv,
        0 if table is None else table.shape[1],
        t,
        ratio,
        blocks,
        splits,
        sinks,
        slots - sinks,
        total or splits,
        first,
        D=d,
        DV=dv,
        K_BITS=key[0],
        K_CHANNEL=key[1],
        K_G=key[2],
        K_OFFSET=offsets[0],
        V_BITS=value[0],
        V_CHANNEL=value[1],
        V_G=value[2],
        V_OFFSET=offsets[1],
        K_C=centered(centers[0]),
        V_C=centered(centers[1]),
        ROWS=plan.rows,
        PLANES=plan.planes,
        WINDOW=sliding_window is not None,
        CAP=softcap is not None,
        FINAL=(total or splits) == 1,
        PAGES=pages_only is not False,
        OTHERS=not pages_only,
        FAST=FAST,
        WIDE=INTERPRETED and q.dtype == torch.bfloat16,
        num_warps=plan.warps,
        num_stages=plan.stages,
        **options,
    )
