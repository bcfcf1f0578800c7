"""Host side of the Gluon kernel: what it serves, how work is divided, cheap launches."""

from __future__ import annotations

from collections.abc import Hashable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from kivi.grids import symmetric_offset
from kivi.kernels.triton_combine import combine_kernel
from kivi.kernels.triton_gluon import decode_kernel
from kivi.spec import PAGE_TOKENS, TILE_ROWS

# Warps of a multiprocessor: 170 to 255 registers a thread are two for each of its four schedulers.
# A third would fit with 168, and is slower: the code waits for registers that are used again.
RESIDENT = 8
# Planes of 32 tokens a step: fewer instructions a token with more, but the loop must stay in the
# instruction cache.
PLANES = 4
HEAD_DIMS = (64, 128, 256)
WIDTHS = (1, 2, 4, 8)
# On 8-bit tensor cores, up to 4 query heads times tokens.
BYTE_WIDTHS = (2, 4)
# Query heads times tokens on one kv head up to which re-reading the pages for every 8 pays.
MAX_ROWS = 32


class Launcher:
    """Launches a kernel again without the binder, which takes longer than many a decode step.

    Args:
        kernel: the jitted function; it takes tensors first.
        options: of its launches.
    """

    def __init__(self, kernel: Any, **options: Any) -> None:
        self.kernel, self.options = kernel, options
        self.compiled: dict[Hashable, Any] = {}

    def __call__(
        self,
        key: Hashable,
        grid: tuple[int, int, int],
        tensors: tuple[Tensor | None, ...],
        others: tuple[Any, ...],
        **options: Any,
    ) -> None:
        """Launch; `key` names all that the compiled code depends on, alignment excepted."""
        compiled = self.compiled.get(key)
        if compiled is None:
            compiled = self.kernel[grid](*tensors, *others, **self.options, **options)
            self.compiled[key] = compiled
        else:
            # Addresses: a tensor's would be looked up and checked one by one.
            compiled[grid](*(x if x is None else x.data_ptr() for x in tensors), *others)


_decode = Launcher(decode_kernel, num_warps=1)
_combine = Launcher(combine_kernel)


@cache
def _gpu(device: torch.device) -> tuple[int, int, int]:
    """Multiprocessors, shared bytes of one, architecture; 0 where instructions are missing."""
    if device.type != "cuda" or torch.version.hip:
        return 0, 0, 0
    found = torch.cuda.get_device_properties(device)
    count = found.multi_processor_count if found.major >= 8 else 0
    return count, found.shared_memory_per_multiprocessor, found.major


