"""Device helpers of the extend kernel: tiles of dense tokens, dequantized from words.

The result is rounded once, to the dtype of the queries, as in `quantize.dequantize_pages`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kivi.kernels.triton_tile_rows import saturated
from kivi.kernels.triton_tiles import _down, _down_by, load_tile, padded, part_count, part_width


@triton.constexpr_function
def in_pairs(bits, channel, group, size, dtype, fast):
    """Whether codes become numbers two at a time (`_values`), which takes the common formats."""
    powers = size == padded(size) and (channel or group & (group - 1) == 0)
    return fast and bits in (1, 2, 4, 8) and powers and dtype.primitive_bitwidth == 16


@triton.constexpr_function
def _below_mantissa(bits, dtype):
    """Planes whose codes lie among the bits of a mantissa (for 8 bits in bfloat16: nearly)."""
    return max(1, (10 if dtype == tl.float16 else 7) // bits)


@triton.constexpr_function
def _values_asm(bits, position, dtype):
    """PTX for `code * scale + zero` of two words whose codes are at a position.

    A code among the mantissa's bits, under the exponent with which bit 0 is worth 1, is the number
    `one + code * 2^position`, from which it comes exactly. 8 bits are one too many for bfloat16: a
    subnormal there, two factors away from the code.
    """
    half = dtype == tl.float16
    kind, mantissa = ("f16x2", 10) if half else ("bf16x2", 7)
    mask = ((1 << bits) - 1 << position) * 65537

    def both(exponent, sign=0):
        field = exponent + 15 << 10 if half else exponent + 127 << 7
        return f"{(field + (sign << 15)) * 65537:#x}"

    if bits > mantissa:
        code = (
            f"and.b32 t, $1, {mask:#x}; mov.b32 u, 0x80008000; mov.b32 v, {both(127)};"
            f"fma.rn.{kind} t, t, v, u; mov.b32 v, {both(6)}; fma.rn.{kind} t, t, v, u;"
        )
    else:
        code = (
            f"lop3.b32 t, $1, {mask:#x}, {both(mantissa)}, 0xEA; mov.b32 u, {both(-position)};"
            f"mov.b32 v, {both(mantissa - position, 1)}; fma.rn.{kind} t, t, u, v;"
        )
    # Half a step above the largest number a sum can leave float16's range.
    limit = "mov.b32 u, 0x7bff7bff; min.f16x2 $0, $0, u;" if half else ""
    return f"{{ .reg .b32 t, u, v; {code} fma.rn.{kind} $0, t, $2, $3; {limit} }}"


@triton.jit
def _values(words, scale, zero, PLANE: tl.constexpr, BITS: tl.constexpr, DTYPE: tl.constexpr):
    """A plane's codes times scale plus zero."""
    DIRECT: tl.constexpr = _below_mantissa(BITS, DTYPE)
    if PLANE >= DIRECT:
        words = _down(words, PLANE // DIRECT * DIRECT * BITS, True)
    return tl.inline_asm_elementwise(
        _values_asm(BITS, PLANE % DIRECT * BITS, DTYPE),
        "=r,r,r,r",
        [words, scale, zero],
        dtype=scale.dtype,
        is_pure=True,
        pack=2,
    )


@triton.jit
def _below(x, N: tl.constexpr):
    """N tiles `[rows, columns]`, one below the other."""
    if N == 1:
        y = x[0]
    elif N == 2:
        y = tl.permute(tl.join(x[0], x[1]), (2, 0, 1))
        y = tl.reshape(y, (2 * x[0].shape[0], x[0].shape[1]))
    else:
        first = tl.join(x[0], x[1])
        y = tl.permute(tl.join(first, tl.join(x[2], x[3])), (3, 2, 0, 1))
        y = tl.reshape(y, (4 * x[0].shape[0], x[0].shape[1]))
    return y


@triton.jit
def _beside(ptr, token, CHANNEL: tl.constexpr, G: tl.constexpr, D: tl.constexpr):
    """What stands beside tokens `[rows]`: broadcasts to `[rows, padded(D)]`."""
    if CHANNEL:
        x = load_tile(ptr, token // G, D, D)
    else:
        column = tl.arange(0, padded(D))
        at = ptr + token[:, None] * (D // G) + (column // G)[None, :]
        x = tl.load(at, mask=column[None, :] < D, other=0)
    return x


@triton.jit
def _beside_plane(ptr, plane, CHANNEL: tl.constexpr, G: tl.constexpr, D: tl.constexpr):
    """`_beside` the 32 tokens of a plane, with fewer loads; sizes are powers of 2."""
    row = tl.arange(0, 32)
    if CHANNEL and G >= 32:
        x = tl.load(ptr + (plane * 32 // G) * D + tl.arange(0, D))
        x = tl.broadcast_to(x[None, :], (32, D))
    elif CHANNEL:
        x = _beside(ptr, plane * 32 + row, CHANNEL, G, D)
    else:
        at = ptr + (plane * 32 + row)[:, None] * (D // G) + tl.arange(0, D // G)[None, :]
        x = tl.broadcast_to(tl.load(at)[:, :, None], (32, D // G, G))
        x = tl.reshape(x, (32, D))
    return x


@triton.jit
def _dense_pairs(
    words,
    scale,
    zero,
    plane,
    last,
    D: tl.constexpr,
    BITS: tl.constexpr,
    CHANNEL: tl.constexpr,
    G: tl.constexpr,
    OFFSET: tl.constexpr,
    PLANES: tl.constexpr,
    DTYPE: tl.constexpr,
):
    HELD: tl.constexpr = 16 // BITS
    IN_TILE: tl.constexpr = min(PLANES, HELD)
    out = ()
    for tile in tl.static_range(PLANES // IN_TILE):
        first = plane + tile * IN_TILE
        w = load_tile(words, first // HELD * 32 + tl.arange(0, 32), D, D)
        if IN_TILE < HELD:
            w = _down_by(w, first % HELD * BITS, True)
        for i in tl.static_range(IN_TILE):
            at = tl.minimum(first + i, last)
            s = _beside_plane(scale, at, CHANNEL, G, D)
            if zero is None:
                z = (s.to(tl.float32) * -OFFSET).to(DTYPE)
            else:
                z = _beside_plane(zero, at, CHANNEL, G, D)
            out += (_values(w, s, z, i, BITS, DTYPE),)
    return _below(out, PLANES)


@triton.jit
def dense_tile(
    words,  # of a page and head: [BITS, 32, D], or [512, D] where BITS is 0
    scale,  # of a page and head
    zero,  # likewise, or None
    plane,  # the first one wanted, in the page
    last,  # planes beyond it mean nothing; their scales are not read
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
    """The tokens of PLANES planes, `[32 * PLANES, padded(D)]`; planes beyond the last: finite."""
    if in_pairs(BITS, CHANNEL, G, D, DTYPE, FAST):
        x = _dense_pairs(
            words, scale, zero, plane, last, D, BITS, CHANNEL, G, OFFSET, PLANES, DTYPE
        )
    else:
        t = tl.arange(0, 32 * PLANES)
        token = tl.minimum(plane + t // 32, last) * 32 + t % 32
        if BITS == 0:
            x = load_tile(words, token, D, D)
        else:
            code = tl.zeros((32 * PLANES, padded(D)), tl.int32)
            for part in tl.static_range(part_count(BITS)):
                WIDTH: tl.constexpr = part_width(BITS, part)
                HELD: tl.constexpr = 16 // WIDTH
                row = part * 64 + token // 32 // HELD * 32 + t % 32
                w = load_tile(words, row, D, D).to(tl.int32)
                shift = token // 32 % HELD * WIDTH
                code += ((w >> shift[:, None]) & (2**WIDTH - 1)) << (2 * part)
            s = _beside(scale, token, CHANNEL, G, D).to(tl.float32)
            if zero is None:
                z = s * -OFFSET
            else:
                z = _beside(zero, token, CHANNEL, G, D).to(tl.float32)
            x = saturated(tl.fma(code.to(tl.float32), s, z), DTYPE, WIDE)
    return x
