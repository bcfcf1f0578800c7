"""Device helpers of the attention kernel: tiles of words and what stands beside them.

A code masked inside a 16-bit word at bit k, read as a float of that width, is the denormal `code *
2^k * unit`, exactly, if all its bits are among the dtype's *linear* low bits; tensor cores take
denormals. So a plane costs one AND for two elements, the planes above the linear bits (those below
are *direct*) share one shift of the word, and `2^k * unit` goes into factors around the dot.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.constexpr_function
def part_count(bits):
    """How many parts a code is stored in (`packing.widths`)."""
    return (bits > 0) + (bits == 3)


@triton.constexpr_function
def part_width(bits, part):
    """Bits of a part: 3 bits are 2 + 1."""
    return 2 - part if bits == 3 else bits


@triton.constexpr_function
def linear_bits(dtype, denormal):
    """Bits of a word that can be read as a denormal; 0: codes are converted.

    The mantissa and the lowest exponent bit: there a float is its bit pattern times a unit.
    """
    if not denormal or dtype == tl.float32:
        return 0
    return 11 if dtype == tl.float16 else 8


@triton.constexpr_function
def unit_power(dtype, linear):
    """-log2 of that unit; 0 where codes are converted."""
    if not linear:
        return 0
    return 24 if dtype == tl.float16 else 133


@triton.constexpr_function
def direct_planes(width, linear):
    """Planes that are read from the word as it is; the others from the shifted word."""
    return linear // width if linear else 16 // width


@triton.constexpr_function
def code_power(bits, part, plane, linear, dtype):
    """e, where `codes` returns `code * 2^e`."""
    if bits == 0 or not linear:
        return 0
    width = 2 - part if bits == 3 else bits
    return plane % (linear // width) * width - (24 if dtype == tl.float16 else 133)


@triton.constexpr_function
def weight_power(bits, part, plane, linear, dtype):
    """e, where `2^e` brings what multiplies these codes to the unit of bit 0 of a whole code."""
    if not linear:
        return 2 * part
    width = 2 - part if bits == 3 else bits
    return 2 * part - plane % (linear // width) * width


@triton.constexpr_function
def power(exponent):
    """A power of two as a float."""
    return 2.0**exponent


@triton.constexpr_function
def padded(size):
    """A number of channels as the power of two that a tile has."""
    return max(16, triton.next_power_of_2(size))


@triton.jit
def load_tile(ptr, rows, STRIDE: tl.constexpr, G: tl.constexpr):
    """`[rows, padded(G)]`, 0 beyond the first G columns."""
    PADDED: tl.constexpr = padded(G)
    column = tl.arange(0, PADDED)
    at = ptr + rows[:, None] * STRIDE + column[None, :]
    return tl.load(at) if PADDED == G else tl.load(at, mask=column[None, :] < G, other=0)


@triton.jit
def load_seen(ptr, rows, seen, STRIDE: tl.constexpr, G: tl.constexpr):
    """`load_tile`, 0 in rows that are not seen, whatever is there."""
    column = tl.arange(0, padded(G))
    mask = seen[:, None] & (column[None, :] < G)
    return tl.load(ptr + rows[:, None] * STRIDE + column[None, :], mask=mask, other=0)


@triton.jit
def load_row(ptr, G: tl.constexpr):
    """`[padded(G)]`, 0 beyond G."""
    PADDED: tl.constexpr = padded(G)
    at = ptr + tl.arange(0, PADDED)
    return tl.load(at) if PADDED == G else tl.load(at, mask=tl.arange(0, PADDED) < G, other=0)


@triton.jit
def load_groups(ptr, rows, NG: tl.constexpr):
    """The NG 16-bit floats that stand beside each row, as NG vectors.

    As wide integers: an element a row and group would be a load each.
    """
    out = ()
    if NG == 2 or NG % 4 == 0:
        PER: tl.constexpr = 4 if NG % 4 == 0 else 2
        WIDE: tl.constexpr = tl.int64 if PER == 4 else tl.int32
        wide = ptr.to(tl.pointer_type(WIDE))
        for j in tl.static_range(NG // PER):
            x = tl.load(wide + rows * (NG // PER) + j)
            for k in tl.static_range(PER):
                out += ((x >> (16 * k)).to(tl.int16).to(ptr.dtype.element_ty, bitcast=True),)
    else:
        for j in tl.static_range(NG):
            out += (tl.load(ptr + rows * NG + j),)
    return out


@triton.jit
def _down(words, BITS: tl.constexpr, FAST: tl.constexpr):
    """Words shifted down; what comes in at the top means nothing."""
    if FAST:
        x = tl.inline_asm_elementwise(
            f"shr.u32 $0, $1, {BITS};", "=r,r", [words], dtype=tl.int16, is_pure=True, pack=2
        )
    else:
        x = words >> BITS
    return x


@triton.jit
def _down_by(words, bits, FAST: tl.constexpr):
    """Words shifted down by a number that is not known before."""
    if FAST:
        x = tl.inline_asm_elementwise(
            "{ .reg .b32 n; and.b32 n, $2, 15; shr.u32 $0, $1, n; }",
            "=r,r,r",
            [words, bits.to(tl.int16)],
            dtype=tl.int16,
            is_pure=True,
            pack=2,
        )
    else:
        x = words >> bits.to(tl.int16)
    return x


@triton.jit
def _load_part(
    words,
    plane,
    row,
    WIDTH: tl.constexpr,
    D: tl.constexpr,
    G: tl.constexpr,
    PLANES: tl.constexpr,
    LINEAR: tl.constexpr,
    FAST: tl.constexpr,
):
    HELD: tl.constexpr = 16 // WIDTH
    DIRECT: tl.constexpr = direct_planes(WIDTH, LINEAR)
    x = load_tile(words, plane // HELD * 32 + row, D, G)
    if PLANES < HELD:
        x = _down_by(x, plane % HELD * WIDTH, FAST)
    high = x
    if DIRECT < PLANES:
        high = _down(x, DIRECT * WIDTH, FAST)
    return x, high


@triton.jit
def load_words(
    words,  # of a page and head: [BITS, 32, D]
    plane,  # the first plane wanted, in the page
    row,  # rows of a tile
    N: tl.constexpr,  # groups of channels
    G: tl.constexpr,
    BITS: tl.constexpr,
    PLANES: tl.constexpr,
    LINEAR: tl.constexpr,
    FAST: tl.constexpr,
):
    """For each group and part: words whose plane 0 is at bit 0, and these less direct planes."""
    out = ()
    for g in tl.static_range(N if BITS > 0 else 0):
        of_group = ()
        for part in tl.static_range(part_count(BITS)):
            at = words + part * (64 * N * G) + g * G
            of_group += _load_part(
                at, plane, row, part_width(BITS, part), N * G, G, PLANES, LINEAR, FAST
            )
        out += (of_group,)
    return out


@triton.jit
def channel_rows(
    ptr,  # of a page and head: [512 / SIZE, D]
    plane,
    last,  # planes beyond it read this one
    first,  # token of a plane
    SIZE: tl.constexpr,  # tokens of a group
    SHARE: tl.constexpr,  # planes of a group
    PLANES: tl.constexpr,
    D: tl.constexpr,
):
    """The row of channels of each group in a chunk."""
    out = ()
    for i in tl.static_range(0, PLANES, SHARE):
        group = ((plane + tl.minimum(i, last)) * 32 + first) // SIZE
        out += (load_row(ptr + group * D, D),)
    return out


@triton.jit
def token_rows(
    ptr,  # of a page and head: [512, N]
    plane,
    last,
    row,  # tokens of a plane
    N: tl.constexpr,
    PLANES: tl.constexpr,
):
    """For each plane of a chunk, the N vectors of its tokens."""
    out = ()
    for i in tl.static_range(PLANES):
        out += (load_groups(ptr, (plane + tl.minimum(i, last)) * 32 + row, N),)
    return out


@triton.jit
def token_zeros(
    ptr, plane, last, row, N: tl.constexpr, PLANES: tl.constexpr, AS_ROWS: tl.constexpr
):
    """For each plane of a chunk, `[padded(N), tokens]`: the N and, to fill up, the same again.

    AS_ROWS: `token_rows`.
    """
    if AS_ROWS:
        out = token_rows(ptr, plane, last, row, N, PLANES)
    else:
        group = tl.arange(0, padded(N)) % N
        out = ()
        for i in tl.static_range(PLANES):
            token = (plane + tl.minimum(i, last)) * 32 + row
            out += (tl.load(ptr + token[None, :] * N + group[:, None]),)
    return out


@triton.jit
def largest(ptr, plane, last, first, STEP: tl.constexpr, N: tl.constexpr, PLANES: tl.constexpr):
    """The largest of what stands beside STEP tokens of each plane of a chunk, float32."""
    i = tl.minimum(tl.arange(0, PLANES), last) + plane
    return tl.max(load_tile(ptr, i * 32 + first, N, STEP * N)).to(tl.float32)


@triton.jit
def codes(
    words,  # of a group: `load_words`
    PLANE: tl.constexpr,
    BITS: tl.constexpr,
    PART: tl.constexpr,
    LINEAR: tl.constexpr,
    FAST: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """A part of a plane's codes, times `2^code_power`."""
    WIDTH: tl.constexpr = part_width(BITS, PART)
    DIRECT: tl.constexpr = direct_planes(WIDTH, LINEAR)
    MASK: tl.constexpr = (2**WIDTH - 1) * 2 ** (PLANE % DIRECT * WIDTH)
    w = words[2 * PART + PLANE // DIRECT]
    if LINEAR == 0:
        x = ((w >> (PLANE * WIDTH)) & (2**WIDTH - 1)).to(tl.float32).to(DTYPE)
    elif FAST:
        # Two at a time: Triton's own arithmetic would take 16-bit integers one by one.
        TWICE: tl.constexpr = MASK * 65537
        w = tl.inline_asm_elementwise(
            f"and.b32 $0, $1, {TWICE};", "=r,r", [w], dtype=tl.int16, is_pure=True, pack=2
        )
        x = w.to(DTYPE, bitcast=True)
    else:
        x = (w & MASK).to(DTYPE, bitcast=True)
    return x
