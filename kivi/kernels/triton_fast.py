"""Host side of the Gluon kernel: what it serves, how work is divided, cheap launches."""

from __future__ import annotations

from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kivi.grids import symmetric_offset
from kivi.kernels.triton_combine import combine_kernel
from kivi.kernels.triton_direct import Launch, on_device, stream
from kivi.kernels.triton_formats import Formats
from kivi.kernels.triton_gluon import decode_kernel
from kivi.spec import PAGE_TOKENS, TILE_ROWS

# Warps of a multiprocessor: 170 to 255 registers a thread are two for each of its four schedulers.
# A third would fit with 168, and brings nothing, even where nothing spills.
RESIDENT = 8
# Planes of 32 tokens a step: fewer instructions a token with more, but the loop must stay in the
# instruction cache.
PLANES = 4
HEAD_DIMS = (64, 128, 256)
WIDTHS = (1, 2, 4, 8)
# Query heads times tokens on one kv head up to which re-reading the pages for every 8 (or 4) pays.
MAX_ROWS = 32
# On 8-bit tensor cores, for 4 query heads times tokens a program: these widths of both keys and
# values, and head dimensions.
BYTE_WIDTHS = (2, 4)
BYTE_HEAD_DIMS = (64, 128, 256)
BYTE_ROWS = 4


class Mapped(NamedTuple):
    """How tokens were mapped: the same for keys and values, where there are not two numbers.

    Tokens whose means were subtracted together (0: none), channels that were rotated together (1:
    none), whether channels were divided by factors, and the codes that stand for 0.
    """

    center: int
    block: tuple[int, int]
    smooth: tuple[bool, bool]
    zero: tuple[float, float]


class Kind:
    """What decides how a format is attended over; compared by identity, which takes no time.

    Args:
        formats: bits, whether per-channel and group size, of keys and of values.
        sinks: S.
        mapped: how tokens were mapped, if they were.
    """

    def __init__(self, formats: Formats, sinks: int, mapped: Mapped | None) -> None:
        self.formats, self.sinks, self.mapped = formats, sinks, mapped


kind = lru_cache(1024)(Kind)


class Plan(NamedTuple):
    """What all calls with tensors of the same shapes and the same formats share.

    `merge` is None where no programs share a unit; else what they find takes `size` numbers, sums
    of values and from `sums` on what belongs to them.
    """

    main: Launch
    merge: Launch | None = None
    size: int = 0
    sums: int = 0


@cache
def _gpu(device: torch.device) -> tuple[int, int, int]:
    """Multiprocessors, shared bytes of one, architecture; 0 where instructions are missing."""
    if device.type != "cuda" or torch.version.hip:
        return 0, 0, 0
    found = torch.cuda.get_device_properties(device)
    count = found.multi_processor_count if found.major >= 8 else 0
    return count, found.shared_memory_per_multiprocessor, found.major


