"""Bytes of codes as in triton_token_grids.py, put into the words of a tile."""

from __future__ import annotations

import triton
import triton.language as tl

from kivi.kernels.triton_tile_pack import (
    byte_of,
    insert,
    insert_byte,
    insert_four,
    insert_pairs,
    pair_of_bytes,
    plane_weight,
    split_thirds,
)
from kivi.spec import TILE_ROWS

ROWS = tl.constexpr(TILE_ROWS)


@triton.jit
def split_all_thirds(codes):
    """Codes of 3 bits as their low two bits and their third."""
    low, third = (), ()
    for j in tl.static_range(len(codes)):
        a, b = split_thirds(codes[j])
        low, third = low + (a,), third + (b,)
    return low, third


@triton.jit
def put_planes(
    words,  # of the page and head
    before,  # bytes of the half of a word before the last
    last,
    plane,  # the first, in the page
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    PUT: tl.constexpr,
    LANES: tl.constexpr,
    FAST: tl.constexpr,
):
    """Put planes into the words of a tile; the others stay."""
    none = tl.zeros([ROWS, LANES], tl.int32)
    in_tile = plane % (16 // WIDTH)
    words += plane // (16 // WIDTH) * (ROWS * D)
    i = tl.arange(0, LANES * 4)[None, :]
    first = words.to(tl.pointer_type(tl.int32), bitcast=True)
    first += tl.arange(0, ROWS)[:, None] * (D // 2)
    if FAST:
        first += tl.arange(0, LANES)[None, :] * 4
    for piece in tl.static_range(D // (LANES * 8)):
        pairs = ()
        for k in tl.static_range(4):
            late = last[piece * 2 + k // 2]
            if PUT * WIDTH == 16:
                pairs = pairs + (pair_of_bytes(before[piece * 2 + k // 2], late, k % 2 * 2, FAST),)
            else:  # one half
                half = plane_weight(in_tile // (8 // WIDTH), 8)
                pairs = pairs + (pair_of_bytes(late, none, k % 2 * 2, FAST) * half,)
        if FAST:
            insert_four(first + piece * (LANES * 4), pairs, in_tile, WIDTH, PUT)
        else:
            # What a thread has stays in it.
            four = tl.join(tl.join(pairs[0], pairs[2]), tl.join(pairs[1], pairs[3]))
            four = tl.reshape(four, [ROWS, LANES * 4])
            insert_pairs(
                first + piece * (LANES * 4) + i // 4 * 4 + i % 4, four, in_tile, WIDTH, PUT
            )


@triton.jit
def put_thirds(
    words,
    thirds,
    plane,
    D: tl.constexpr,
    PUT: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
    FAST: tl.constexpr,
):
    """Put the third bits of codes of 3 bits into halves of words."""
    halves = words.to(tl.pointer_type(tl.int8), bitcast=True) + plane // 8
    row, lane = tl.arange(0, ROWS)[:, None], tl.arange(0, LANES)[None, :]
    for k in tl.static_range(D // LANES):
        channel = (k // VECTOR * LANES + lane) * VECTOR + k % VECTOR
        byte = byte_of(thirds[k // 4], k % 4)
        at = halves + (row * D + channel) * 2
        if FAST:
            insert_byte(at, byte, plane % 8, PUT)
        else:
            insert(at, byte, None, plane % 8, 1, PUT)
