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


# Not by the compiler's loads and stores, on a GPU of NVIDIA's: see triton_token_memory.py.
@triton.jit
def insert_four(pointers, words, plane, WIDTH: tl.constexpr, PLANES: tl.constexpr):
    """`insert_pairs` of a tuple of four neighbours; pointers to the first, aligned to 16 bytes."""
    at = pointers.to(tl.int64)
    a, b, c, d = words[0], words[1], words[2], words[3]
    if PLANES * WIDTH < 16:
        keep = ~(plane_weight(plane, WIDTH) * (2 ** (PLANES * WIDTH) - 1) * 65537)
        asm: tl.constexpr = """{ .reg .b32 a, b, c, d; ld.global.v4.b32 {a, b, c, d}, [$1];
            and.b32 a, a, $6; and.b32 b, b, $6; and.b32 c, c, $6; and.b32 d, d, $6;
            or.b32 a, a, $2; or.b32 b, b, $3; or.b32 c, c, $4; or.b32 d, d, $5;
            st.global.v4.b32 [$1], {a, b, c, d}; mov.b32 $0, 0; }"""
        arguments = [at, a, b, c, d, keep]
        tl.inline_asm_elementwise(asm, "=r,l,r,r,r,r,r", arguments, tl.int32, False, 1)
    else:
        whole: tl.constexpr = "st.global.v4.b32 [$1], {$2, $3, $4, $5}; mov.b32 $0, 0;"
        tl.inline_asm_elementwise(whole, "=r,l,r,r,r,r", [at, a, b, c, d], tl.int32, False, 1)


@triton.jit
def insert_byte(pointers, bits, plane, PLANES: tl.constexpr):
    """`insert` of planes of 1 bit into bytes."""
    at = pointers.to(tl.int64)
    if PLANES < 8:
        keep = ~(plane_weight(plane, 1) * (2**PLANES - 1))
        asm: tl.constexpr = """{ .reg .b32 t; ld.global.u8 t, [$1]; and.b32 t, t, $3;
            or.b32 t, t, $2; st.global.u8 [$1], t; mov.b32 $0, 0; }"""
        tl.inline_asm_elementwise(asm, "=r,l,r,r", [at, bits, keep], tl.int32, False, 1)
    else:
        whole: tl.constexpr = "st.global.u8 [$1], $2; mov.b32 $0, 0;"
        tl.inline_asm_elementwise(whole, "=r,l,r", [at, bits], tl.int32, False, 1)


@triton.jit
def insert_thirds(pointers, words, mask, plane, PLANES: tl.constexpr):
    """Store the third bits of codes of 3 bits: bits 16 to 23 of `words`, a half of a word."""
    insert(pointers, (words >> 16) & 255, mask, plane, 1, PLANES)


@triton.jit
def insert_pairs(pointers, words, plane, WIDTH: tl.constexpr, PLANES: tl.constexpr):
    """`insert` of words two by two."""
    if PLANES * WIDTH < 16:
        planes = plane_weight(plane, WIDTH) * (2 ** (PLANES * WIDTH) - 1)
        words = words | (tl.load(pointers) & ~(planes * 65537))
    tl.store(pointers, words)


@triton.jit
def join_bytes(a, b, c, d):
    """Four numbers below 256 as the bytes of an int32.

    They come as float32, plus ROUND, the third plus ROUND + 192 and the fourth plus ROUND + 116:
    what is left of these in the sum is 0.
    """
    a, b = a.to(tl.int32, bitcast=True), b.to(tl.int32, bitcast=True)
    c, d = c.to(tl.int32, bitcast=True), d.to(tl.int32, bitcast=True)
    return a + b * 256 + c * 65536 + d * 16777216


@triton.jit
def join_signs(a, b, c, d, FAST: tl.constexpr):
    """Bytes of an int32, 255 for each of four float32 that is negative."""
    a, b = a.to(tl.int32, bitcast=True), b.to(tl.int32, bitcast=True)
    c, d = c.to(tl.int32, bitcast=True), d.to(tl.int32, bitcast=True)
    if FAST:
        asm: tl.constexpr = """{ .reg .b32 t, u;
            prmt.b32 t, $1, $2, 0x00fb; prmt.b32 u, $3, $4, 0xfb00; prmt.b32 $0, t, u, 0x7610; }"""
        signs = tl.inline_asm_elementwise(asm, "=r,r,r,r,r", [a, b, c, d], tl.int32, True, 1)
    else:
        signs = ((a >> 31) & 255) | ((b >> 31) & 65280) | ((c >> 31) & 16711680)
        signs |= (d >> 31) & -16777216
    return signs


@triton.jit
def bytes_over(x, least):
    """Bytes 128 where a byte of x, up to 128, is more than `least`, up to 127, else 0."""
    return (x + (127 - least) * 16843009) & -2139062144


