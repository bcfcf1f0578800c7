"""The kernel of quantize_pack for tokens that are mapped, centered or smoothed before.

A program takes whole tokens of one head of a run, 32 at a time, and adds their codes to the words
of a tile. Sums have the order that transforms.py and grids.py give them, so that bytes are equal.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kivi.kernels import triton_token as token
from kivi.kernels.triton_grids import round_to
from kivi.kernels.triton_tile_pack import (
    byte_of,
    insert,
    insert_pairs,
    pair_of_bytes,
    plane_weight,
    split_thirds,
)
from kivi.kernels.triton_token_grids import quantize_group
from kivi.spec import PAGE_TOKENS, TILE_ROWS

PAGE = tl.constexpr(PAGE_TOKENS)
ROWS = tl.constexpr(TILE_ROWS)


@triton.jit
def _split_thirds(codes):
    """Codes of 3 bits as their low two bits and their third."""
    low, third = (), ()
    for j in tl.static_range(len(codes)):
        a, b = split_thirds(codes[j])
        low, third = low + (a,), third + (b,)
    return low, third


@triton.jit
def _store(
    words,  # of the page and head
    before,  # bytes of the half of a word before the last
    last,
    plane,  # the first, in the page
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    PUT: tl.constexpr,
    LANES: tl.constexpr,
):
    """Put planes into the words of a tile; the others stay."""
    in_tile = plane % (16 // WIDTH)
    words += plane // (16 // WIDTH) * (ROWS * D)
    i = tl.arange(0, LANES * 4)[None, :]
    at = words.to(tl.pointer_type(tl.int32), bitcast=True) + tl.arange(0, ROWS)[:, None] * (D // 2)
    at += i // 4 * 4 + i % 4
    for piece in tl.static_range(D // (LANES * 8)):
        pairs = ()
        for k in tl.static_range(4):
            late = last[piece * 2 + k // 2]
            if PUT * WIDTH == 16:
                pairs = pairs + (pair_of_bytes(before[piece * 2 + k // 2], late, k % 2 * 2),)
            else:  # one half
                half = plane_weight(in_tile // (8 // WIDTH), 8)
                pairs = pairs + (pair_of_bytes(late, 0, k % 2 * 2) * half,)
        # What a thread has stays in it.
        four = tl.join(tl.join(pairs[0], pairs[2]), tl.join(pairs[1], pairs[3]))
        four = tl.reshape(four, [ROWS, LANES * 4])
        insert_pairs(at + piece * (LANES * 4), four, in_tile, WIDTH, PUT)


@triton.jit
def _store_thirds(
    words,
    thirds,
    plane,
    D: tl.constexpr,
    PUT: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Put the third bits of codes of 3 bits into halves of words."""
    halves = words.to(tl.pointer_type(tl.int8), bitcast=True) + plane // 8
    row, lane = tl.arange(0, ROWS)[:, None], tl.arange(0, LANES)[None, :]
    for k in tl.static_range(D // LANES):
        channel = (k // VECTOR * LANES + lane) * VECTOR + k % VECTOR
        byte = byte_of(thirds[k // 4], k % 4)
        insert(halves + (row * D + channel) * 2, byte, None, plane % 8, 1, PUT)


@triton.jit
def _planes(
    sources,  # x, valid, factors, centers: of the first token
    targets,  # packed, thirds, scale, zero, meta, plane
    valid_token,
    X_TOKEN: tl.constexpr,
    FORMAT: tl.constexpr,
    MAP: tl.constexpr,
    D: tl.constexpr,
    PLANES: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
    CHECKED: tl.constexpr,
):
    """Add the codes of planes to bytes of words; 1 where a token's scale is not finite."""
    BITS: tl.constexpr = FORMAT[0]
    G: tl.constexpr = FORMAT[2]
    WIDTH: tl.constexpr = 2 if BITS == 3 else BITS
    EACH: tl.constexpr = G // LANES  # channels of a thread in a group
    x, valid, factors, centers = sources
    packed, thirds, scale, zero, meta, plane = targets
    row = tl.arange(0, ROWS)[:, None]
    bad = tl.zeros([ROWS, 1], tl.int32)
    for _ in tl.range(PLANES):
        own = token.load(x + row * X_TOKEN, LANES, VECTOR, D // (LANES * VECTOR))
        x += ROWS * X_TOKEN
        if len(factors) > 0:
            own = token.times(own, factors)
        own = token.hadamard(own, MAP, LANES, VECTOR)
        if len(centers) > 0:
            own = token.minus(own, centers)
        if valid is not None:  # what takes no part is NaN
            own = token.only(own, tl.load(valid + row * valid_token))
            valid += ROWS * valid_token
        codes = ()
        for group in tl.static_range(D // G):
            own_group = token.some(own, group * EACH, EACH)
            bytes, s, z = quantize_group(own_group, CHECKED, FORMAT)
            codes = codes + bytes
            bad |= tl.where(s * 0.0 == 0.0, 0, 1)
            tl.store(scale + meta + group, s.to(scale.dtype.element_ty))
            if zero is not None:
                tl.store(zero + meta + group, z.to(zero.dtype.element_ty))
        meta += ROWS * (D // G)
        if BITS == 3:
            codes, third = _split_thirds(codes)
            thirds = token.plus_scaled(thirds, third, plane_weight(plane % 8, 1))
        packed = token.plus_scaled(packed, codes, plane_weight(plane % (8 // WIDTH), WIDTH))
        plane += 1
    return packed, thirds, bad


@triton.jit(do_not_specialize=["n", "nothing"], do_not_specialize_on_alignment=["page", "first"])
def quantize_mapped(
    words,  # [pages, heads, BITS, 32, D] int16
    scale,  # [pages, heads, 512, D / G]
    zero,  # like scale, or None
    center,  # [pages, heads, 512 / C, D], or None
    x,  # [runs / n, n, heads, U, D]
    smooth,  # [runs / n, heads, D] float32, or None
    page,  # [runs] int64; nothing is done for page 0
    first,  # [runs] int64
    valid,  # [runs, heads, U] bool, or None
    heads,
    n,  # runs in a row
    x_row,  # strides
    x_run,
    x_head,
    smooth_row,
    smooth_head,
    valid_run,
    valid_head,
    valid_token,
    nothing,  # 0, unknown to the compiler: all tokens are loaded in one layout
    X_TOKEN: tl.constexpr,
    FORMAT: tl.constexpr,  # see `triton_token_grids.quantize_group`
    MAP: tl.constexpr,  # channels that the Hadamard map mixes, 1: none
    U: tl.constexpr,
    D: tl.constexpr,
    PADDED: tl.constexpr,  # D, up to a power of two
    CENTERED: tl.constexpr,  # planes that share a center
    PUT: tl.constexpr,  # planes of a run in one tile
    LANES: tl.constexpr,  # see triton_token.py
    VECTOR: tl.constexpr,
):
    """Map and quantize tokens and put their codes, scales, zeros and centers into their page."""
    BITS: tl.constexpr = FORMAT[0]
    GROUPS: tl.constexpr = D // FORMAT[2]
    LIMIT: tl.constexpr = FORMAT[6]
    EPS: tl.constexpr = FORMAT[7]
    LEAST: tl.constexpr = FORMAT[8]
    WIDTH: tl.constexpr = 2 if BITS == 3 else BITS
    PIECES: tl.constexpr = D // (LANES * VECTOR)
    BYTE: tl.constexpr = min(PUT, 8 // WIDTH)  # planes in a byte of a word
    SHARED: tl.constexpr = min(CENTERED, BYTE)
    SPAN: tl.constexpr = ROWS * max(CENTERED, PUT)  # tokens of a program
    QUICK: tl.constexpr = FORMAT[1] == "unbiased" and BITS <= 3 and valid is None

    number = tl.program_id(0)
    span = number % (U // SPAN)
    head = number // (U // SPAN) % heads
    run = (number // (U // SPAN) // heads).to(tl.int64)
    which = tl.load(page + run)
    if which == 0:  # the bin
        return
    start = tl.load(first + run) + span * SPAN  # in its page
    place = which * heads + head
    x += run // n * x_row + run % n * x_run
    x += head.to(tl.int64) * x_head + span.to(tl.int64) * (SPAN * X_TOKEN)
    row = tl.arange(0, ROWS)[:, None]
    meta = (place * PAGE + start + row) * GROUPS
    factors = ()
    if smooth is not None:
        smooth += run // n * smooth_row + head.to(tl.int64) * smooth_head
        factors = token.inverses(token.load(smooth + row * (16 * nothing), LANES, VECTOR, PIECES))
    if valid is not None:
        valid += run * valid_run + head.to(tl.int64) * valid_head
        valid += span * SPAN * valid_token
    words += place * (BITS * ROWS * D)
    plane = (start // ROWS).to(tl.int32)
    none = token.zeros(ROWS, LANES, D // (4 * LANES))
    before, thirds = none, none
    for part in tl.range(SPAN // (BYTE * ROWS)):
        packed = none
        for _ in tl.range(BYTE // SHARED):
            centers = ()
            if center is not None:
                at = center + (place * (PAGE // (CENTERED * ROWS)) + plane // CENTERED) * D
                if plane % CENTERED == 0:
                    means = token.means(
                        *(x, valid, X_TOKEN, valid_token),
                        *(D, LANES, VECTOR, PADDED, CENTERED * ROWS),
                    )
                    channel = tl.arange(0, PADDED)
                    known = None if D == PADDED else channel < D
                    if smooth is not None:
                        divisor = tl.load(smooth + channel, mask=known)
                        means = tl.math.div_rn(means, divisor)
                    means = token.hadamard_of_one(means, MAP)
                    means = tl.where(means * 0.0 == 0.0, means, 0.0)
                    means = round_to(means, LIMIT, EPS, LEAST)
                    tl.store(at + channel, means.to(center.dtype.element_ty), mask=known)
                    tl.debug_barrier()
                centers = token.load(at + row * (16 * nothing), LANES, VECTOR, PIECES)
            sources = (x, valid, factors, centers)
            targets = (packed, thirds, scale, zero, meta, plane)
            new, new_thirds, bad = _planes(
                sources,
                targets,
                valid_token,
                X_TOKEN,
                FORMAT,
                MAP,
                D,
                SHARED,
                LANES,
                VECTOR,
                not QUICK,
            )
            # Elements are looked at for what is not finite only where one is not.
            if QUICK:  # noqa: SIM102
                if tl.max(tl.max(bad, 1), 0) > 0:
                    new, new_thirds, bad = _planes(
                        sources,
                        targets,
                        valid_token,
                        X_TOKEN,
                        FORMAT,
                        MAP,
                        D,
                        SHARED,
                        LANES,
                        VECTOR,
                        True,
                    )
            packed, thirds = new, new_thirds
            x += SHARED * ROWS * X_TOKEN
            meta += SHARED * ROWS * GROUPS
            if valid is not None:
                valid += SHARED * ROWS * valid_token
            plane += SHARED
        if (part + 1) % (PUT // BYTE) == 0:
            _store(words, before, packed, plane - PUT, D, WIDTH, PUT, LANES)
            if BITS == 3:
                _store_thirds(words + 2 * ROWS * D, thirds, plane - PUT, D, PUT, LANES, VECTOR)
        before = packed
