"""The kernels of quantize_pack: statistics, codes and words of tiles while they are in registers.

A program takes one head of a run: a word tile, or the run's planes of it, and a block of channels.
It walks over *chunks* of 32 tokens, or of one group of more, and adds each chunk's codes to the
words.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kivi.kernels.triton_grids import encode, fit
from kivi.kernels.triton_tile_pack import insert, insert_thirds, pair, plane_weight, unpair
from kivi.spec import PAGE_TOKENS, TILE_ROWS

PAGE = tl.constexpr(PAGE_TOKENS)
ROWS = tl.constexpr(TILE_ROWS)


# n changes with a prompt: a kernel would be compiled again for 1, and for multiples of 16. So would
# it be where pages are those from an odd column of a table on.
@triton.jit(do_not_specialize=["n", "nothing"], do_not_specialize_on_alignment=["page", "first"])
def quantize_tiles(
    words,  # [pages, heads, BITS, 32, D] int16
    scale,  # channel: [pages, heads, 512 / G, D]; token: [pages, heads, 512, D / G]
    zero,  # like scale, or None
    x,  # [runs / n, n, heads, U, D]
    page,  # [runs] int64; nothing is done for page 0
    first,  # [runs] int64
    valid,  # [runs, heads, U] bool, or None
    heads,
    n,  # runs in a row
    x_row,  # strides
    x_run,
    x_head,
    valid_run,
    valid_head,
    valid_token,
    nothing,  # 0, unknown to the compiler
    X_TOKEN: tl.constexpr,  # a stride too, of a layout and not of a prompt
    BITS: tl.constexpr,
    CHANNEL: tl.constexpr,
    GRID: tl.constexpr,
    G: tl.constexpr,
    U: tl.constexpr,
    D: tl.constexpr,
    OFFSET: tl.constexpr,  # of a symmetric grid
    LIMIT: tl.constexpr,  # of the metadata's dtype
    EPS: tl.constexpr,
    LEAST: tl.constexpr,
    UNIT: tl.constexpr,  # of a refit
    CHUNK: tl.constexpr,  # tokens
    SPAN: tl.constexpr,  # tokens of a program
    BLOCK: tl.constexpr,  # channels of a program, or groups of channels
    BLOCKS: tl.constexpr,
    PADDED: tl.constexpr,  # channels of a group, up to a power of two
    SPLIT: tl.constexpr,  # pieces of a group of channels in each of which a thread has elements
    VECTOR: tl.constexpr,  # neighbouring channels of a thread
    STAGES: tl.constexpr,  # chunks on their way
    PAIRS: tl.constexpr,  # bfloat16 two by two, with the instructions of sm_80
):
    """Quantize tokens and put their codes, scales and zeros into their page."""
    # The low part of a code, for 3 bits not all of it: its width, and the planes of a tile.
    WIDTH: tl.constexpr = 2 if BITS == 3 else BITS
    TILE: tl.constexpr = 16 // WIDTH
    PLANES: tl.constexpr = CHUNK // ROWS
    SHARE: tl.constexpr = PLANES if PLANES < TILE else TILE  # planes of a chunk in one tile
    TILES: tl.constexpr = PLANES // SHARE
    META: tl.constexpr = D if CHANNEL else D // G  # a row of scales

    number = tl.program_id(0)
    block = number % BLOCKS
    span = number // BLOCKS % (U // SPAN)
    head = number // (BLOCKS * (U // SPAN)) % heads
    run = (number // (BLOCKS * (U // SPAN)) // heads).to(tl.int64)
    which = tl.load(page + run)
    if which == 0:  # the bin
        return
    token = tl.load(first + run) + span * SPAN  # in its page
    place = which * heads + head
    x += run // n * x_row + run % n * x_run
    x += head.to(tl.int64) * x_head + span.to(tl.int64) * (SPAN * X_TOKEN)

    # Elements of a chunk: [groups, tokens of a group, channels], or [groups, tokens, pieces of a
    # group, channels of a piece]. `i // VECTOR * VECTOR + i % VECTOR` is i, and tells the compiler
    # how many neighbours to give a thread: so that it also gets all tokens, or all pieces.
    if CHANNEL:
        i = tl.arange(0, BLOCK)[None, None, :]
        channel = block * BLOCK + i // VECTOR * VECTOR + i % VECTOR
        group = tl.arange(0, CHUNK // G)[:, None, None]
        row = group * G + tl.arange(0, G)[None, :, None]
        meta = (place * (PAGE // G) + token // G + group) * META + channel
        known = None if D % BLOCK == 0 else channel < D
        inside = known
        tile = tl.arange(0, TILES)[:, None, None]
        word = tl.arange(0, ROWS)[None, :, None] * D + channel
        packed = tl.zeros([TILES, ROWS, BLOCK], tl.int32)
    else:
        group = block * BLOCK + tl.arange(0, BLOCK)[:, None, None, None]
        row = tl.arange(0, ROWS)[None, :, None, None]
        i = tl.arange(0, PADDED // SPLIT)[None, None, None, :]
        i = i // VECTOR * VECTOR + i % VECTOR
        i += tl.arange(0, SPLIT)[None, None, :, None] * (PADDED // SPLIT)
        channel = group * G + i
        # Times 1, unknown to the compiler: it would choose a layout for neighbouring tokens.
        lane = tl.arange(0, max(1, PADDED // SPLIT // VECTOR))[None, None, None, :]
        meta = (place * PAGE + token + row * (1 + nothing)) * META + group + lane
        inside = None if META % BLOCK == 0 else group < META
        known = lane == 0 if inside is None else inside & (lane == 0)
        inside = inside if PADDED == G else (group < META) & (i < G)
        tile = 0
        word = row * D + channel
        packed = tl.zeros([BLOCK, ROWS, SPLIT, PADDED // SPLIT], tl.int32)

    source = x + row * X_TOKEN + channel
    if valid is not None:
        valid += run * valid_run + head.to(tl.int64) * valid_head
        valid += (span * SPAN + row) * valid_token
    plane = (token // ROWS).to(tl.int32) % TILE
    weight = plane_weight(plane, WIDTH)
    third_weight = plane_weight(plane, 1)
    # Masks of tokens do not go well with asynchronous copies.
    DEPTH: tl.constexpr = STAGES if valid is None else 1
    for _ in tl.range(SPAN // CHUNK, num_stages=DEPTH):
        if valid is None:
            mask = inside
        else:
            mask = tl.load(valid) if inside is None else inside & tl.load(valid)
            valid += CHUNK * valid_token
        # A NaN takes no part in its group, and its code is 0.
        raw = tl.load(source, mask=mask, other=None if mask is None else float("nan"))
        source += CHUNK * X_TOKEN
        s, z = fit(raw, BITS, GRID, OFFSET, CHANNEL, LIMIT, EPS, LEAST, UNIT, PAIRS)
        s_out = tl.broadcast_to(s, meta.shape) if not CHANNEL else s
        tl.store(scale + meta, s_out.to(scale.dtype.element_ty), mask=known)
        if zero is not None:
            z_out = tl.broadcast_to(z, meta.shape) if not CHANNEL else z
            tl.store(zero + meta, z_out.to(zero.dtype.element_ty), mask=known)
        meta += CHUNK // (G if CHANNEL else 1) * META
        # Of pairs again: all that a thread has stays in it, where their statistics are.
        elements = unpair(pair(raw)) if PAIRS and not CHANNEL else raw.to(tl.float32)
        codes = encode(elements, s, z, BITS, EPS)
        if CHANNEL:
            codes = tl.reshape(codes, [TILES, SHARE, ROWS, BLOCK])
            offset = tl.arange(0, SHARE)[None, :, None, None]
        else:
            offset = 0
        here = weight * plane_weight(offset, WIDTH)
        if BITS == 3:
            # The third bits of a tile go beside its words: 2^14 takes bit 2 to bit 16.
            third = (codes & 4) * (third_weight * plane_weight(offset, 1) * 16384)
            codes = (codes & 3) * here + third
            third_weight *= 2**SHARE
        else:
            codes *= here
        packed += tl.sum(codes, 1) if CHANNEL else codes
        weight *= 2 ** (WIDTH * SHARE)
    PUT: tl.constexpr = (SPAN if SPAN < TILE * ROWS else TILE * ROWS) // ROWS  # planes of a tile
    words += place * (BITS * ROWS * D)
    tile += (token // (TILE * ROWS)).to(tl.int32)
    insert(words + tile * (ROWS * D) + word, packed, inside, plane, WIDTH, PUT)
    if BITS == 3:
        halves = (words + 2 * ROWS * D).to(tl.pointer_type(tl.int8), bitcast=True)
        insert_thirds(halves + word * 2 + tile, packed, inside, plane, PUT)


@triton.jit(do_not_specialize=["n"], do_not_specialize_on_alignment=["page", "first"])
def copy_tokens(
    words,  # [pages, heads, 512, D], like x
    x,  # [runs / n, n, heads, U, D]
    page,  # [runs] int64; nothing is done for page 0
    first,  # [runs] int64
    heads,
    n,  # runs in a row
    x_row,  # strides
    x_run,
    x_head,
    X_TOKEN: tl.constexpr,
    U: tl.constexpr,
    D: tl.constexpr,
    PADDED: tl.constexpr,
):
    """Tokens as they are."""
    number = tl.program_id(0)
    start = number % (U // ROWS) * ROWS
    head = number // (U // ROWS) % heads
    run = (number // (U // ROWS) // heads).to(tl.int64)
    which = tl.load(page + run)
    if which == 0:  # the bin
        return
    place = (which * heads + head) * PAGE + tl.load(first + run) + start
    x += run // n * x_row + run % n * x_run
    source = x + head.to(tl.int64) * x_head + start.to(tl.int64) * X_TOKEN
    row, channel = tl.arange(0, ROWS)[:, None], tl.arange(0, PADDED)[None, :]
    mask = None if PADDED == D else channel < D
    tokens = tl.load(source + row * X_TOKEN + channel, mask=mask)
    tl.store(words + place * D + row * D + channel, tokens, mask=mask)
