"""grids.py for whole tokens in registers: codes and scales of a group, operation by operation.

A group is a tuple of tensors as in triton_token.py; codes come as bytes of int32 tensors, four
neighbouring channels in each. What takes no part in a group is NaN.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kivi.grids import FEW as FEW_PARTS
from kivi.grids import FIXED as MANY_PARTS
from kivi.grids import REFITS
from kivi.kernels.triton_grids import ROUND, encode, multiply, round_to, store_scale
from kivi.kernels.triton_tile_pack import (
    bytes_over,
    dot_bytes,
    join_bytes,
    join_signs,
    ones_of_bytes,
    quotient,
    root,
)
from kivi.kernels.triton_token import largest, plus_scaled, range_of, total

FEW = tl.constexpr(FEW_PARTS)
FIXED = tl.constexpr(MANY_PARTS)


@triton.constexpr_function
def refits(bits):
    """How often the step of few levels is fitted again."""
    return REFITS[bits]


@triton.jit
def _parts(peak, MOST: tl.constexpr):
    """What a part is worth, and how many there are in 1: `grids.fixed_point`."""
    power = (peak.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    part = tl.maximum(power, 2.0**-117) * (2.0 / MOST)
    return part, (0x7F000000 - part.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)


@triton.jit
def _finite(xs):
    """Elements with a zero of its sign for what is not finite; how many are; their largest."""
    out, count, peak = (), tl.zeros(xs[0].shape, tl.int32), tl.zeros(xs[0].shape, tl.float32)
    for k in tl.static_range(len(xs)):
        finite = xs[k] * 0.0 == 0.0
        nothing = tl.where(xs[k] > 0, 0, -2147483648).to(tl.float32, bitcast=True)
        out = out + (tl.where(finite, xs[k], nothing),)
        count += finite.to(tl.int32)
        peak = tl.maximum(peak, tl.where(finite, tl.abs(xs[k]), 0.0))
    return out, total(count), tl.max(peak, 1, keep_dims=True)


@triton.jit
def few_levels(
    xs,
    CHECKED: tl.constexpr,
    FORMAT: tl.constexpr,  # see quantize_group
):
    """`grids.unbiased` of up to 3 bits: whole numbers, four to a register.

    Returns bytes as `quantize_group`, and what `scale_of_few_levels` wants, [tokens, 1].
    """
    BITS: tl.constexpr = FORMAT[0]
    G: tl.constexpr = FORMAT[2]
    START: tl.constexpr = FORMAT[4]
    FAST: tl.constexpr = FORMAT[9]
    INNER: tl.constexpr = 2 ** (BITS - 1)
    REFITS: tl.constexpr = refits(BITS)
    QUADS: tl.constexpr = len(xs) // 4
    EACH: tl.constexpr = 16843009  # 1 in every byte
    if CHECKED:
        known, count, peak = _finite(xs)
    else:
        known, count, peak = xs, G, largest(xs)
    _, inverse = _parts(peak, FEW)
    size, signs = (), ()
    square = tl.zeros(xs[0].shape, tl.int32)
    sizes, one = square, square + EACH
    for j in tl.static_range(QUADS):
        a, b, c, d = known[4 * j], known[4 * j + 1], known[4 * j + 2], known[4 * j + 3]
        signs = signs + (join_signs(a, b, c, d, FAST),)
        a, b = tl.fma(tl.abs(a), inverse, ROUND), tl.fma(tl.abs(b), inverse, ROUND)
        c, d = tl.fma(tl.abs(c), inverse, ROUND + 192), tl.fma(tl.abs(d), inverse, ROUND + 116)
        size = size + (join_bytes(a, b, c, d),)
        square = dot_bytes(size[j], size[j], square, FAST)
        sizes = dot_bytes(size[j], one, sizes, FAST)
    squares = total(square)
    over = ()
    for _ in tl.static_range(QUADS):
        over = over + (tl.zeros(xs[0].shape, tl.int32),)
    product = total(sizes)
    if INNER > 1:
        if CHECKED:
            step = quotient(squares, tl.maximum(count, 1.0), FAST)
        elif G & (G - 1) == 0:
            step = squares * (1.0 / G)
        else:
            step = quotient(squares, tl.full(squares.shape, G, tl.float32), FAST)
        step = root(step, FAST) * START
        for refit in tl.static_range(REFITS, -1, -1):
            above = tl.zeros(xs[0].shape, tl.int32)  # 128 times the sizes over a step, for each
            norm = tl.zeros(xs[0].shape, tl.int32)
            for i in tl.static_range(1, INNER):
                least = tl.minimum(tl.floor(step * i), FEW - 1.0).to(tl.int32)
                part_over = ()
                for j in tl.static_range(QUADS):
                    bits = bytes_over(size[j], least)
                    above = dot_bytes(size[j], bits, above, FAST)
                    if refit > 0:
                        norm = dot_bytes(bits, one * i, norm, FAST)
                    part_over = part_over + (ones_of_bytes(bits),)
                if refit == 0:
                    over = plus_scaled(over, part_over, 1)
            # A level is 1 and 2 for every step below; its square 1 and 8 i for the i-th.
            product = total(sizes * 128 + above * 2) * (1.0 / 128)
            if refit > 0:
                norm = total(norm) * (1.0 / 16) + count
                step = quotient(2 * product, tl.maximum(norm, 1.0), FAST)
    codes = ()
    for j in tl.static_range(QUADS):
        code = over[j]
        if CHECKED:  # outermost, NaN the lowest
            for k in tl.static_range(4):
                outer = tl.where(xs[4 * j + k] * 0.0 == 0.0, 0, (INNER - 1) * 256**k)
                code += outer
        codes = codes + ((code ^ signs[j]) & ((2**BITS - 1) * EACH),)
    return codes, squares, product, peak


@triton.jit
def scale_of_few_levels(squares, product, peak, CHECKED: tl.constexpr, FORMAT: tl.constexpr):
    """The scale that is stored; not finite where an element is not, if not CHECKED."""
    part, _ = _parts(peak, FEW)
    ratio = quotient(squares, tl.maximum(product, 1.0), FORMAT[9])
    scale = store_scale(ratio * (2.0 * part), peak, FORMAT[6], FORMAT[7], FORMAT[8])
    return scale if CHECKED else tl.where(peak * 0.0 == 0.0, scale, peak)


@triton.jit
def _encoded(xs, scale, zero, BITS: tl.constexpr, EPS: tl.constexpr):
    """Codes as `triton_grids.encode` gives them."""
    out = ()
    for k in tl.static_range(len(xs)):
        out = out + (encode(xs[k], scale, zero, BITS, EPS) & 255,)
    return out


@triton.jit
def _many_levels(
    xs,
    BITS: tl.constexpr,
    START: tl.constexpr,
    LIMIT: tl.constexpr,
    EPS: tl.constexpr,
    LEAST: tl.constexpr,
):
    """`grids.unbiased` of more bits."""
    TOP: tl.constexpr = 2**BITS - 1
    known, _, peak = _finite(xs)
    part, inverse = _parts(peak, FIXED)
    scale = store_scale(peak * START, peak, LIMIT, EPS, LEAST)
    codes = _encoded(xs, scale, multiply(scale, -0.5 * TOP), BITS, EPS)
    square = tl.zeros(xs[0].shape, tl.int32)
    product, norm = square, square
    parts = ()
    for k in tl.static_range(len(xs)):
        rounded = tl.fma(known[k], inverse, ROUND).to(tl.int32, bitcast=True)
        parts = parts + (rounded - 0x4B400000,)
        square += parts[k] * parts[k]
        level = tl.where(xs[k] * 0.0 == 0.0, codes[k] * 2 - TOP, 0)
        product += parts[k] * level
        norm += level * level
    ratio = tl.math.div_rn(total(product), tl.maximum(total(norm), 1.0))
    scale = store_scale(ratio * (2.0 * part), peak, LIMIT, EPS, LEAST)
    codes = _encoded(xs, scale, multiply(scale, -0.5 * TOP), BITS, EPS)
    product = tl.zeros(xs[0].shape, tl.int32)
    for k in tl.static_range(len(xs)):
        product += parts[k] * (codes[k] * 2 - TOP)
    ratio = tl.math.div_rn(total(square), tl.maximum(total(product), 1.0))
    return codes, store_scale(ratio * (2.0 * part), peak, LIMIT, EPS, LEAST)


@triton.constexpr_function
def turned_bit(format):
    """The bit of codes that `quantize_group` leaves turned, 0 if none: many are turned at once."""
    bits, grid = format[:2]
    return 2 ** (bits - 1) if grid == "unbiased" and bits <= 3 else 0


@triton.jit
def quantize_group(
    xs,
    CHECKED: tl.constexpr,
    FORMAT: tl.constexpr,  # see below
):
    """Bytes of codes XOR `turned_bit`, and the scale and zero that are stored, [tokens, 1].

    Where not CHECKED, a scale that is not finite tells that an element is not. FORMAT: bits; grid;
    group size; the clip; the first step, over the largest element or the standard deviation; the
    code that stands for 0 where no zero is stored; of the metadata's dtype the largest value, the
    step above 1 and the least scale; whether there is NVIDIA's assembly.
    """
    BITS: tl.constexpr = FORMAT[0]
    GRID: tl.constexpr = FORMAT[1]
    CLIP: tl.constexpr = FORMAT[3]
    START: tl.constexpr = FORMAT[4]
    OFFSET: tl.constexpr = FORMAT[5]
    LIMIT: tl.constexpr = FORMAT[6]
    EPS: tl.constexpr = FORMAT[7]
    LEAST: tl.constexpr = FORMAT[8]
    TOP: tl.constexpr = 2**BITS - 1
    zero = tl.zeros([xs[0].shape[0], 1], tl.float32)
    if GRID == "unbiased" and BITS <= 3:
        bytes, squares, product, peak = few_levels(xs, CHECKED, FORMAT)
        scale = scale_of_few_levels(squares, product, peak, CHECKED, FORMAT)
    else:
        if GRID == "unbiased":
            codes, scale = _many_levels(xs, BITS, START, LIMIT, EPS, LEAST)
        else:
            low, high = range_of(xs)
            if GRID == "asymmetric":
                if CLIP != 1.0:
                    low, high = multiply(low, CLIP), multiply(high, CLIP)
                zero = round_to(tl.where(low <= high, low, 0.0), LIMIT, EPS, LEAST) + 0.0
                spread = tl.where(low <= high, high, 0.0) - zero
                scale = store_scale(spread * (1.0 / TOP), spread, LIMIT, EPS, LEAST)
            else:
                spread = tl.maximum(tl.maximum(-low, high), 0.0)
                scale = store_scale(spread * START, spread, LIMIT, EPS, LEAST)
                zero = multiply(scale, -OFFSET)
            codes = _encoded(xs, scale, zero, BITS, EPS)
        bytes = ()
        for j in tl.static_range(len(xs) // 4):
            quad = codes[4 * j] + codes[4 * j + 1] * 256
            bytes = bytes + (quad + codes[4 * j + 2] * 65536 + codes[4 * j + 3] * 16777216,)
    return bytes, scale, zero
