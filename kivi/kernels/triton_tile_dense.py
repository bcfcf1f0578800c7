"""Device helpers of the extend kernel: tiles of dense tokens, dequantized from words.

The result is rounded once, to the dtype of the queries, as in `quantize.dequantize_pages`.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

from kivi.kernels.triton_tile_rows import saturated
from kivi.kernels.triton_tiles import _down_by, load_tile, padded, part_count, part_width


@triton.constexpr_function
def in_pairs(bits, dtype, fast):
    """Whether codes become numbers two at a time."""
    return fast and bits in (1, 2, 4, 8) and dtype.primitive_bitwidth == 16


@triton.constexpr_function
def below_mantissa(bits, dtype):
    """Planes of a word whose codes `value_asm` finds."""
    return max(1, (10 if dtype == tl.float16 else 7) // bits)


@triton.constexpr_function
def value_asm(bits, position, dtype, offset, centered=False, above=None):
    """PTX for the values of two words' codes at a bit position, from scales and zeros.

    Or, where offset is not 0, `(code - offset) * scale`; centered: plus what then takes the place
    of the zero. A code among the mantissa's bits, under the exponent with which bit 0 is worth 1,
    is the number `one + code * 2^position`, from which it comes exactly, less the offset where the
    dtype has the sum of both. 8 bits are one too many for bfloat16: a subnormal there, two factors
    away. 3 bits are two in one word and one in another ($4), which is `above` bits too low.
    """
    half = dtype == tl.float16
    kind, mantissa = ("f16x2", 10) if half else ("bf16x2", 7)
    mask = ((1 << (2 if bits == 3 else bits)) - 1 << position) * 65537

    def both(number):
        """A number that the dtype has, twice."""
        part, exponent = math.frexp(number)
        field = int((2 * abs(part) - 1) * 2**mantissa)
        field += exponent + 14 << 10 if half else exponent + 126 << 7
        return f"{(field + (32768 if number < 0 else 0)) * 65537:#x}"

    third = ""
    if bits == 3:
        move = f"shl.b32 u, $4, {above}" if above >= 0 else f"shr.u32 u, $4, {-above}"
        third = f"{move}; lop3.b32 t, u, {(4 << position) * 65537:#x}, t, 0xEA;"
    whole = bits > mantissa or offset * 2**position % 1 == 0
    taken = offset if whole else 0.0
    if bits > mantissa:
        code = (
            f"and.b32 t, $1, {mask:#x}; mov.b32 v, 0x80008000; mov.b32 u, {both(2.0**127)};"
            f"fma.rn.{kind} t, t, u, v; mov.b32 u, {both(2.0**6)};"
            f"mov.b32 v, {both(-taken) if taken else '0x80008000'}; fma.rn.{kind} t, t, u, v;"
        )
    else:
        one = 2.0**mantissa
        code = (
            f"lop3.b32 t, $1, {mask:#x}, {both(one)}, 0xEA; {third}"
            f"mov.b32 u, {both(2.0**-position)}; mov.b32 v, {both(-one * 2.0**-position - taken)};"
            f"fma.rn.{kind} t, t, u, v;"
        )
    if not whole:
        code += f"mov.b32 u, {both(1.0)}; mov.b32 v, {both(-offset)}; fma.rn.{kind} t, t, u, v;"
    zero = "$3" if offset == 0 or centered else "v"
    if zero == "v":
        code += "mov.b32 v, 0x80008000;"
    # Half a step above the largest number a sum can leave float16's range, as can unused codes.
    limit = "mov.b32 u, 0x7bff7bff; min.f16x2 t, t, u;" if half else ""
    if half and offset != 0:
        limit += "mov.b32 u, 0xfbfffbff; max.f16x2 t, t, u;"
    return f"{{ .reg .b32 t, u, v; {code} fma.rn.{kind} t, t, $2, {zero}; {limit} mov.b32 $0, t; }}"


@triton.jit
def _codes(words, token, D: tl.constexpr, WIDTH: tl.constexpr, FAST: tl.constexpr):
    """Words `[tokens, padded(D)]` with the codes of tokens at bit 0, others above."""
    HELD: tl.constexpr = 16 // WIDTH
    w = load_tile(words, token // 32 // HELD * 32 + token % 32, D, D)
    return _down_by(w, (token // 32 % HELD * WIDTH)[:, None], FAST)


@triton.jit
def _beside(
    ptr,
    plane,
    last,
    CHANNEL: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    PLANES: tl.constexpr,
):
    """What stands beside the tokens of a tile, `[32 * PLANES, padded(D)]`; each loaded once."""
    TOKENS: tl.constexpr = 32 * PLANES
    if CHANNEL:
        SAME: tl.constexpr = min(G, 32)  # tokens that surely share a row
        i = tl.arange(0, TOKENS // SAME) * SAME
        i = tl.minimum(plane + i // 32, last) * 32 + i % 32
        x = load_tile(ptr, i // G, D, D)
        x = tl.broadcast_to(x[:, None, :], (TOKENS // SAME, SAME, padded(D)))
    else:
        N: tl.constexpr = padded(D) // padded(G)
        t = tl.arange(0, TOKENS)
        token = tl.minimum(plane + t // 32, last) * 32 + t % 32
        x = tl.load(ptr + token[:, None] * N + tl.arange(0, N)[None, :])
        x = tl.broadcast_to(x[:, :, None], (TOKENS, N, padded(G)))
    return tl.reshape(x, (TOKENS, padded(D)))


@triton.jit
def _beside_any(ptr, token, G: tl.constexpr, D: tl.constexpr):
    """`_beside` tokens in groups of any number of channels."""
    column = tl.arange(0, padded(D))
    at = ptr + token[:, None] * (D // G) + (column // G)[None, :]
    return tl.load(at, mask=column[None, :] < D, other=0)


@triton.jit
def plus_centers(
    x,
    centers,  # of a page and head: [512 / C, D]
    plane,
    last,
    D: tl.constexpr,
    C: tl.constexpr,
    PLANES: tl.constexpr,
    WIDE: tl.constexpr,
):
    """A dense tile with what was taken off its tokens."""
    center = _beside(centers, plane, last, True, C, D, PLANES).to(tl.float32)
    return saturated(x.to(tl.float32) + center, x.dtype, WIDE)


@triton.constexpr_function
def _even(channel, group, size):
    """Whether groups of channels are all of one power of 2."""
    return channel or (size == padded(size) and group == padded(group))


@triton.jit
def dense_tile(
    words,  # of a page and head: [BITS, 32, D], or [512, D] where BITS is 0
    scale,  # of a page and head
    zero,  # likewise, or None
    plane,  # the first one wanted, in the page
    last,  # planes beyond it repeat it
    D: tl.constexpr,
    BITS: tl.constexpr,
    CHANNEL: tl.constexpr,
    G: tl.constexpr,
    OFFSET: tl.constexpr,
    PLANES: tl.constexpr,
    DTYPE: tl.constexpr,
    FAST: tl.constexpr,
    WIDE: tl.constexpr,
):
    """The tokens of PLANES planes, `[32 * PLANES, padded(D)]`."""
    t = tl.arange(0, 32 * PLANES)
    token = tl.minimum(plane + t // 32, last) * 32 + t % 32
    if BITS == 0:
        x = load_tile(words, token, D, D)
    else:
        if _even(CHANNEL, G, D):
            s = _beside(scale, plane, last, CHANNEL, G, D, PLANES)
        else:
            s = _beside_any(scale, token, G, D)
        z = s  # not used where there are none
        if zero is not None:
            if _even(CHANNEL, G, D):
                z = _beside(zero, plane, last, CHANNEL, G, D, PLANES)
            else:
                z = _beside_any(zero, token, G, D)
        if in_pairs(BITS, DTYPE, FAST):
            x = tl.inline_asm_elementwise(
                value_asm(BITS, 0, DTYPE, OFFSET if zero is None else 0.0),
                "=r,r,r,r",
                [_codes(words, token, D, BITS, FAST), s, z],
                dtype=s.dtype,
                is_pure=True,
                pack=2,
            )
        else:
            code = tl.zeros((32 * PLANES, padded(D)), tl.int32)
            for part in tl.static_range(part_count(BITS)):
                w = _codes(words + part * (64 * D), token, D, part_width(BITS, part), FAST)
                code += (w.to(tl.int32) & (2 ** part_width(BITS, part) - 1)) * (4**part)
            z = s.to(tl.float32) * -OFFSET if zero is None else z.to(tl.float32)
            x = saturated(tl.fma(code.to(tl.float32), s.to(tl.float32), z), DTYPE, WIDE)
    return x
