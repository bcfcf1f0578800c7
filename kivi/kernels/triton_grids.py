"""grids.py inside a kernel: the same arithmetic, operation by operation, so that bytes are equal.

Elements of groups have 3 dimensions, groups along axis 1 (CHANNEL), or 4, groups along 2 and 3.
LIMIT, EPS and LEAST are the largest value of the metadata's dtype, the step above 1, and the least
scale.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kivi.kernels.triton_tile_pack import pair, unpair

# 1.5 * 2^23: adding it rounds a float32 below 2^22 to an integer, half to even. As int32, the sum
# has that integer in its low bits, and no other bit set in the low 16.
ROUND = tl.constexpr(12582912.0)


@triton.jit
def multiply(a, b):
    """`a * b`, rounded: a plain product would be contracted with the sum that takes it."""
    return tl.fma(a, b, 0.0)


@triton.jit
def round_to(x, LIMIT: tl.constexpr, EPS: tl.constexpr, LEAST: tl.constexpr):
    """`grids.round_to`."""
    x = tl.minimum(tl.maximum(x, -LIMIT), LIMIT)
    if EPS == 2.0**-10:  # float16, subnormals included, rounds this way in hardware
        return x.to(tl.float16).to(tl.float32)
    bits = x.to(tl.int32, bitcast=True)
    step = tl.maximum((bits & 0x7F800000).to(tl.float32, bitcast=True) * EPS, LEAST)
    inverse = (0x7F000000 - step.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)
    size = (tl.abs(x) * inverse + ROUND - ROUND) * step
    return (size.to(tl.int32, bitcast=True) | (bits & -2147483648)).to(tl.float32, bitcast=True)


@triton.jit
def store_scale(scale, spread, LIMIT: tl.constexpr, EPS: tl.constexpr, LEAST: tl.constexpr):
    """`grids._store_scale`."""
    return tl.where(spread > 0, tl.maximum(round_to(scale, LIMIT, EPS, LEAST), LEAST), 0.0)


@triton.jit
def _least_pair(a, b):
    asm: tl.constexpr = "min.bf16x2 $0, $1, $2;"
    return tl.inline_asm_elementwise(asm, "=r,r,r", [a, b], tl.int32, True, 1)


@triton.jit
def _largest_pair(a, b):
    asm: tl.constexpr = "max.bf16x2 $0, $1, $2;"
    return tl.inline_asm_elementwise(asm, "=r,r,r", [a, b], tl.int32, True, 1)


@triton.jit
def _finite_pairs(x):
    asm: tl.constexpr = "{ .reg .b32 z; mov.b32 z, 0; fma.rn.bf16x2 $0, $1, z, $1; }"
    return tl.inline_asm_elementwise(asm, "=r,r", [x], tl.int32, True, 1)


# Not tl.min and tl.max: they take float16 to float32 first, and two elements fit into a register.
@triton.jit
def _min(x, CHANNEL: tl.constexpr):
    axis: tl.constexpr = 1 if CHANNEL else 2
    if x.dtype == tl.int32:  # pairs
        x = unpair(tl.reduce(x, axis, _least_pair, keep_dims=True))
    else:
        x = tl.reduce(x, axis, tl.standard._elementwise_min, keep_dims=True)
    if not CHANNEL:
        x = tl.reduce(x, 3, tl.standard._elementwise_min, keep_dims=True)
    return x.to(tl.float32)


@triton.jit
def _max(x, CHANNEL: tl.constexpr):
    axis: tl.constexpr = 1 if CHANNEL else 2
    if x.dtype == tl.int32:  # pairs
        x = unpair(tl.reduce(x, axis, _largest_pair, keep_dims=True))
    else:
        x = tl.reduce(x, axis, tl.standard._elementwise_max, keep_dims=True)
    if not CHANNEL:
        x = tl.reduce(x, 3, tl.standard._elementwise_max, keep_dims=True)
    return x.to(tl.float32)


@triton.jit
def _sum(x, CHANNEL: tl.constexpr):
    if not CHANNEL:
        x = tl.sum(x, 3, keep_dims=True)
    axis: tl.constexpr = 1 if CHANNEL else 2
    return tl.sum(x, axis, keep_dims=True)


@triton.jit
def fit(
    raw,
    BITS: tl.constexpr,
    GRID: tl.constexpr,
    OFFSET: tl.constexpr,
    CHANNEL: tl.constexpr,
    LIMIT: tl.constexpr,
    EPS: tl.constexpr,
    LEAST: tl.constexpr,
    UNIT: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """`grids.fit`: scale and zero, float32. What takes no part in a group is NaN in `raw`."""
    TOP: tl.constexpr = 2**BITS - 1
    x = raw.to(tl.float32)
    # Infinities become NaN. float16 stays float16 here, bfloat16 in pairs.
    if PAIRS:
        finite = _finite_pairs(pair(raw))
    else:
        finite = raw * 0.0 + raw if raw.dtype == tl.float16 else tl.fma(x, 0.0, x)
    if GRID == "symmetric":
        STEPS: tl.constexpr = 0.5 if BITS == 1 else 2.0 ** (BITS - 1) - 1
        size = finite & 0x7FFF7FFF if PAIRS else tl.abs(finite)
        spread = tl.maximum(_max(size, CHANNEL), 0.0)
        scale = store_scale(spread * (1.0 / STEPS), spread, LIMIT, EPS, LEAST)
        zero = multiply(scale, -OFFSET)
    else:
        low = _min(finite, CHANNEL)
        high = _max(finite, CHANNEL)
        zero = round_to(tl.where(low <= high, low, 0.0), LIMIT, EPS, LEAST) + 0.0
        spread = tl.where(low <= high, high, 0.0) - zero
        scale = store_scale(spread * (1.0 / TOP), spread, LIMIT, EPS, LEAST)
    if GRID == "least_squares":
        steps = multiply(x - zero, _inverse(scale))
        codes = _round(steps, BITS) - ROUND
        rest = tl.minimum(tl.maximum(steps - codes, -1.0), 1.0) * UNIT + ROUND - ROUND
        counts = tl.fma(x, 0.0, x) == x
        codes, rest = tl.where(counts, codes - OFFSET, 0.0), tl.where(counts, rest, 0.0)
        count = tl.maximum(_sum(tl.where(counts, 1.0, 0.0), CHANNEL), 1.0)
        code_sum, rest_sum = _sum(codes, CHANNEL), _sum(rest, CHANNEL)
        squares, products = _sum(codes * codes, CHANNEL), _sum(codes * rest, CHANNEL)
        variance = multiply(count, squares) - multiply(code_sum, code_sum)
        slope = multiply(count, products) - multiply(code_sum, rest_sum)
        slope = tl.math.div_rn(slope, tl.maximum(variance, 1e-9))
        shift = tl.math.div_rn(rest_sum - multiply(slope, code_sum), count)
        shift -= multiply(slope, OFFSET)
        new = scale + multiply(scale, slope * (1.0 / UNIT))
        refit = (variance > 0) & (new > 0) & (spread <= LIMIT)
        moved = round_to(zero + multiply(scale, shift * (1.0 / UNIT)), LIMIT, EPS, LEAST)
        scale = tl.where(refit, store_scale(new, new, LIMIT, EPS, LEAST), scale)
        zero = tl.where(refit, moved, zero)
    return scale, zero


@triton.jit
def _inverse(scale):
    """`grids._inverse`."""
    inverse = tl.math.div_rn(1.0, tl.where(scale > 0, scale, 1.0)) * (1 - 2.0**-21)
    return tl.where(scale > 0, inverse, 0.0)


@triton.jit
def _round(steps, BITS: tl.constexpr):
    return tl.minimum(tl.maximum(steps, 0.0), 2.0**BITS - 1) + ROUND


@triton.jit
def encode(x, scale, zero, BITS: tl.constexpr, EPS: tl.constexpr):
    """`grids.encode` of float32, as int32 with no other bit among the low 16; NaN becomes 0."""
    steps, inverse = x - zero, _inverse(scale)
    if EPS == 2.0**-7:  # the inverses of bfloat16's largest scales are subnormal: no part of them
        steps = _round(multiply(steps, inverse), BITS)
    else:
        # In parts of 2^BITS, because a clamp to [0, 1] is a modifier of the multiplication.
        PART: tl.constexpr = 2.0**-BITS
        steps = tl.minimum(tl.maximum(multiply(steps, inverse * PART), 0.0), 1.0)
        # The other bound after rounding: two bounds in a row would become one.
        steps = tl.minimum(steps + ROUND * PART, (ROUND + (2**BITS - 1)) * PART)
    return steps.to(tl.int32, bitcast=True)
