"""Tiles of the Hopper extend kernel on their way into shared memory, as its matrix units read them.

A producer is a warp group. It writes tiles of 128 tokens, 32 at a time.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from kivi.kernels.triton_tile_dense import below_mantissa, value_asm
from kivi.kernels.triton_tile_gluon import move_down

WARPS = gl.constexpr(4)  # of a producer


@gluon.constexpr_function
def grouped(columns, group):
    """16 bytes a thread of `[32, columns / group, group]` 16-bit elements, rows by warps."""
    inner, outer = group // 8, columns // group
    return gl.BlockedLayout(
        [1, 1, 8], [32 // inner // outer, outer, inner], [WARPS.value, 1, 1], [2, 1, 0]
    )


@gluon.constexpr_function
def dense_rows(columns):
    """The same of `[32, columns]`."""
    return gl.BlockedLayout([1, 8], [256 // columns, columns // 8], [WARPS.value, 1], [1, 0])


@gluon.constexpr_function
def third_position(plane, dtype):
    """The bit at which codes of 3 bits become numbers: theirs, or 0 where they would not fit."""
    return 2 * plane if 2 * plane + 3 <= (10 if dtype == gl.float16 else 7) else 0


@gluon.jit
def values(
    words,
    high,  # words with third bits
    scale,
    zero,
    plane: gl.constexpr,
    bits: gl.constexpr,
    offset: gl.constexpr,
    centered: gl.constexpr,
):
    """Codes of a plane of words (their first plane is 0) times scale plus zero."""
    if bits == 3:
        position: gl.constexpr = third_position(plane, scale.dtype)
        if position < 2 * plane:
            words = move_down(words, 2 * plane)
        return gl.inline_asm_elementwise(
            value_asm(bits, position, scale.dtype, offset, centered, position + 2 - plane),
            "=r,r,r,r,r",
            [words, scale, zero, high],
            dtype=scale.dtype,
            is_pure=True,
            pack=2,
        )
    else:
        direct: gl.constexpr = below_mantissa(bits, scale.dtype)
        if plane >= direct:
            words = move_down(words, plane // direct * direct * bits)
        return gl.inline_asm_elementwise(
            value_asm(bits, plane % direct * bits, scale.dtype, offset, centered),
            "=r,r,r,r",
            [words, scale, zero],
            dtype=scale.dtype,
            is_pure=True,
            pack=2,
        )


@gluon.jit
def put_packed(
    target,  # [128, D]
    words,  # of a page and head: [bits, 32, D]
    scale,  # of a page and head: [512 / G, D], or [512, D / G]
    zero,  # likewise, read where offset is 0; [512 / C, D], the centers, where there are any
    chunk,  # of 128 tokens, in the page
    last,  # the last plane that is written, in the page
    D: gl.constexpr,
    bits: gl.constexpr,
    G: gl.constexpr,
    channel: gl.constexpr,
    offset: gl.constexpr,
    C: gl.constexpr,  # tokens that share a center; 0: none
):
    """Four planes of packed tokens; planes that are not written take the last one's scales."""
    wide: gl.constexpr = D if channel else G
    layout: gl.constexpr = grouped(D, wide)
    width: gl.constexpr = 2 if bits == 3 else bits
    held: gl.constexpr = 16 // width
    in_tile: gl.constexpr = min(4, held)
    r = gl.arange(0, 32, layout=gl.SliceLayout(1, gl.SliceLayout(2, layout)))
    g = gl.arange(0, D // wide, layout=gl.SliceLayout(0, gl.SliceLayout(2, layout)))
    c = gl.arange(0, wide, layout=gl.SliceLayout(0, gl.SliceLayout(1, layout)))
    rg = r[:, None] * D + g[None, :] * wide
    at = rg[:, :, None] + c[None, None, :]
    # All loads first: a store makes the warps of the producer wait for each other.
    tiles = ()
    for tile in gl.static_range(4 // in_tile):
        first = chunk * 4 + tile * in_tile
        w = gl.load(words + first // held * (32 * D) + at)
        if in_tile < held:
            w = move_down(w, first % held * width)
        tiles = tiles + (w,)
    high = tiles[0]  # not looked at
    if bits == 3:
        high = move_down(gl.load(words + 64 * D + at), chunk * 4)
    scales = ()
    zeros = ()
    for i in gl.static_range(4):
        plane = gl.minimum(chunk * 4 + i, last)
        if channel:
            s_at = (plane * 32 // G * D + c)[None, None, :]
        else:
            s_at = ((plane * 32 + r)[:, None] * (D // G) + g[None, :])[:, :, None]
        if channel and i * 32 % G != 0:  # planes of one group
            s, z = scales[i - 1], zeros[i - 1]
        else:
            s = gl.load(scale + s_at)
            z = s  # not looked at
            if offset == 0:
                z = gl.load(zero + s_at)
        if C > 0:
            if i * 32 % C != 0:
                z = zeros[i - 1]
            else:
                z = gl.load(zero + (plane * 32 // C * D + c)[None, None, :])
        scales = scales + (s,)
        zeros = zeros + (z,)
    for i in gl.static_range(4):
        w = tiles[i // in_tile]
        s, _a = gl.broadcast(scales[i], w)
        z, _b = gl.broadcast(zeros[i], w)
        x = values(w, high, s, z, i % in_tile, bits, offset, C > 0)
        target.slice(i * 32, 32).store(x.reshape([32, D]))


@gluon.jit
def put_map(
    target,  # [D, D]
    factors,  # [D], read where SMOOTH
    D: gl.constexpr,
    BLOCK: gl.constexpr,
    SMOOTH: gl.constexpr,
    rows: gl.constexpr,  # whether the factors are of rows, else of columns
):
    """The matrix of `transforms.inverse_hadamard`, its rows or columns times factors.

    All are powers of two, of which 16 bits hold more than there are.
    """
    layout: gl.constexpr = dense_rows(D)
    unit: gl.constexpr = 2.0 ** -(BLOCK.bit_length() // 2)
    c = gl.arange(0, D, layout=gl.SliceLayout(0, layout))
    for i in gl.static_range(D // 32):
        r = i * 32 + gl.arange(0, 32, layout=gl.SliceLayout(1, layout))
        common = r[:, None] & c[None, :] & (BLOCK - 1)
        common ^= common >> 4
        # Bit n is the parity of n.
        x = gl.where((0x6996 >> (common & 15)) & 1 != 0, -unit, unit)
        x = gl.where(r[:, None] // BLOCK == c[None, :] // BLOCK, x, 0.0)
        if SMOOTH:
            x *= gl.load(factors + r)[:, None] if rows else gl.load(factors + c)[None, :]
        target.slice(i * 32, 32).store(x.to(target.dtype))


@gluon.jit
def exact(slot, tokens, packed, slots, sinks):
    """Position of the token in an exact slot, and whether it is part of the row."""
    ring = slots - sinks
    newest = tokens - 1 - sinks
    behind = (newest - (slot - sinks) + ring) % ring
    position = gl.where(slot < sinks, slot, sinks + newest - behind)
    seen = gl.where(slot < sinks, slot < tokens, (position >= sinks + packed) & (newest >= 0))
    return position, seen & (slot < slots)


@gluon.jit
def put_exact(target, source, tile, tokens, packed, slots, sinks, D: gl.constexpr):
    """128 exact slots of a row and head, 0 where they are no part of the row."""
    layout: gl.constexpr = dense_rows(D)
    c = gl.arange(0, D, layout=gl.SliceLayout(0, layout))
    for i in gl.static_range(4):
        slot = tile * 128 + i * 32 + gl.arange(0, 32, layout=gl.SliceLayout(1, layout))
        _position, seen = exact(slot, tokens, packed, slots, sinks)
        x = gl.load(source + slot[:, None] * D + c[None, :], mask=seen[:, None], other=0.0)
        target.slice(i * 32, 32).store(x)


@gluon.jit
def put_new(target, source, stride, valid, tile, tokens, D: gl.constexpr):
    """128 new tokens of a row and head, 0 past the last and where they are not valid."""
    layout: gl.constexpr = dense_rows(D)
    c = gl.arange(0, D, layout=gl.SliceLayout(0, layout))
    for i in gl.static_range(4):
        token = tile * 128 + i * 32 + gl.arange(0, 32, layout=gl.SliceLayout(1, layout))
        inside = token < tokens
        if valid is not None:
            inside &= gl.load(valid + token, mask=inside, other=0) != 0
        at = source + token.to(gl.int64)[:, None] * stride + c[None, :]
        target.slice(i * 32, 32).store(gl.load(at, mask=inside[:, None], other=0.0))


# Positions of a tile's tokens: from there on queries see them. What is not there, none sees.
NEVER = gl.constexpr(2**31 - 1)
LINE = gl.constexpr(gl.BlockedLayout([1], [32], [WARPS.value], [0]))


@gluon.jit
def put_bounds_of_packed(target, tile, packed, sinks):
    """Of 128 packed tokens."""
    token = tile * 128 + gl.arange(0, 128, layout=LINE)
    target.store(gl.where(token < packed, sinks + token, NEVER))


@gluon.jit
def put_bounds_of_exact(target, tile, tokens, packed, slots, sinks):
    """Of 128 exact slots."""
    slot = tile * 128 + gl.arange(0, 128, layout=LINE)
    position, seen = exact(slot, tokens, packed, slots, sinks)
    target.store(gl.where(seen, position, NEVER))


@gluon.jit
def put_bounds_of_new(target, query_position, valid, tile, tokens):
    """Of 128 new tokens."""
    token = tile * 128 + gl.arange(0, 128, layout=LINE)
    inside = token < tokens
    if valid is not None:
        inside &= gl.load(valid + token, mask=inside, other=0) != 0
    position = gl.load(query_position + token, mask=inside, other=0).to(gl.int32)
    target.store(gl.where(inside, position, NEVER))
