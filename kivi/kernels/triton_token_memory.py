"""Tokens as in triton_token.py into registers, and what else goes past the compiler's loads.

Triton's compiler looks for each of its loads and stores at all that it has to do with. In a kernel
of thousands of operations that takes a second for each of them, so there are few: on a GPU of
NVIDIA's the others are assembly. Their layout is that of their pointers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kivi.kernels.triton_tile_pack import high_half, low_half, unpack_vector


@triton.jit
def prefetch(source, X_TOKEN: tl.constexpr, D: tl.constexpr, TOKENS: tl.constexpr):
    """Have tokens read into the L2 cache of a GPU of NVIDIA's."""
    LINE: tl.constexpr = 1024 // source.dtype.element_ty.primitive_bitwidth
    LINES: tl.constexpr = triton.next_power_of_2(triton.cdiv(D, LINE))
    i = tl.arange(0, TOKENS * LINES)
    at = source + i // LINES * X_TOKEN + tl.minimum(i % LINES * LINE, D - 1)
    asm: tl.constexpr = "prefetch.global.L2 [$1]; mov.b32 $0, 0;"
    tl.inline_asm_elementwise(asm, "=r,l", [at.to(tl.int64)], tl.int32, False, 1)


@triton.jit
def store(pointers, x):
    """Store elements of 16 bits, which stay in their layout, on a GPU of NVIDIA's."""
    asm: tl.constexpr = """{ .reg .b16 x; cvt.u16.u32 x, $2; st.global.b16 [$1], x;
        mov.b32 $0, 0; }"""
    bits = x.to(tl.int16, bitcast=True).to(tl.int32)
    tl.inline_asm_elementwise(asm, "=r,l,r", [pointers.to(tl.int64), bits], tl.int32, False, 1)


@triton.jit
def four(source, OFFSET: tl.constexpr):
    """The four int32 at pointers aligned to 16 bytes."""
    asm: tl.constexpr = "ld.global.v4.b32 {$0, $1, $2, $3}, [$4];"
    types: tl.constexpr = (tl.int32, tl.int32, tl.int32, tl.int32)
    at = source.to(tl.int64) + OFFSET
    return tl.inline_asm_elementwise(asm, "=r,=r,=r,=r,l", [at], types, False, 1)


@triton.jit
def _halves(pair, dtype: tl.constexpr):
    """A pair's elements, float32."""
    if dtype == tl.bfloat16:
        low, high = low_half(pair), high_half(pair)
    else:
        asm: tl.constexpr = """{ .reg .b16 a, b; mov.b32 {a, b}, $2; cvt.f32.f16 $0, a;
            cvt.f32.f16 $1, b; }"""
        types: tl.constexpr = (tl.float32, tl.float32)
        low, high = tl.inline_asm_elementwise(asm, "=f,=f,r", [pair], types, True, 1)
    return low, high


@triton.jit
def load(
    source, LANES: tl.constexpr, VECTOR: tl.constexpr, PIECES: tl.constexpr, FAST: tl.constexpr
):
    """Tokens in registers, of pointers [tokens, 1] to their first channels."""
    SIZE: tl.constexpr = source.dtype.element_ty.primitive_bitwidth // 8
    out = ()
    if FAST and VECTOR * SIZE % 16 == 0:
        at = source + tl.arange(0, LANES)[None, :] * VECTOR
        for piece in tl.static_range(PIECES):
            for part in tl.static_range(VECTOR * SIZE // 16):
                words = four(at, (piece * LANES * VECTOR) * SIZE + 16 * part)
                for k in tl.static_range(4):
                    if SIZE == 4:
                        out = out + (words[k].to(tl.float32, bitcast=True),)
                    else:
                        out = out + _halves(words[k], source.dtype.element_ty)
    else:
        i = tl.arange(0, LANES * VECTOR)[None, :]
        # Tells the compiler how many neighbours to give a thread.
        i = i // VECTOR * VECTOR + i % VECTOR
        for piece in tl.static_range(PIECES):
            x = tl.load(source + piece * (LANES * VECTOR) + i)
            out = out + unpack_vector(x, LANES, VECTOR)
    return out


@triton.jit
def load_pairs(source, LANES: tl.constexpr, VECTOR: tl.constexpr, PIECES: tl.constexpr):
    """`load` of bfloat16 tokens, as pairs; on a GPU of NVIDIA's."""
    at = source + tl.arange(0, LANES)[None, :] * VECTOR
    out = ()
    for piece in tl.static_range(PIECES):
        out = out + four(at, piece * (LANES * VECTOR * 2))
    return out
