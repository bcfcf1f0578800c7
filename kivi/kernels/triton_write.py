"""New tokens into exact slots, keys and values in one launch."""

from __future__ import annotations

from contextlib import nullcontext
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kivi.kernels.triton_direct import Launch, direct, on_device, stream
from kivi.kernels.triton_portable import INTERPRETED

# Tokens of a program, where there is more than one.
ROWS = 16
STRETCHES = 3


# What changes with every step or prompt: a kernel would be compiled again for 1, and for multiples
# of 16. Of a few tokens nobody needs to know whether 16 divides their addresses.
@triton.jit(
    do_not_specialize=["c0", "s0", "n0", "c1", "s1", "n1", "c2", "s2", "n2", "blocks"],
    do_not_specialize_on_alignment=["exact_key", "exact_value", "k", "v"],
)
def write_tokens(
    exact_key,  # [B, heads, slots, D]
    exact_value,  # [B, heads, slots, DV]
    k,  # [B, heads, T, D]
    v,  # [B, heads, T, DV]
    c0,  # of each stretch: first column, its slot, how many
    s0,
    n0,
    c1,
    s1,
    n1,
    c2,
    s2,
    n2,
    blocks,  # programs of a head
    heads,
    slots,
    k_row,  # strides
    k_head,
    k_token,
    v_row,
    v_head,
    v_token,
    D: tl.constexpr,
    DV: tl.constexpr,
    PADDED: tl.constexpr,
    TOKENS: tl.constexpr,  # of a program
):
    """Each token of the stretches to its slot."""
    number = tl.program_id(0)
    i = number % blocks * TOKENS + tl.arange(0, TOKENS)
    head = (number // blocks % heads).to(tl.int64)
    row = (number // blocks // heads).to(tl.int64)
    second, third = i >= n0, i >= n0 + n1
    column = i + tl.where(third, c2 - n0 - n1, tl.where(second, c1 - n0, c0))
    slot = i + tl.where(third, s2 - n0 - n1, tl.where(second, s1 - n0, s0))
    column, place = column.to(tl.int64), (row * heads + head) * slots + slot
    channel, inside = tl.arange(0, PADDED)[None, :], (i < n0 + n1 + n2)[:, None]
    source = k + row * k_row + head * k_head + column[:, None] * k_token + channel
    mask = inside & (channel < D)
    tl.store(exact_key + place[:, None] * D + channel, tl.load(source, mask=mask), mask=mask)
    source = v + row * v_row + head * v_head + column[:, None] * v_token + channel
    mask = inside & (channel < DV)
    tl.store(exact_value + place[:, None] * DV + channel, tl.load(source, mask=mask), mask=mask)


@lru_cache(1024)
def launch_of(
    device: torch.device,
    dtype: torch.dtype,
    tokens: int,
    shape: tuple[int, ...],
    slots: int,
    value_head_dim: int,
    k_strides: tuple[int, ...],
    v_strides: tuple[int, ...],
) -> Launch:
    """The launch for tensors like these; see `write_new`."""
    b, heads, _, d = shape
    rows = ROWS if tokens > 1 else 1
    blocks, padded = -(-tokens // rows), triton.next_power_of_2(max(d, value_head_dim))
    fixed = (blocks, heads, slots, *k_strides[:3], *v_strides[:3], d, value_head_dim, padded, rows)
    return Launch(write_tokens, (blocks * b * heads, 1, 1), fixed, num_warps=1 if rows == 1 else 4)


def numbers_of(place: list[tuple[int, int, int]]) -> tuple[int, tuple[int, ...]]:
    """Tokens of all stretches, and what the kernel is told of these."""
    if len(place) == 1:
        return place[0][2], (*place[0], 0, 0, 0, 0, 0, 0)
    rest = [(0, 0, 0)] * (STRETCHES - len(place))
    return sum(n for _, _, n in place), tuple(x for one in (*place, *rest) for x in one)


def write_new(exact_key: Tensor, exact_value: Tensor, k: Tensor, v: Tensor, place: Any) -> bool:
    """Put new tokens into exact slots, if that is known on the host and nobody looks on.

    Args:
        exact_key: `[B, Hkv, E, D]`, contiguous.
        exact_value: `[B, Hkv, E, Dv]`, contiguous.
        k: `[B, Hkv, T, D]`.
        v: `[B, Hkv, T, Dv]`.
        place: up to three stretches of columns (`kivi.steps.Stretch`), or what is on the device.

    Returns:
        Whether it did.
    """
    if type(place) is not list or not direct(k, v, cpu=INTERPRETED):
        return False
    k_strides, v_strides = k.stride(), v.stride()
    if k_strides[3] != 1 or v_strides[3] != 1:
        return False
    tokens, numbers = numbers_of(place)
    device, (_, _, slots, size) = k.device, exact_value.shape
    launch = launch_of(device, k.dtype, tokens, k.shape, slots, size, k_strides, v_strides)
    tensors = (exact_key, exact_value, k, v)
    with on_device(device) if k.is_cuda else nullcontext():
        if launch.compiled is None:
            launch.first(*tensors, *numbers)
        else:
            launch.again(stream(device), (*map(Tensor.data_ptr, tensors), *numbers))
    return True
