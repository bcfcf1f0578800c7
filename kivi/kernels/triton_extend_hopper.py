"""Host side of the Hopper kernel of extend_attention: what it serves, and its launch."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from kivi.grids import symmetric_offset
from kivi.kernels.triton_hopper import extend_hopper
from kivi.kernels.triton_tile_rows import LOG2E

HEAD_DIMS = (64, 128)
WIDTHS = (1, 2, 4, 8)
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
    d, group = q.shape[3], value[2]
    return (
        q.dtype in (torch.float16, torch.bfloat16)
        and d == value_head_dim
        and d in HEAD_DIMS
        and key[0] in WIDTHS
        and key[1]
        and key[2] >= 32
        and value[0] in WIDTHS
        and not value[1]
        and group in (16, 32, 64, 128)
        and scale > 0
        and _is_hopper(q.device)
    )


def launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key: tuple[Tensor, Tensor, Tensor | None],
    value: tuple[Tensor, Tensor, Tensor | None],
    table: Tensor,
    packed: Tensor,
    exact_key: Tensor,
    exact_value: Tensor,
    length: Tensor,
    query_position: Tensor,
    valid: Tensor | None,
    s_aux: Tensor | None,
    out: Tensor,
    lse: Tensor,
    bits: tuple[int, int],
    groups: tuple[int, int],
    sinks: int,
    scale: float,
    sliding_window: int | None,
    softcap: float | None,
    splits: int,
) -> None:
    """What `triton_extend.extend_attention` says, of what `serves` allows; fills out and lse.

    `key`, `value`: words, scale and zero of the pages; `bits`, `groups`: widths and group sizes of
    keys and values. With more than one split, out and lse take partial results.
    """
    b, hq, t, d = q.shape
    hkv, slots = exact_key.shape[1], exact_key.shape[2] - 1
    ratio = hq // hkv
    blocks = -(-ratio * t // ROWS)
    pairs = zip((key, value), bits, strict=True)
    offsets = [0.0 if pages[2] is not None else symmetric_offset(n) for pages, n in pairs]
    extend_hopper[(b * hkv * blocks * splits,)](
        q,
        k,
        v,
        key[0],
        key[1],
        key[1] if key[2] is None else key[2],
        value[0],
        value[1],
        value[1] if value[2] is None else value[2],
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
        ratio,
        blocks,
        splits,
        sinks,
        slots,
        D=d,
        KB=bits[0],
        KG=groups[0],
        K_OFFSET=offsets[0],
        VB=bits[1],
        VG=groups[1],
        V_OFFSET=offsets[1],
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
