"""The kernel of quantize_pack for tokens that are mapped, centered or smoothed before.

A program takes whole tokens of one head of a run, 32 at a time, and adds their codes to the words
of a tile. Sums have the order that transforms.py and grids.py give them, so that bytes are equal.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kivi.kernels.triton_grids import encode, fit, fit_midpoint, round_to
from kivi.kernels.triton_tile_pack import insert, insert_thirds, plane_weight
from kivi.spec import PAGE_TOKENS, TILE_ROWS

PAGE = tl.constexpr(PAGE_TOKENS)
ROWS = tl.constexpr(TILE_ROWS)


@triton.constexpr_function
def log2(n):
    return n.bit_length() - 1


@triton.jit
def hadamard(x, BLOCK: tl.constexpr):
    """`transforms.hadamard` of rows [N, channels], a power of two of them."""
    N: tl.constexpr = x.shape[0]
    D: tl.constexpr = x.shape[1]
    for k in tl.static_range(log2(BLOCK)):
        pairs = tl.permute(tl.reshape(x, [N, D // (2 << k), 2, 1 << k]), [0, 1, 3, 2])
        low, high = tl.split(pairs)
        x = tl.reshape(tl.permute(tl.join(low + high, low - high), [0, 1, 3, 2]), [N, D])
    return x * 2.0 ** -(log2(BLOCK) // 2)


@triton.jit
def _plane_sums(
    source,  # of the first token
    valid,
    factor,  # [channels], 1 / C in it
    X_TOKEN: tl.constexpr,
    valid_token,
    D: tl.constexpr,
    PADDED: tl.constexpr,
    PLANES: tl.constexpr,
    CHECKED: tl.constexpr,
):
    """Sums over the tokens of planes, and how many counted if CHECKED, [channels]."""
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
        sums = tl.fma(x, factor[None, :], sums)  # times powers of two: only the sum is rounded
        source += ROWS * X_TOKEN
    for k in tl.static_range(5):
        sums = tl.sum(tl.reshape(sums, [2, ROWS >> (k + 1), PADDED]), 0)
    return tl.reshape(sums, [PADDED]), tl.sum(count, 0)


@triton.jit
def _means(
    source,
    valid,
    factor,
    X_TOKEN: tl.constexpr,
    valid_token,
    D: tl.constexpr,
    PADDED: tl.constexpr,
    PLANES: tl.constexpr,
):
    """`grids.mean`, [channels]; looks at every element only where one is not finite."""
    C: tl.constexpr = PLANES * ROWS
    factor *= 1.0 / C
    MASKED: tl.constexpr = valid is not None
    means, count = _plane_sums(
        source, valid, factor, X_TOKEN, valid_token, D, PADDED, PLANES, MASKED
    )
    if not MASKED:
        if tl.max(tl.where(means * 0.0 == 0.0, 0, 1)) > 0:
            means, count = _plane_sums(
                source, valid, factor, X_TOKEN, valid_token, D, PADDED, PLANES, True
            )
            means *= tl.math.div_rn(C * 1.0, tl.maximum(count, 1).to(tl.float32))
    else:
        means *= tl.math.div_rn(C * 1.0, tl.maximum(count, 1).to(tl.float32))
    return means


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
    OFFSET: tl.constexpr,  # of a symmetric grid
    START: tl.constexpr,  # of a grid around 0, in standard deviations or of the largest element
    LIMIT: tl.constexpr,  # of the metadata's dtype
    EPS: tl.constexpr,
    LEAST: tl.constexpr,
    UNIT: tl.constexpr,  # of a refit
    CENTERED: tl.constexpr,  # planes that share a center
    PUT: tl.constexpr,  # planes of a run in one tile
    GROUPS: tl.constexpr,  # in a token, up to a power of two
    PADDED: tl.constexpr,  # channels of a group, up to a power of two
    SPLIT: tl.constexpr,  # pieces of a group in each of which a thread has elements
    VECTOR: tl.constexpr,  # neighbouring channels of a thread
):
    """Map and quantize tokens and put their codes, scales, zeros and centers into their page."""
    WIDTH: tl.constexpr = 2 if BITS == 3 else BITS
    TILE: tl.constexpr = 16 // WIDTH
    META: tl.constexpr = D // G
    ALL: tl.constexpr = GROUPS * PADDED
    SHARED: tl.constexpr = CENTERED if CENTERED < PUT else PUT  # planes with one center and tile
    SPAN: tl.constexpr = ROWS * (CENTERED if CENTERED > PUT else PUT)  # tokens of a program
    TILES: tl.constexpr = SPAN // (ROWS * PUT)

    number = tl.program_id(0)
    span = number % (U // SPAN)
    head = number // (U // SPAN) % heads
    run = (number // (U // SPAN) // heads).to(tl.int64)
    which = tl.load(page + run)
    if which == 0:  # the bin
        return
    token = tl.load(first + run) + span * SPAN  # in its page
    place = which * heads + head
    x += run // n * x_row + run % n * x_run
    x += head.to(tl.int64) * x_head + span.to(tl.int64) * (SPAN * X_TOKEN)
    every = tl.arange(0, ALL)
    factor = tl.full([ALL], 1.0, tl.float32)
    if smooth is not None:
        smooth += run // n * smooth_row + head.to(tl.int64) * smooth_head
        factor = tl.math.div_rn(1.0, tl.load(smooth + every, mask=every < D, other=1.0))

    # Elements: [groups, tokens, pieces of a group, channels of a piece]. See `quantize_tiles`.
    group = tl.arange(0, GROUPS)[:, None, None, None]
    row = tl.arange(0, ROWS)[None, :, None, None]
    i = tl.arange(0, PADDED // SPLIT)[None, None, None, :]
    i = i // VECTOR * VECTOR + i % VECTOR
    i += tl.arange(0, SPLIT)[None, None, :, None] * (PADDED // SPLIT)
    channel = group * G + i
    meta = (place * PAGE + token + row) * META + group
    known = None if META == GROUPS else group < META
    inside = None if D == ALL else channel < D
    times = tl.reshape(factor, [GROUPS, 1, SPLIT, PADDED // SPLIT])
    center_of = tl.zeros([GROUPS, 1, SPLIT, PADDED // SPLIT], tl.float32)
    packed = tl.zeros([GROUPS, ROWS, SPLIT, PADDED // SPLIT], tl.int32)
    if valid is not None:
        valid += run * valid_run + head.to(tl.int64) * valid_head
        valid += span * SPAN * valid_token
    words += place * (BITS * ROWS * D)
    plane = (token // ROWS).to(tl.int32)
    for part in tl.range(SPAN // (SHARED * ROWS)):
        if part % (PUT // SHARED) == 0:
            packed = tl.zeros([GROUPS, ROWS, SPLIT, PADDED // SPLIT], tl.int32)
        if center is not None:
            if part % (CENTERED // SHARED) == 0:
                means = _means(x, valid, factor, X_TOKEN, valid_token, D, ALL, CENTERED)
                means = hadamard(means[None, :], MAP)
                means = round_to(means, LIMIT, EPS, LEAST)
                at = (place * PAGE // (CENTERED * ROWS) + plane // CENTERED) * D
                mapped = tl.reshape(means, [ALL]).to(center.dtype.element_ty)
                tl.store(center + at + every, mapped, mask=None if D == ALL else every < D)
                center_of = tl.reshape(means, [GROUPS, 1, SPLIT, PADDED // SPLIT])
        for _ in tl.range(SHARED):
            mask = inside
            if valid is not None:
                counts = tl.load(valid + row * valid_token)
                mask = counts if inside is None else inside & counts
                valid += ROWS * valid_token
            raw = tl.load(x + row * X_TOKEN + channel, mask=mask, other=None if mask is None else 0)
            x += ROWS * X_TOKEN
            own = raw.to(tl.float32)
            if smooth is not None:
                own *= times
            if MAP > 1:
                own = tl.reshape(tl.permute(own, [1, 0, 2, 3]), [ROWS, ALL])
                own = tl.reshape(hadamard(own, MAP), [ROWS, GROUPS, SPLIT, PADDED // SPLIT])
                own = tl.permute(own, [1, 0, 2, 3])
            if center is not None:
                own -= center_of
            AROUND: tl.constexpr = GRID == "midpoint" or GRID == "unbiased"
            if valid is not None:  # what takes no part is NaN
                own = tl.where(counts, own, float("nan"))
            if inside is not None and not AROUND:
                own = tl.where(inside, own, float("nan"))
            if AROUND:
                s, codes = fit_midpoint(own, BITS, GRID, CLIP, START, G, LIMIT, EPS, LEAST)
            else:
                s, z = fit(
                    own, BITS, GRID, OFFSET, False, LIMIT, EPS, LEAST, UNIT, False, CLIP
                )
                codes = encode(own, s, z, BITS, EPS)
                if zero is not None:
                    tl.store(zero + meta, z.to(zero.dtype.element_ty), mask=known)
            tl.store(scale + meta, s.to(scale.dtype.element_ty), mask=known)
            meta += ROWS * META
            if BITS == 3:
                third = (codes & 4) * (plane_weight(plane % TILE, 1) * 16384)
                codes = (codes & 3) * plane_weight(plane % TILE, WIDTH) + third
            else:
                codes *= plane_weight(plane % TILE, WIDTH)
            packed += codes
            plane += 1
        if part % (PUT // SHARED) == PUT // SHARED - 1:
            begun = (plane - PUT) % TILE
            tile = (plane - PUT) // TILE
            word = row * D + channel
            insert(words + tile * (ROWS * D) + word, packed, inside, begun, WIDTH, PUT)
            if BITS == 3:
                halves = (words + 2 * ROWS * D).to(tl.pointer_type(tl.int8), bitcast=True)
                insert_thirds(halves + word * 2 + tile, packed, inside, begun, PUT)
