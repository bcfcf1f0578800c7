"""Host side of the Hopper kernel of extend_attention: what it serves, and its launch."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from kivi.kernels import triton_extend_portable as portable
from kivi.kernels import triton_fast
from kivi.kernels.triton_formats import Formats
from kivi.kernels.triton_hopper import extend_hopper
from kivi.kernels.triton_tile_rows import LOG2E
from kivi.spec import PAGE_TOKENS

HEAD_DIMS = (64, 128)
WIDTHS = (1, 2, 3, 4, 8)
GROUPS = (16, 32, 64, 128)
"""Channels of a token that share a scale."""
# Query rows and tokens of a tile, as the kernel has them.
ROWS, TOKENS = 128, 128


class Tuning(NamedTuple):
    """What a program takes.

    Registers of a thread that computes (`consumer`) and of one that brings tiles (`producer`), 256
    together; tiles of keys and of values in shared memory (`stages`).
    """

    consumer: int = 176
    producer: int = 80
    stages: int = 2


tuning = Tuning()


@cache
def _is_hopper(device: torch.device) -> bool:
    if device.type != "cuda" or torch.version.hip:
        return False
    return torch.cuda.get_device_capability(device)[0] == 9


def serves(
    q: Tensor,
    value_head_dim: int,
    key: tuple[int, bool, int],
    value: tuple[int, bool, int],
    scale: float,
) -> bool:
    """Whether the kernel can take queries over such pages (bits, per channel, group size)."""
    d = q.shape[3]
    return (
        q.dtype in (torch.float16, torch.bfloat16)
        and d == value_head_dim
        and d in HEAD_DIMS
        and key[0] in WIDTHS
        and (key[2] >= 32 if key[1] else key[2] in GROUPS)
        and value[0] in WIDTHS
        and not value[1]
        and value[2] in GROUPS
        and scale > 0
        and _is_hopper(q.device)
    )


def extend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
    value: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
    state: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor],
    valid: Tensor | None,
    smooth: Tensor | None,
    s_aux: Tensor | None,
    formats: Formats,
    mapped: triton_fast.Mapped,
    sinks: int,
    scale: float,
    sliding_window: int | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """What `triton_extend.extend_attention` says, of what `serves` allows.

    `key`, `value`: words, scale, zero and center of the pages, zeros and centers not both; `state`:
    table, packed, exact_key, exact_value, length and query_position; `smooth`: what channels were
    divided by, `[B, Hkv, n]` float32; `formats`: bits, whether per-channel and group size, of keys
    and of values; `mapped`: its `center` is not looked at.
    """
    (b, hq, t, d), hkv, slots = q.shape, k.shape[1], state[2].shape[2] - 1
    blocks = -(-(hq // hkv) * t // ROWS)
    tiles = -(-(portable.reach(state[0], sliding_window) + slots + t) // TOKENS)
    splits = portable.division(b * hkv * blocks, tiles, 1, q.device)

    def run(out: Tensor, lse: Tensor) -> None:
        limits = (sinks, scale, sliding_window, softcap)
        given = (q, k, v, key, value, state, valid, smooth, s_aux)
        launch(*given, out, lse, formats, mapped, *limits, blocks, splits)

    return portable.merged(q, d, splits, s_aux, run)


def launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
    value: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
    state: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor],
    valid: Tensor | None,
    smooth: Tensor | None,
    s_aux: Tensor | None,
    out: Tensor,
    lse: Tensor,
    formats: Formats,
    mapped: triton_fast.Mapped,
    sinks: int,
    scale: float,
    sliding_window: int | None,
    softcap: float | None,
    blocks: int,
    splits: int,
) -> None:
    """Fill out and lse, or where there are several splits partial results: see `extend`.

    `blocks`: of query rows of a KV head.
    """
    b, _, t, d = q.shape
    table, packed, exact_key, exact_value, length, query_position = state
    hkv, slots = exact_key.shape[1], exact_key.shape[2] - 1
    # Beside scales there are zeros, or centers, or nothing that is read.
    beside = [next(x for x in pages[:0:-1] if x is not None) for pages in (key, value)]
    zeros = zip((key, value), mapped.zero, strict=True)
    offset = [code if pages[2] is None else 0.0 for pages, code in zeros]
    shared = [0 if x is None else PAGE_TOKENS // x.shape[2] for x in (key[3], value[3])]
    extend_hopper[(b * hkv * blocks * splits,)](
        q,
        k,
        v,
        *key[:2],
        beside[0],
        *value[:2],
        beside[1],
        lse if smooth is None else smooth,
        table,
        packed,
        exact_key,
        exact_value,
        length,
        query_position,
        query_position if valid is None else valid,
        lse if s_aux is None else s_aux,
        out,
        lse,
        *q.stride()[:3],
        *k.stride()[:3],
        *v.stride()[:3],
        scale * LOG2E.value if softcap is None else scale * 2 * LOG2E.value / softcap,
        (softcap or 0.0) * LOG2E.value,
        sliding_window or 0,
        hkv,
        table.shape[1],
        t,
        q.shape[1] // hkv,
        blocks,
        splits,
        sinks,
        slots,
        D=d,
        KB=formats[0][0],
        K_CHANNEL=formats[0][1],
        KG=formats[0][2],
        K_OFFSET=offset[0],
        K_C=shared[0],
        K_BLOCK=mapped.block[0],
        K_SMOOTH=mapped.smooth[0],
        VB=formats[1][0],
        VG=formats[1][2],
        V_OFFSET=offset[1],
        V_C=shared[1],
        V_BLOCK=mapped.block[1],
        V_SMOOTH=mapped.smooth[1],
        WINDOW=sliding_window is not None,
        CAP=softcap is not None,
        AUX=s_aux is not None,
        VALID=valid is not None,
        FINAL=splits == 1,
        STAGES=tuning.stages,
        CONSUMER_REGISTERS=tuning.consumer,
        PRODUCER_REGISTERS=tuning.producer,
        num_warps=4,
    )