def _resident(
    shared: int, d: int, planes: int, groups: tuple[int, int], as_bytes: bool, mapped: Mapped | None
) -> int:
    """Programs that a multiprocessor of so much shared memory holds at once."""
    tokens = planes * TILE_ROWS
    if mapped is None:
        zeros = d // groups[1] if as_bytes or groups[1] == d else 8  # and ones
        metadata = 4 * d * -(-tokens // groups[0]) + tokens * 2 * (d // groups[1] + zeros)
    else:
        metadata = 4 * tokens + 4 * d * (-(-tokens // mapped.center) if mapped.center else 1)
        metadata += 4 * d * mapped.smooth[1]
    metadata += 4 * TILE_ROWS  # slots of exact rows
    words = 4 * TILE_ROWS * (min(d, 128) if as_bytes else d)
    return max(1, min(RESIDENT, shared // (words + metadata + 1024)))


def _steps(pages: int, planes: int, slots: int) -> int:
    """Steps of a (row, head) whose pages are full, as the kernel counts them."""
    return pages * (PAGE_TOKENS // (TILE_ROWS * planes)) + max(1, (slots + 31) // 64)


def _serves(
    d: int,
    dv: int,
    dtype: torch.dtype,
    rows: int,
    key: tuple[int, bool, int],
    value: tuple[int, bool, int],
    mapped: Mapped | None,
) -> bool:
    """Whether the kernel takes this; `key`, `value`: bits, whether per-channel, group size."""
    groups = d // value[2]
    if mapped is not None:
        return (
            dtype in (torch.float16, torch.bfloat16)
            and d == dv
            and d in BYTE_HEAD_DIMS
            and rows <= 4 * BYTE_ROWS
            and key[0] == value[0] in BYTE_WIDTHS
            and key[1:] == value[1:] == (False, d)
        )
    return (
        dtype in (torch.float16, torch.bfloat16)
        and d == dv
        and d in HEAD_DIMS
        and rows <= MAX_ROWS
        and key[0] in WIDTHS
        and value[0] in WIDTHS
        and key[1]
        and not value[1]
        and key[2] >= 32
        and value[2] >= 16
        and groups in (1, 2, 4, 8)
    )


@lru_cache(1024)
def _plan(
    gpu: tuple[int, int, int],
    device: torch.device,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    exact: tuple[int, ...],
    columns: int,
    kind: Kind,
    key_zero: bool,
    value_zero: bool,
    capped: bool,
    aux: torch.dtype | None,
) -> Plan | None:
    """How a call is divided and launched; None if the kernel does not serve it.

    Args:
        gpu: what `_gpu` says.
        device: where.
        dtype: of the queries.
        shape: `[B, Hq, T, D]`, of the queries.
        exact: `[B, Hkv, E, Dv]`, of the exact values.
        columns: of the block table.
        kind: of the format.
        key_zero: whether keys have zeros, or centers.
        value_zero: likewise.
        capped: whether there is a softcap, for which the kernel is compiled.
        aux: dtype of s_aux if there is one, likewise.
    """
    (b, hq, t, d), (_, hkv, slots, dv) = shape, exact
    formats, sinks, mapped = kind.formats, kind.sinks, kind.mapped
    rows, slots = hq // hkv * t, slots - 1
    multiprocessors, shared, major = gpu
    if not multiprocessors or not _serves(d, dv, dtype, rows, *formats, mapped):
        return None
    bits, groups = (formats[0][0], formats[1][0]), (formats[0][2], formats[1][2])
    same = bits[0] == bits[1] in BYTE_WIDTHS and d in BYTE_HEAD_DIMS
    as_bytes = mapped is not None or (rows <= BYTE_ROWS and same)
    planes = 8 // bits[0] if as_bytes else min(PLANES, 16 // max(bits))
    resident = multiprocessors * _resident(shared, d, planes, groups, as_bytes, mapped)
    together = as_bytes and rows * planes <= BYTE_ROWS  # a query for each plane
    apart = (2 * planes if together else 2) if as_bytes else 1
    units = b * hkv * -(-rows * apart // 8)
    steps = _steps(columns, planes, slots)
    if mapped is None:
        few = min(2, 16 // max(bits))
        others = min(resident, multiprocessors * _resident(shared, d, few, groups, False, None))
        if 2 * units * steps <= others:
            # A step each: the shorter the better
            as_bytes, together, apart, planes, resident = False, False, 1, few, others
            units, steps = b * hkv * -(-rows // 8), _steps(columns, planes, slots)
    blocks = units // (b * hkv)
    programs = min(resident, units * steps)
    # A program for each unit where sharing it would save nothing
    single = steps <= 2 or units >= 4 * programs
    if single:
        programs = units
    if mapped is None:
        offsets = [
            1.0 if x else -symmetric_offset(n)
            for x, n in zip((key_zero, value_zero), bits, strict=True)
        ]
        how = (False, 0, 1, 1, False, False)
    else:
        offsets = [*mapped.zero]
        how = (True, mapped.center, *mapped.block, *mapped.smooth)
    several = 1 if b == 1 else max(32, 2 ** (b - 1).bit_length())
    early = major >= 9  # programmatic dependent launch
    main = Launch(
        decode_kernel,
        (programs, 1, 1),
        (b, hkv, blocks, rows, t, columns, slots, sinks)
        + (d, *bits, *groups, *offsets, planes, several, single, early, as_bytes, together, *how),
        num_warps=1,
    )
    if single:
        return Plan(main)
    # All parts of a query at once, in one round of loads: few of them, or many.
    most = 32 if programs <= 30 * units else 256
    channels = 64 if most == 32 else 16
    merge = Launch(
        combine_kernel,
        (units, min(8 // apart, rows), d // channels),
        (b, hkv, blocks, rows, t, sinks, programs)
        + (d, apart, 32 * planes, max(32, several), most, channels, early),
        num_warps=1,
        launch_pdl=early,
    )
    count = programs + units
    return Plan(main, merge, count * (8 * d + 16), count * 8 * d)


def decode(
    q: Tensor,
    key: tuple[Tensor, Tensor | None, Tensor | None],
    value: tuple[Tensor, Tensor | None, Tensor | None],
    state: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor],
    s_aux: Tensor | None,
    kind: Kind,
    scale: float,
    sliding_window: int | None,
    softcap: float | None,
    smooth: Tensor | None = None,
) -> tuple[Tensor, Tensor] | None:
    """What `triton_decode.decode_attention` says, or None if this kernel does not serve it.

    `key`, `value`: words, scale and zero of the pages; `state`: table, packed, exact_key,
    exact_value, length and query_position. If tokens were mapped there are centers, if any, in
    place of zeros, and `smooth` is what channels were divided by, `[B, Hkv, n]` float32.
    """
    if sliding_window is not None:
        return None
    device, shape, zeros = q.device, q.shape, (key[2] is not None, value[2] is not None)
    aux = None if s_aux is None else s_aux.dtype
    shapes = (shape, state[3].shape, state[0].shape[1])
    plan = _plan(_gpu(device), device, q.dtype, *shapes, kind, *zeros, softcap is not None, aux)
    if plan is None:
        return None
    pages = (
        *key[:2],
        key[2] if zeros[0] else key[1],
        *value[:2],
        value[2] if zeros[1] else value[1],
    )
    return run(plan, q, shape, device, (*pages, *state), s_aux, smooth, scale, softcap)


def run(
    plan: Plan,
    q: Tensor,
    shape: tuple[int, ...],
    device: torch.device,
    others: tuple[Any, ...],
    s_aux: Tensor | None,
    smooth: Tensor | None,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """Launch what is planned.

    `shape`, `device`: the query's. `others`: words, scales and zeros of keys and of values (scales
    again where there are none), and the state as in `decode`.
    """
    main, merge, size, sums_at = plan
    # Alignment to 16 bytes is compiled in.
    if not q.is_contiguous() or q.data_ptr() % 16:
        q = q.clone(memory_format=torch.contiguous_format)
    out = torch.empty_like(q)
    # Sizes one by one: a tuple takes longer.
    lse = torch.empty(shape[0], shape[1], shape[2], dtype=torch.float32, device=device)
    parts = lse if merge is None else torch.empty(size, dtype=torch.float32, device=device)
    tensors = (q, *others, parts)
    with on_device(device):
        if main.compiled is None or (merge is not None and merge.compiled is None):
            sums = parts[sums_at:]
            main.first(*tensors, sums, out, lse, s_aux, smooth, scale, softcap)
            if merge is not None:
                merge.first(parts, sums, others[7], others[10], out, lse, s_aux)
            return out, lse
        current, a = stream(device), list[Any](map(Tensor.data_ptr, tensors))
        ends = out.data_ptr(), lse.data_ptr(), None if s_aux is None else s_aux.data_ptr()
        parts_at, packed_at, length_at = a[13], a[8], a[11]
        sums = parts_at + 4 * sums_at
        a += (sums, *ends, None if smooth is None else smooth.data_ptr(), scale, softcap)
        main.again(current, a)
        if merge is not None:
            merge.again(current, (parts_at, sums, packed_at, length_at, *ends))
    return out, lse
