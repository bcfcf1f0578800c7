"""Bits of packed words, written; with packing.py and the tile loaders, where bits are shifted."""

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
