"""The kernel of quantize_pack for tokens that are mapped, centered or smoothed before.

A program takes whole tokens of one head of a run, 32 at a time, and adds their codes to the words
of a tile. Sums have the order that transforms.py and grids.py give them, so that bytes are equal.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kivi.kernels import triton_token as token
from kivi.kernels import triton_token_memory as memory
from kivi.kernels import triton_token_stage as stage
from kivi.kernels.triton_tile_mma import pairs_of_inverses, signs, times_pairs, without_small
from kivi.kernels.triton_tile_pack import plane_weight
from kivi.kernels.triton_token_centers import put_center
from kivi.kernels.triton_token_grids import (
    few_levels,
    quantize_group,
    scale_of_few_levels,
    turned_bit,
)
from kivi.kernels.triton_token_words import put_planes, put_thirds, split_all_thirds
from kivi.spec import PAGE_TOKENS, TILE_ROWS

PAGE = tl.constexpr(PAGE_TOKENS)
ROWS = tl.constexpr(TILE_ROWS)
AT_ONCE = tl.constexpr(128)  # tokens


@triton.jit
def _factors(
    smooth,
    at,  # 0 for each token
    D: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
    PAIRS: tl.constexpr,
    FAST: tl.constexpr,
):
    """What tokens are multiplied by, or nothing."""
    out = ()
    if smooth is not None:
        out = memory.load(smooth + at * 16, LANES, VECTOR, D // (LANES * VECTOR), FAST)
        out = pairs_of_inverses(out) if PAIRS else token.inverses(out)
    return out


@triton.jit
def _planes(
    sources,  # x, valid, factors, centers: of the first token
    targets,  # packed, thirds, scale, zero, meta, plane
    slot,  # of the first tokens, if STAGED
    ring,  # the first slot
    left,  # planes that follow in the program
    valid_token,
    nothing,
    X_TOKEN: tl.constexpr,
    FORMAT: tl.constexpr,
    MAP: tl.constexpr,
    D: tl.constexpr,
    PLANES: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
    SMALL: tl.constexpr,  # whether small elements are dropped
    TENSOR: tl.constexpr,  # whether by tensor cores
    CHECKED: tl.constexpr,
    STAGED: tl.constexpr,  # whether tokens come through shared memory
):
    """Add the codes of planes to bytes of words; 1 where a token's scale is not finite.

    Also the slot that follows, if STAGED.
    """
    BITS: tl.constexpr = FORMAT[0]
    G: tl.constexpr = FORMAT[2]
    WIDTH: tl.constexpr = 2 if BITS == 3 else BITS
    EACH: tl.constexpr = G // LANES  # channels of a thread in a group
    # Of every plane, in every byte.
    TURNED: tl.constexpr = turned_bit(FORMAT) * 16843009 // (4 if BITS == 3 else 1)
    # A scale is the same work in all lanes of a token: each does it for one of the planes, at last.
    LATE: tl.constexpr = TURNED != 0 and D == G and PLANES <= LANES
    x, valid, factors, centers = sources
    packed, thirds, scale, zero, meta, plane = targets
    row, lane = tl.arange(0, ROWS)[:, None], tl.arange(0, LANES)[None, :]
    bad = tl.zeros([ROWS, LANES], tl.int32)
    squares = tl.zeros([ROWS, LANES], tl.float32)
    products, peaks = squares, squares
    turned = 0
    # Not of each plane: a product with a power of two would become a shift and a sum.
    weight = plane_weight(plane % (8 // WIDTH), WIDTH)
    third_weight = plane_weight(plane % 8, 1)
    for number in tl.range(PLANES):
        if TENSOR:
            if STAGED:
                own = stage.take(stage.wait(slot, stage.SLOTS - 1))
                later = x + stage.SLOTS * ROWS * X_TOKEN
                stage.copy(slot, later, X_TOKEN, left - number >= stage.SLOTS)
                slot = stage.following(slot, ring)
            else:
                own = memory.load_pairs(x + row * X_TOKEN, LANES, VECTOR, D // (LANES * VECTOR))
            if len(factors) > 0:
                own = times_pairs(own, factors)
            own, huge = without_small(own)
            bad |= huge.to(tl.int32)
            own = token.hadamard_by_tensor_cores(own, signs(ROWS), nothing, MAP, LANES, VECTOR)
        else:
            own = memory.load(x + row * X_TOKEN, LANES, VECTOR, D // (LANES * VECTOR), FORMAT[9])
            if len(factors) > 0:
                own = token.times(own, factors)
            if SMALL:
                own = token.without_small(own)
            own = token.hadamard(own, MAP, LANES, VECTOR)
        x += ROWS * X_TOKEN
        if len(centers) > 0:
            own = token.minus(own, centers)
        if valid is not None:  # what takes no part is NaN
            own = token.only(own, tl.load(valid + row * valid_token))
            valid += ROWS * valid_token
        codes = ()
        if LATE:
            codes, s, p, peak = few_levels(own, CHECKED, FORMAT)
            squares = tl.where(lane == number, s, squares)
            products = tl.where(lane == number, p, products)
            peaks = tl.where(lane == number, peak, peaks)
        else:
            for group in tl.static_range(D // G):
                own_group = token.some(own, group * EACH, EACH)
                bytes, s, z = quantize_group(own_group, CHECKED, FORMAT)
                codes = codes + bytes
                bad |= tl.where(s * 0.0 == 0.0, 0, 1)
                # Only of lane 0; the others are there for the layout, which no store must change.
                at = meta + group + lane
                s = tl.broadcast_to(s, at.shape).to(scale.dtype.element_ty)
                tl.store(scale + at, s, mask=lane == 0)
                if zero is not None:
                    z = tl.broadcast_to(z, at.shape).to(zero.dtype.element_ty)
                    tl.store(zero + at, z, mask=lane == 0)
            meta += ROWS * (D // G)
        if BITS == 3:
            codes, third = split_all_thirds(codes)
            thirds = token.plus_scaled(thirds, third, third_weight)
            turned += TURNED * third_weight
            third_weight *= 2
        else:
            turned += TURNED * weight
        packed = token.plus_scaled(packed, codes, weight)
        weight *= 2**WIDTH
    if LATE:
        s = scale_of_few_levels(squares, products, peaks, CHECKED, FORMAT)
        bad |= tl.where(s * 0.0 == 0.0, 0, 1)
        s = s.to(scale.dtype.element_ty)
        if FORMAT[9] and PLANES == LANES:
            memory.store(scale + meta + lane * ROWS, s)
        else:
            tl.store(scale + meta + lane * ROWS, s, mask=lane < PLANES)
    if TURNED != 0:
        if BITS == 3:
            thirds = token.turned(thirds, turned)
        else:
            packed = token.turned(packed, turned)
    return packed, thirds, bad, slot


@triton.jit
def _span(
    sources,  # x, valid, smooth: of the first token
    targets,  # words and center: of the page and head; scale, zero, meta, plane
    valid_token,
    nothing,
    X_TOKEN: tl.constexpr,
    FORMAT: tl.constexpr,
    MAP: tl.constexpr,
    U: tl.constexpr,
    D: tl.constexpr,
    PADDED: tl.constexpr,
    CENTERED: tl.constexpr,
    PUT: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
    SMALL: tl.constexpr,
    TENSOR: tl.constexpr,
    CHECKED: tl.constexpr,
):
    """Quantize the tokens of a program; 1 where a token's scale is not finite, if not CHECKED."""
    BITS: tl.constexpr = FORMAT[0]
    WIDTH: tl.constexpr = 2 if BITS == 3 else BITS
    BYTE: tl.constexpr = min(PUT, 8 // WIDTH)  # planes in a byte of a word
    SHARED: tl.constexpr = min(CENTERED, BYTE)
    PIECES: tl.constexpr = D // (LANES * VECTOR)
    PARTS: tl.constexpr = U // (BYTE * ROWS)
    x, valid, smooth = sources
    words, center, scale, zero, meta, plane = targets
    row = tl.arange(0, ROWS)[:, None]
    factors = _factors(smooth, row * nothing, D, LANES, VECTOR, TENSOR, FORMAT[9])
    none = token.zeros(ROWS, LANES, D // (4 * LANES))
    before, thirds = none, none
    STAGED: tl.constexpr = TENSOR and D == 128 and CENTERED <= BYTE and CENTERED < stage.SLOTS
    ring, left, of_means = nothing, U // ROWS - 1, ()
    if STAGED:
        if smooth is not None:
            of_means = stage.inverses(smooth)
        ring = stage.ring(nothing)
        for k in tl.static_range(stage.SLOTS):
            stage.copy(ring + k * stage.SLOT, x + k * ROWS * X_TOKEN, X_TOKEN, left >= k)
    slot = ring
    bad = tl.zeros([ROWS, LANES], tl.int32)
    for part in tl.range(PARTS):
        if FORMAT[9] and PARTS > 1 and not STAGED:  # noqa: SIM102
            if part + 1 < PARTS:
                memory.prefetch(x + BYTE * ROWS * X_TOKEN, X_TOKEN, D, BYTE * ROWS)
        packed = none
        for _ in tl.range(BYTE // SHARED):
            centers = ()
            if center is not None:
                at = center + plane // CENTERED * D
                if plane % CENTERED == 0 and not STAGED:
                    put_center(
                        *(at, x, valid, smooth, valid_token, X_TOKEN, FORMAT, MAP),
                        *(D, PADDED, CENTERED * ROWS, LANES, VECTOR, CHECKED),
                    )
                if STAGED:
                    slot = stage.wait(slot, stage.SLOTS - CENTERED)
                    centers = stage.centers(slot, ring, at, of_means, CENTERED, MAP, FORMAT)
                else:
                    centers = memory.load(
                        at + row * (16 * nothing), LANES, VECTOR, PIECES, FORMAT[9]
                    )
            packed, thirds, new_bad, slot = _planes(
                (x, valid, factors, centers),
                (packed, thirds, scale, zero, meta, plane),
                *(slot, ring, left, valid_token, nothing, X_TOKEN, FORMAT, MAP),
                *(D, SHARED, LANES, VECTOR, SMALL, TENSOR, CHECKED, STAGED),
            )
            bad |= new_bad
            x += SHARED * ROWS * X_TOKEN
            meta += SHARED * ROWS * (D // FORMAT[2])
            if valid is not None:
                valid += SHARED * ROWS * valid_token
            plane += SHARED
            left -= SHARED
        if (part + 1) % (PUT // BYTE) == 0:
            put_planes(words, before, packed, plane - PUT, D, WIDTH, PUT, LANES, FORMAT[9])
            if BITS == 3:
                bits = words + 2 * ROWS * D
                put_thirds(bits, thirds, plane - PUT, D, PUT, LANES, VECTOR, FORMAT[9])
                thirds = none
        before = packed
    return bad


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
    SMALL: tl.constexpr,  # see `transforms.drops_small`
    TENSOR: tl.constexpr,  # whether tensor cores can map tokens
):
    """Map and quantize tokens and put their codes, scales, zeros and centers into their page."""
    GROUPS: tl.constexpr = D // FORMAT[2]
    QUICK: tl.constexpr = FORMAT[1] == "unbiased" and FORMAT[0] <= 3 and valid is None

    head = tl.program_id(0) % heads
    run = (tl.program_id(0) // heads).to(tl.int64)
    x += run // n * x_row + run % n * x_run + head.to(tl.int64) * x_head
    which, start = tl.load(page + run), tl.load(first + run)
    # Not of short runs: those may go to the bin at every step.
    if FORMAT[9] and U > AT_ONCE:
        memory.prefetch(x, X_TOKEN, D, AT_ONCE)
    if which == 0:  # the bin
        return
    place = which * heads + head
    row = tl.arange(0, ROWS)[:, None]
    # Times 1, unknown to the compiler: it would choose a layout for neighbouring tokens.
    meta = (place * PAGE + start + row * (1 + nothing)) * GROUPS
    if smooth is not None:
        smooth += run // n * smooth_row + head.to(tl.int64) * smooth_head
    if valid is not None:
        valid += run * valid_run + head.to(tl.int64) * valid_head
    words += place * (FORMAT[0] * ROWS * D)
    if center is not None:
        center += place * (PAGE // (CENTERED * ROWS) * D)
    sources = (x, valid, smooth)
    targets = (words, center, scale, zero, meta, (start // ROWS).to(tl.int32))
    bad = _span(
        *(sources, targets, valid_token, nothing, X_TOKEN, FORMAT, MAP, U, D, PADDED, CENTERED),
        *(PUT, LANES, VECTOR, SMALL, TENSOR and QUICK, not QUICK),
    )
    # Elements are looked at for what is not finite only where one is not.
    if QUICK:  # noqa: SIM102
        if tl.max(tl.max(bad, 1), 0) > 0:
            _span(
                *(sources, targets, valid_token, nothing, X_TOKEN, FORMAT, MAP, U, D, PADDED),
                *(CENTERED, PUT, LANES, VECTOR, SMALL, False, True),
            )
