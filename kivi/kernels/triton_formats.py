"""Which formats the attention kernels take, and how they are told of them."""

from __future__ import annotations

import torch

from kivi.spec import TILE_ROWS, QuantSpec, Spec

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_HEAD_DIM = 512
VECTOR = 8
"""Neighbouring channels that a thread of `quantize_pack` has."""
GRIDS = ("asymmetric", "symmetric", "least_squares")


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
        if spec is None:
            continue
        if not isinstance(spec, QuantSpec):
            return f"{name}: the kernels do not take {type(spec).__name__}, a format of its own"
        if spec.token_norm:
            return f"{name}: the kernels do not take token_norm=True"
        try:
            group = spec.group(size)
        except ValueError as error:
            return f"{name}: {error}"
        if spec.center and (spec.center < TILE_ROWS or group != size):
            return f"{name}: the kernels take center={spec.center} for whole heads, from 32 on"
    return None


def is_plain(spec: Spec | None) -> bool:
    """Whether codes, scales and zeros say it all, and how they are found: what all kernels take."""
    if not isinstance(spec, QuantSpec):
        return spec is None
    mapped = spec.transform or spec.center or spec.smooth or spec.token_norm
    return not mapped and spec.clip == 1 and spec.grid in GRIDS


def packs(spec: Spec | None, head_dim: int) -> bool:
    """Whether `quantize_pack` has a kernel for it."""
    if is_plain(spec):
        return True
    if not isinstance(spec, QuantSpec) or spec.axis == "channel" or spec.token_norm:
        return False
    if spec.grid == "least_squares" or head_dim % VECTOR:
        return False
    pieces = spec.group(head_dim) % (lanes(head_dim) * VECTOR) == 0
    return pieces and (spec.center is None or spec.center >= TILE_ROWS)


def lanes(head_dim: int) -> int:
    """Threads that share a token in `quantize_pack`: about 32 channels for each."""
    count: int = 2 ** ((head_dim - 1) // TILE_ROWS).bit_length()
    while head_dim % (count * VECTOR):
        count //= 2
    return count


def flat(spec: Spec | None, head_dim: int) -> tuple[int, bool, int]:
    """Bits (0: none), whether scales are per channel, and the group size."""
    if spec is None:
        return 0, False, head_dim
    assert isinstance(spec, QuantSpec)
    return spec.bits, spec.axis == "channel", spec.group(head_dim)
