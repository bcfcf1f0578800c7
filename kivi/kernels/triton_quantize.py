"""quantize_pack in one pass: the operator `kivi::quantize_pack` around its kernels.

The arithmetic is that of grids.py, operation by operation, so that the bytes are the same.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import cache, lru_cache
from typing import Any

import torch
import triton
from torch import Tensor

from kivi.grids import metadata_dtype, refit_unit, symmetric_offset
from kivi.kernels.triton_direct import Launch, direct, on_device, stream
from kivi.kernels.triton_formats import is_plain
from kivi.kernels.triton_pack import copy_tokens, quantize_tiles
from kivi.kernels.triton_portable import INTERPRETED
from kivi.kernels.triton_quantize_mapped import quantize_pack_mapped
from kivi.packing import widths
from kivi.quantize import Pages
from kivi.spec import TILE_ROWS, WORD_BITS, QuantSpec, Spec


@cache
def _has_pairs(device: torch.device) -> bool:
    """Whether a GPU computes with two bfloat16 at once, and takes NVIDIA's assembly."""
    if device.type != "cuda" or torch.version.hip:
        return False
    return bool(torch.cuda.get_device_properties(device).major >= 8)


@cache
def _constants(
    bits: int,
    axis: str,
    group_size: int | None,
    grid: str,
    unit: int,
    d: int,
    dtype: torch.dtype,
    pairs: bool,
) -> dict[str, Any]:
    """What the kernel is compiled for, in its order: how it shares elements out to threads too."""
    spec = QuantSpec(bits, axis, group_size, grid)  # type: ignore[arg-type]
    group, size, info = spec.group(d), dtype.itemsize, torch.finfo(metadata_dtype(dtype))
    channel = axis == "channel"
    chunk = max(TILE_ROWS, group) if channel else TILE_ROWS
    if channel:
        # A thread has two channels of all rows of a group, or of every other one; what takes more
        # registers has fewer channels. Up to a fifth of them may be padding.
        padded, split, vector = group, 1, 2
        large = (chunk > TILE_ROWS) + (size > 2) + (grid == "least_squares")
        block = max(16, 64 // 2**large)
        while block > 16 and -(-d // block) * block * 4 > 5 * d:
            block //= 2
        blocks, warps = -(-d // block), 1 if chunk <= 128 else 8
    else:
        # A thread has 32 channels of a group, or all of a smaller one: 16 bytes of each piece.
        padded, vector = triton.next_power_of_2(group), 16 // size
        split = max(1, min(padded, 32) // vector)
        block = min(triton.next_power_of_2(d // group), max(1, 128 // padded))
        blocks, warps = -(-(d // group) // block), min(16, max(1, block * padded // 32))
    return {
        "BITS": bits,
        "CHANNEL": channel,
        "GRID": grid,
        "G": group,
        "U": unit,
        "D": d,
        "OFFSET": symmetric_offset(bits),
        "LIMIT": info.max,
        "EPS": info.eps,
        "LEAST": max(info.smallest_normal * info.eps, torch.finfo(torch.float32).smallest_normal),
        "UNIT": refit_unit(bits, group),
        "CHUNK": chunk,
        "SPAN": max(chunk, min(unit, WORD_BITS // widths(bits)[0] * TILE_ROWS)),
        "BLOCK": block,
        "BLOCKS": blocks,
        "PADDED": padded,
        "SPLIT": split,
        "VECTOR": vector,
        # Elements of 16-byte asynchronous copies come out of shared memory one by one.
        # An H200 reaches 82 instead of 75 % of copy bandwidth so at G=64, 75 instead of 70 at 128.
        "STAGES": 2 if channel and chunk != 64 else 1,
        # Not where threads share a channel: they would exchange all pairs.
        "PAIRS": pairs and dtype == torch.bfloat16 and (not channel or block == 64 or chunk > 64),
        "num_warps": warps,
    }


def _op(
    words: Tensor,
    scale: Tensor | None,
    zero: Tensor | None,
    x: Tensor,
    page: Tensor,
    first: Tensor,
    valid: Tensor | None,
    bits: int,
    axis: str,
    group_size: int | None,
    grid: str,
) -> None:
    assert all(t is None or t.is_contiguous() for t in (words, scale, zero))
    if x.stride(-1) != 1:
        x = x.contiguous()
    page, first = page.contiguous(), first.contiguous()
    # Rows of runs, whose tokens need not lie side by side: a prompt is read where it is.
    rows = x if x.dim() == 5 else x.unsqueeze(0)
    tensors = (words, scale, zero, x, page, first, valid) if bits else (words, x, page, first)
    addresses = [None if t is None else t.data_ptr() for t in tensors]
    launch = launch_of(
        (bits, axis, group_size, grid),
        x.device,
        (x.dtype, *(None if t is None else t.dtype for t in (words, scale, zero))),
        rows.shape,
        rows.stride(),
        page.numel(),
        None if valid is None else valid.stride(),
        # Of numbers and addresses Triton compiles in whether 16 divides them.
        tuple(a is None or a % 16 == 0 for a in addresses),
    )
    with on_device(x.device) if x.is_cuda else nullcontext():
        if launch.compiled is None:
            launch.first(*tensors)
        else:
            launch.again(stream(x.device), addresses)


@lru_cache(1024)
def launch_of(
    spec: tuple[int, str, int | None, str],
    device: torch.device,
    dtypes: tuple[torch.dtype | None, ...],
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    runs: int,
    of_valid: tuple[int, ...] | None,
    aligned: tuple[bool, ...],
) -> Launch:
    """The launch for tensors like these; see `_op`, whose numbers are all in here."""
    _, n, heads, unit, d = shape
    if not spec[0]:
        constants = (unit, d, triton.next_power_of_2(d))
        fixed = (heads, n, *strides[:4], *constants)
        return Launch(copy_tokens, (runs * heads * (unit // TILE_ROWS), 1, 1), fixed)
    assert dtypes[0] is not None
    compiled_for = dict(_constants(*spec, unit, d, dtypes[0], _has_pairs(device)))
    warps = compiled_for.pop("num_warps")
    programs = runs * heads * (unit // compiled_for["SPAN"]) * compiled_for["BLOCKS"]
    numbers = (heads, n, *strides[:3], *(of_valid or (0, 0, 0)), 0, strides[3])
    fixed = (*numbers, *compiled_for.values())
    return Launch(quantize_tiles, (programs, 1, 1), fixed, num_warps=warps)


# Not torch.library.custom_op, whose wrappers take 60 us a call; this takes 5.
_LIBRARY = torch.library.Library(__name__.partition(".")[0], "FRAGMENT")
_LIBRARY.define(
    "quantize_pack(Tensor(a!) words, Tensor(b!)? scale, Tensor(c!)? zero, Tensor x, Tensor page, "
    "Tensor first, Tensor? valid, int bits, str axis, int? group_size, str grid) -> ()"
)
_LIBRARY.impl("quantize_pack", _op, "CompositeExplicitAutograd")
torch.library.register_fake("kivi::quantize_pack", lambda *_: None, lib=_LIBRARY)


def flat(spec: QuantSpec | None) -> tuple[int, str, int | None, str]:
    """As the operator takes a spec; no bits for None."""
    return (spec.bits, spec.axis, spec.group_size, spec.grid) if spec else (0, "", None, "")


def quantize_pack(
    pages: Pages,
    spec: Spec | None,
    x: Tensor,
    page: Tensor,
    first: Tensor,
    valid: Tensor | None = None,
    smooth: Tensor | None = None,
) -> None:
    """`quantize.quantize_pack`, as the operators `kivi::quantize_pack` and `quantize_mapped`.

    Pages are contiguous. Nothing is read or written for page 0, so that a step on which no unit
    leaves the window costs next to nothing.
    """
    if valid is not None:
        valid = valid.expand(x.shape[:-1])
        valid = valid.flatten(0, 1) if x.dim() == 5 else valid
    assert spec is None or isinstance(spec, QuantSpec)
    if spec is not None and not is_plain(spec):
        quantize_pack_mapped(pages, spec, x, page, first, valid, smooth)
        return
    call: Any = _op if direct(x, cpu=INTERPRETED) else torch.ops.kivi.quantize_pack.default
    call(*pages[:3], x, page, first, valid, *flat(spec))
