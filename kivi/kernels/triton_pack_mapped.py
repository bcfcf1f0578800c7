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
    insert,
    insert_pairs,
    plane_weight,
    split_thirds,
    unpack_vector,
    words_of_bytes,
)
from kivi.kernels.triton_token_grids import quantize_group
from kivi.spec import PAGE_TOKENS, TILE_ROWS

PAGE = tl.constexpr(PAGE_TOKENS)
ROWS = tl.constexpr(TILE_ROWS)


@triton.jit
def _plane_sums(
    source,  # of the first token
    valid,
    X_TOKEN: tl.constexpr,
    valid_token,
    D: tl.constexpr,
    PADDED: tl.constexpr,
    PLANES: tl.constexpr,
    CHECKED: tl.constexpr,
):
    """Sums over the tokens of planes, over their number, and how many counted if CHECKED."""
    row, channel = tl.arange(0, ROWS)[:, None], tl.arange(0, PADDED)[None, :]
    inside = None if PADDED == D else channel < D
    sums = tl.zeros([ROWS, PADDED], tl.float32)
    count = tl.zeros([ROWS, PADDED], tl.int32)
    for _ in tl.range(PLANES):
        mask = inside
        if valid is not None:
            mask = tl.load(valid + row * valid_token)
            mask = mask if inside is None else inside & mask
            valid += ROWS * valid_token
        x = tl.load(source + row * X_TOKEN + channel, mask=mask, other=None if mask is None else 0)
        x = x.to(tl.float32)
        if CHECKED:
            finite = x * 0.0 == 0.0
            x = tl.where(finite, x, 0.0)
            counts = finite if mask is None else finite & mask
            count += counts.to(tl.int32)
        sums = tl.fma(x, 1.0 / (PLANES * ROWS), sums)  # a power of two: only the sum is rounded
        source += ROWS * X_TOKEN
    for k in tl.static_range(5):
        sums = tl.sum(tl.reshape(sums, [2, ROWS // 2 ** (k + 1), PADDED]), 0)
    return tl.reshape(sums, [PADDED]), tl.sum(count, 0)


@triton.jit
def _means(
    source,
    valid,
    X_TOKEN: tl.constexpr,
    valid_token,
    D: tl.constexpr,
    PADDED: tl.constexpr,
    PLANES: tl.constexpr,
):
    """`grids.mean`, [channels]; looks at every element only where one is not finite."""
    MASKED: tl.constexpr = valid is not None
    means, count = _plane_sums(source, valid, X_TOKEN, valid_token, D, PADDED, PLANES, MASKED)
    if MASKED:
        means *= tl.math.div_rn(PLANES * ROWS * 1.0, tl.maximum(count, 1).to(tl.float32))
    else:
        if tl.max(tl.where(means * 0.0 == 0.0, 0, 1), 0) > 0:
            means, count = _plane_sums(source, valid, X_TOKEN, valid_token, D, PADDED, PLANES, True)
            means *= tl.math.div_rn(PLANES * ROWS * 1.0, tl.maximum(count, 1).to(tl.float32))
    return means


@triton.jit
def _load(source, LANES: tl.constexpr, VECTOR: tl.constexpr, PIECES: tl.constexpr):
    """Tokens in registers, of pointers [tokens, 1] to their first channels."""
    i = tl.arange(0, LANES * VECTOR)[None, :]
    # Tells the compiler how many neighbours to give a thread.
    i = i // VECTOR * VECTOR + i % VECTOR
    out = ()
    for piece in tl.static_range(PIECES):
        x = tl.load(source + piece * (LANES * VECTOR) + i)
        out = out + unpack_vector(x, LANES, VECTOR)
    return out


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
    VECTOR: tl.constexpr,
):
    """Put planes into the words of a tile; the others stay."""
    PAIRS: tl.constexpr = VECTOR // 2
    in_tile = plane % (16 // WIDTH)
    words += plane // (16 // WIDTH) * (ROWS * D)
    i = tl.arange(0, LANES * PAIRS)[None, :]
    at = words.to(tl.pointer_type(tl.int32), bitcast=True) + tl.arange(0, ROWS)[:, None] * (D // 2)
    at += i // PAIRS * PAIRS + i % PAIRS
    place = tl.arange(0, PAIRS)[None, None, :]
    for piece in tl.static_range(D // (LANES * VECTOR)):
        low = tl.zeros([ROWS, LANES, PAIRS], tl.int32)
        high = low
        for pair in tl.static_range(PAIRS):
            late = last[piece * (VECTOR // 4) + pair // 2]
            if PUT * WIDTH == 16:
                early = before[piece * (VECTOR // 4) + pair // 2]
                one = words_of_bytes(early, late, pair % 2 * 2)
                two = words_of_bytes(early, late, pair % 2 * 2 + 1)
            else:
                half = plane_weight(in_tile // (8 // WIDTH), 8)
                one = words_of_bytes(late, 0, pair % 2 * 2) * half
                two = words_of_bytes(late, 0, pair % 2 * 2 + 1) * half
            low = tl.where(place == pair, one[:, :, None], low)
            high = tl.where(place == pair, two[:, :, None], high)
        low = tl.reshape(low, [ROWS, LANES * PAIRS])
        high = tl.reshape(high, [ROWS, LANES * PAIRS])
        insert_pairs(at + piece * (LANES * PAIRS), low, high, in_tile, WIDTH, PUT)


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
        byte = words_of_bytes(thirds[k // 4], 0, k % 4)
        insert(halves + (row * D + channel) * 2, byte, None, plane % 8, 1, PUT)


@triton.jit(do_not_specialize=["n"])
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
    X_TOKEN: tl.constexpr,
    BITS: tl.constexpr,
    GRID: tl.constexpr,
    CLIP: tl.constexpr,
    MAP: tl.constexpr,  # channels that the Hadamard map mixes, 1: none
    G: tl.constexpr,
    U: tl.constexpr,
    D: tl.constexpr,
    PADDED: tl.constexpr,  # D, up to a power of two
    OFFSET: tl.constexpr,  # of a grid without zeros
    START: tl.constexpr,  # its first step, over the largest element or the standard deviation
    LIMIT: tl.constexpr,  # of the metadata's dtype
    EPS: tl.constexpr,
    LEAST: tl.constexpr,
    CENTERED: tl.constexpr,  # planes that share a center
    PUT: tl.constexpr,  # planes of a run in one tile
    LANES: tl.constexpr,  # see triton_token.py
    VECTOR: tl.constexpr,
    FAST: tl.constexpr,  # NVIDIA's assembly
):
    """Map and quantize tokens and put their codes, scales, zeros and centers into their page."""
    WIDTH: tl.constexpr = 2 if BITS == 3 else BITS
    PIECES: tl.constexpr = D // (LANES * VECTOR)
    GROUPS: tl.constexpr = D // G
    EACH: tl.constexpr = G // LANES  # channels of a thread in a group
    BYTE: tl.constexpr = min(PUT, 8 // WIDTH)  # planes in a byte of a word
    SHARED: tl.constexpr = min(CENTERED, BYTE)
    SPAN: tl.constexpr = ROWS * max(CENTERED, PUT)  # tokens of a program

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
    if smooth is not None:
        smooth += run // n * smooth_row + head.to(tl.int64) * smooth_head
        factors = token.inverses(_load(smooth + row * 0, LANES, VECTOR, PIECES))
    if valid is not None:
        valid += run * valid_run + head.to(tl.int64) * valid_head
        valid += span * SPAN * valid_token
    words += place * (BITS * ROWS * D)
    plane = (start // ROWS).to(tl.int32)
    none = token.zeros(ROWS, LANES, D // (4 * LANES))
    before, thirds = none, none
    for part in tl.range(SPAN // (BYTE * ROWS)):
        packed = none
        for _center in tl.range(BYTE // SHARED):
            if center is not None:
                at = center + (place * (PAGE // (CENTERED * ROWS)) + plane // CENTERED) * D
                if plane % CENTERED == 0:
                    means = _means(x, valid, X_TOKEN, valid_token, D, PADDED, CENTERED)
                    channel = tl.arange(0, PADDED)
                    known = None if D == PADDED else channel < D
                    if smooth is not None:
                        divisor = tl.load(smooth + channel, mask=known)
                        means = tl.math.div_rn(means, divisor)
                    means = round_to(token.hadamard_of_one(means, MAP), LIMIT, EPS, LEAST)
                    tl.store(at + channel, means.to(center.dtype.element_ty), mask=known)
                    tl.debug_barrier()
                centers = _load(at + row * 0, LANES, VECTOR, PIECES)
            for _plane in tl.range(SHARED):
                own = _load(x + row * X_TOKEN, LANES, VECTOR, PIECES)
                x += ROWS * X_TOKEN
                if smooth is not None:
                    own = token.times(own, factors)
                own = token.hadamard(own, MAP, LANES, VECTOR)
                if center is not None:
                    own = token.minus(own, centers)
                if valid is not None:  # what takes no part is NaN
                    own = token.only(own, tl.load(valid + row * valid_token))
                    valid += ROWS * valid_token
                codes = ()
                for group in tl.static_range(GROUPS):
                    bytes, s, z = quantize_group(
                        token.some(own, group * EACH, EACH),
                        BITS,
                        GRID,
                        CLIP,
                        START,
                        OFFSET,
                        G,
                        LIMIT,
                        EPS,
                        LEAST,
                        FAST,
                    )
                    codes = codes + bytes
                    tl.store(scale + meta + group, s.to(scale.dtype.element_ty))
                    if zero is not None:
                        tl.store(zero + meta + group, z.to(zero.dtype.element_ty))
                meta += ROWS * GROUPS
                weight = plane_weight(plane % (8 // WIDTH), WIDTH)
                if BITS == 3:
                    codes, third = _split_thirds(codes)
                    thirds = token.plus_scaled(thirds, third, plane_weight(plane % 8, 1))
                packed = token.plus_scaled(packed, codes, weight)
                plane += 1
        if (part + 1) % (PUT // BYTE) == 0:
            _store(words, before, packed, plane - PUT, D, WIDTH, PUT, LANES, VECTOR)
            if BITS == 3:
                _store_thirds(words + 2 * ROWS * D, thirds, plane - PUT, D, PUT, LANES, VECTOR)
        before = packed