def _resident(
    shared: int, d: int, planes: int, key_group: int, value_group: int, as_bytes: bool
) -> int:
    """Programs that a multiprocessor of so much shared memory holds at once."""
    zeros = d // value_group if as_bytes or value_group == d else 8  # and ones
    per_token = (d // value_group + zeros) * 2
    metadata = 4 * d * -(-planes * TILE_ROWS // key_group) + planes * TILE_ROWS * per_token
    return max(1, min(RESIDENT, shared // (4 * TILE_ROWS * d + metadata + 1024)))


def _steps(pages: int, planes: int, slots: int) -> int:
    """Steps of a (row, head) whose pages are full, as the kernel counts them."""
    return pages * (PAGE_TOKENS // (TILE_ROWS * planes)) + -(-slots // 64)


def serves(
    q: Tensor,
    value_head_dim: int,
    rows: int,
    key: tuple[int, bool, int],
    value: tuple[int, bool, int],
    sliding_window: int | None,
) -> bool:
    """Whether the kernel takes this; `key`, `value`: bits, whether per-channel, group size."""
    d = q.shape[3]
    groups = d // value[2]
    return (
        sliding_window is None
        and q.dtype in (torch.float16, torch.bfloat16)
        and d == value_head_dim
        and d in HEAD_DIMS
        and rows <= MAX_ROWS
        and key[0] in WIDTHS
        and value[0] in WIDTHS
        and key[1]
        and not value[1]
        and key[2] >= 32
        and value[2] >= 16
        and groups in (1, 2, 4, 8)
        and _gpu(q.device)[0] > 0
    )


def decode(
    q: Tensor,
    key: tuple[Tensor, Tensor, Tensor | None],
    value: tuple[Tensor, Tensor, Tensor | None],
    table: Tensor,
    packed: Tensor,
    exact_key: Tensor,
    exact_value: Tensor,
    length: Tensor,
    query_position: Tensor,
    s_aux: Tensor | None,
    bits: tuple[int, int],
    groups: tuple[int, int],
    sinks: int,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """What `triton_decode.decode_attention` says, of what `serves` allows.

    `key`, `value`: words, scale and zero of the pages; `bits`, `groups`: widths and group sizes of
    keys and values.
    """
    # Alignment to 16 bytes is compiled in.
    q = q.contiguous() if q.data_ptr() % 16 == 0 else q.clone(memory_format=torch.contiguous_format)
    b, hq, t, d = q.shape
    hkv, slots = exact_key.shape[1], exact_key.shape[2] - 1
    rows = hq // hkv * t
    multiprocessors, shared, major = _gpu(q.device)
    as_bytes = rows <= 4 and bits[0] == bits[1] in BYTE_WIDTHS and d <= 128
    planes = 8 // bits[0] if as_bytes else min(PLANES, 16 // max(bits))
    apart = 2 if as_bytes else 1
    blocks = -(-rows * apart // 8)
    units = b * hkv * blocks
    resident = multiprocessors * _resident(shared, d, planes, *groups, as_bytes)
    steps = _steps(table.shape[1], planes, slots)
    if 2 * units * steps <= resident:
        # A step each: the shorter the better
        as_bytes, apart, planes = False, 1, min(2, 16 // max(bits))
        blocks = -(-rows // 8)
        units, steps = b * hkv * blocks, _steps(table.shape[1], planes, slots)
    programs = min(resident, units * steps)
    # A program for each unit where sharing it would save nothing
    single = steps <= 2 or units >= 4 * programs
    out = torch.empty_like(q)
    lse = torch.empty((b, hq, t), dtype=torch.float32, device=q.device)
    parts = sums = lse
    if single:
        programs = units
    else:
        count = programs + units
        parts = torch.empty(count * (8 * d + 16), dtype=torch.float32, device=q.device)
        sums = parts[count * 8 * d :]
    zero_of = [
        (pages[1], -symmetric_offset(n)) if pages[2] is None else (pages[2], 1.0)
        for pages, n in ((key, bits[0]), (value, bits[1]))
    ]
    several = 1 if b == 1 else max(32, 2 ** (b - 1).bit_length())
    static = (d, *bits, *groups, zero_of[0][1], zero_of[1][1], planes, several, single)
    early = major >= 9  # programmatic dependent launch
    kind = (q.device, q.dtype, softcap is None, None if s_aux is None else s_aux.dtype)
    _decode(
        (kind, static, as_bytes),
        (programs, 1, 1),
        (
            *(q, key[0], key[1], zero_of[0][0], value[0], value[1], zero_of[1][0]),
            *(table, packed, exact_key, exact_value, length, query_position),
            *(parts, sums, out, lse, s_aux),
        ),
        (
            scale,
            softcap,
            b,
            hkv,
            blocks,
            rows,
            t,
            table.shape[1],
            slots,
            sinks,
            *static,
            early,
            as_bytes,
        ),
    )
    if not single:
        # All parts of a query at once, in one round of loads: few of them, or many.
        most = 32 if programs <= 30 * units else 256
        channels = 64 if most == 32 else 16
        constants = (d, apart, 32 * planes, max(32, several), most, channels, early)
        _combine(
            (kind, constants),
            (units, min(8 // apart, rows), d // channels),
            (parts, sums, packed, length, out, lse, s_aux),
            (b, hkv, blocks, rows, t, sinks, programs, *constants),
            num_warps=1,
            launch_pdl=early,
        )
    return out, lse
