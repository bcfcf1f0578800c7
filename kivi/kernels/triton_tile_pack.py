"""Bits of packed words, written; with packing.py and the tile loaders, where bits are shifted.

Here too: bfloat16 elements two by two in a register, as they were loaded.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def plane_weight(plane, WIDTH: tl.constexpr):
    """What takes a code of WIDTH bits to a plane of its word when multiplied."""
    return 1 << (plane * WIDTH)


@triton.jit
def insert(pointers, words, mask, plane, WIDTH: tl.constexpr, PLANES: tl.constexpr):
    """Store PLANES planes from `plane` on of words, or of their halves; other planes stay.

    Only as many low bits of `words` (int32) count as are stored, and those of other planes are 0.
    """
    if pointers.dtype.element_ty.primitive_bitwidth > PLANES * WIDTH:
        planes = plane_weight(plane, WIDTH) * (2 ** (PLANES * WIDTH) - 1)
        words = words | (tl.load(pointers, mask=mask).to(tl.int32) & ~planes)
    tl.store(pointers, words.to(pointers.dtype.element_ty), mask=mask)


@triton.jit
def insert_thirds(pointers, words, mask, plane, PLANES: tl.constexpr):
    """Store the third bits of codes of 3 bits: bits 16 to 23 of `words`, a half of a word."""
    insert(pointers, (words >> 16) & 255, mask, plane, 1, PLANES)


@triton.jit
def pair(x):
    """bfloat16 elements, neighbours of the last axis as the halves of an int32."""
    bits = x.to(tl.int16, bitcast=True)
    if len(x.shape) == 3:
        halves = tl.reshape(bits, [x.shape[0], x.shape[1], x.shape[2] // 2, 2])
    else:
        halves = tl.reshape(bits, [x.shape[0], x.shape[1], x.shape[2], x.shape[3] // 2, 2])
    low, high = tl.split(halves)
    return (low.to(tl.int32) & 65535) | (high.to(tl.int32) << 16)


@triton.jit
def low_half(pairs):
    """The first element of each pair, float32."""
    return (pairs << 16).to(tl.float32, bitcast=True)


@triton.jit
def high_half(pairs):
    """The second element of each pair, float32."""
    return (pairs & -65536).to(tl.float32, bitcast=True)


@triton.jit
def unpair(pairs):
    """All elements, float32."""
    x = tl.join(low_half(pairs), high_half(pairs))
    if len(pairs.shape) == 3:
        x = tl.reshape(x, [x.shape[0], x.shape[1], x.shape[2] * 2])
    else:
        x = tl.reshape(x, [x.shape[0], x.shape[1], x.shape[2], x.shape[3] * 2])
    return x