@triton.jit
def ones_of_bytes(x):
    """Bytes 1 of bytes 128."""
    return (x.to(tl.uint32, bitcast=True) >> 7).to(tl.int32, bitcast=True)


@triton.jit
def quotient(a, b, FAST: tl.constexpr):
    """`a / b`, rounded as IEEE 754 wants it; both 0 or between 2^-60 and 2^60, b not 0."""
    if FAST:  # what the compiler makes of a division, without a branch for other numbers
        asm: tl.constexpr = """{ .reg .f32 n, r, e, q; neg.f32 n, $2; rcp.approx.ftz.f32 r, $2;
            fma.rn.f32 e, n, r, 0f3f800000; fma.rn.f32 r, r, e, r; mul.rn.f32 q, $1, r;
            fma.rn.f32 e, n, q, $1; fma.rn.f32 $0, r, e, q; }"""
        out = tl.inline_asm_elementwise(asm, "=f,f,f", [a, b], tl.float32, True, 1)
    else:
        out = tl.math.div_rn(a, b)
    return out


@triton.jit
def root(x, FAST: tl.constexpr):
    """`sqrt(x)`, rounded as IEEE 754 wants it; x is 0 or between 2^-60 and 2^60."""
    if FAST:
        asm: tl.constexpr = """{ .reg .f32 x, r, s, h, e; max.f32 x, $1, 0f0d800000;
            rsqrt.approx.ftz.f32 r, x; mul.rn.f32 s, $1, r; mul.rn.f32 h, r, 0f3f000000;
            neg.f32 e, s; fma.rn.f32 e, e, s, $1; fma.rn.f32 $0, e, h, s; }"""
        out = tl.inline_asm_elementwise(asm, "=f,f", [x], tl.float32, True, 1)
    else:
        out = tl.math.sqrt_rn(x)
    return out


@triton.jit
def dot_bytes(x, y, total, FAST: tl.constexpr):
    """`total` plus the products of unsigned bytes."""
    if FAST:
        asm: tl.constexpr = "dp4a.u32.u32 $0, $1, $2, $3;"
        total = tl.inline_asm_elementwise(asm, "=r,r,r,r", [x, y, total], tl.int32, True, 1)
    else:
        for k in tl.static_range(4):
            total += ((x >> (8 * k)) & 255) * ((y >> (8 * k)) & 255)
    return total


@triton.jit
def byte_of(x, k: tl.constexpr):
    """The k-th byte."""
    return (x >> (8 * k)) & 255


@triton.jit
def pair_of_bytes(low, high, k: tl.constexpr, FAST: tl.constexpr):
    """The k-th and the next word of four, whose low and high halves are such bytes."""
    if FAST:
        asm: tl.constexpr = "prmt.b32 $0, $1, $2, 0x7362;" if k else "prmt.b32 $0, $1, $2, 0x5140;"
        words = tl.inline_asm_elementwise(asm, "=r,r,r", [low, high], tl.int32, True, 1)
    else:
        words = byte_of(low, k) | (byte_of(high, k) << 8)
        words |= (byte_of(low, k + 1) << 16) | (byte_of(high, k + 1) << 24)
    return words


@triton.jit
def split_thirds(codes):
    """Codes of 3 bits in bytes as their low two bits and their third."""
    return codes & 50529027, (codes >> 2) & 16843009


@triton.jit
def unpack_vector(x, LANES: tl.constexpr, VECTOR: tl.constexpr):
    """Elements [tokens, LANES * VECTOR] as VECTOR tensors [tokens, LANES] in float32."""
    if x.dtype == tl.bfloat16:
        bits = x.to(tl.int16, bitcast=True).to(tl.int32) << 16
    else:
        bits = x.to(tl.float32).to(tl.int32, bitcast=True)
    bits = tl.reshape(bits, [x.shape[0], LANES, VECTOR])
    place = tl.arange(0, VECTOR)[None, None, :]
    out = ()
    for k in tl.static_range(VECTOR):
        # A thread has them all, so that nothing is left of this but the choice of a register.
        one = tl.sum(tl.where(place == k, bits, 0), 2)
        out = out + (one.to(tl.float32, bitcast=True),)
    return out


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
def join_halves(low, high):
    """The upper halves of int32 as a pair."""
    return ((low >> 16) & 65535) | (high & -65536)


@triton.jit
def unpair(pairs):
    """All elements, float32."""
    x = tl.join(low_half(pairs), high_half(pairs))
    if len(pairs.shape) == 3:
        x = tl.reshape(x, [x.shape[0], x.shape[1], x.shape[2] * 2])
    else:
        x = tl.reshape(x, [x.shape[0], x.shape[1], x.shape[2], x.shape[3] * 2])
    return x
