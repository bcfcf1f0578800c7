"""Whole tokens in registers: a tuple with a tensor [tokens, lanes] for each channel of a thread.

Channel `(piece * lanes + lane) * vector + place` of a token is element `piece * vector + place` of
the tuple, in that lane: threads read `vector` neighbours at once, and what neighbouring channels
do with each other stays in a thread. Nothing here leaves a layout to the compiler.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kivi.kernels.triton_tile_mma import hadamard_of_pairs
from kivi.transforms import LEAST_PART, SMALL_PART

SMALL = tl.constexpr(2.0**SMALL_PART)
LEAST = tl.constexpr(2.0**LEAST_PART)


@triton.constexpr_function
def log2(n):
    """Of a power of two."""
    return n.bit_length() - 1


@triton.jit
def some(xs, START: tl.constexpr, COUNT: tl.constexpr):
    """COUNT elements of a tuple."""
    out = ()
    for k in tl.static_range(COUNT):
        out = out + (xs[START + k],)
    return out


@triton.jit
def butterfly(xs, APART: tl.constexpr):
    """Sums and differences of elements so far apart."""
    out = ()
    for k in tl.static_range(len(xs)):
        out = out + ((xs[k - APART] - xs[k]) if k & APART else (xs[k] + xs[k + APART]),)
    return out


@triton.jit
def _butterfly_of_lanes(xs, LANES: tl.constexpr, APART: tl.constexpr):
    lane = tl.arange(0, LANES)[None, :]
    sign = tl.broadcast_to(tl.where((lane & APART) == 0, 1.0, -1.0), xs[0].shape)
    other = tl.broadcast_to(lane ^ APART, xs[0].shape)
    out = ()
    for k in tl.static_range(len(xs)):
        out = out + (tl.fma(xs[k], sign, tl.gather(xs[k], other, 1)),)
    return out


@triton.jit
def hadamard(xs, BLOCK: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr):
    """`transforms.hadamard`, its sums in the same order."""
    IN_VECTOR: tl.constexpr = min(BLOCK, VECTOR)
    IN_LANES: tl.constexpr = min(BLOCK // IN_VECTOR, LANES)
    for k in tl.static_range(log2(IN_VECTOR)):
        xs = butterfly(xs, 2**k)
    for k in tl.static_range(log2(IN_LANES)):
        xs = _butterfly_of_lanes(xs, LANES, 2**k)
    for k in tl.static_range(log2(BLOCK // (IN_VECTOR * IN_LANES))):
        xs = butterfly(xs, VECTOR * 2**k)
    return scaled(xs, 2.0 ** -(log2(BLOCK) // 2))


@triton.jit
def hadamard_by_tensor_cores(
    pairs, signs, nothing, BLOCK: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr
):
    """`hadamard` of pairs, see triton_tile_mma.py; the same numbers."""
    STEPS: tl.constexpr = log2(BLOCK // (VECTOR * LANES))  # between pieces
    SIX: tl.constexpr = STEPS > 0 and len(pairs) % 16 == 0
    xs = hadamard_of_pairs(pairs, signs, nothing, SIX, -(log2(BLOCK) // 2))
    for k in tl.static_range(1 if SIX else 0, STEPS):
        xs = butterfly(xs, VECTOR * 2**k)
    return xs


@triton.jit
def without_small(xs):
    """`transforms.without_small`."""
    peak = tl.zeros(xs[0].shape, tl.float32)
    for k in tl.static_range(len(xs)):
        peak = tl.maximum(peak, tl.where(xs[k] * 0.0 == 0.0, tl.abs(xs[k]), 0.0))
    least = tl.maximum(tl.max(peak, 1, keep_dims=True) * SMALL, LEAST)
    out = ()
    for k in tl.static_range(len(xs)):
        out = out + (tl.where(tl.abs(xs[k]) < least, 0.0, xs[k]),)
    return out


@triton.jit
def scaled(xs, factor):
    """All elements times a number."""
    out = ()
    for k in tl.static_range(len(xs)):
        out = out + (xs[k] * factor,)
    return out


@triton.jit
def times(xs, ys):
    """Products of elements."""
    out = ()
    for k in tl.static_range(len(xs)):
        out = out + (xs[k] * ys[k],)
    return out


@triton.jit
def minus(xs, ys):
    """Differences of elements."""
    out = ()
    for k in tl.static_range(len(xs)):
        out = out + (xs[k] - ys[k],)
    return out


@triton.jit
def inverses(xs):
    """Reciprocals of elements."""
    out = ()
    for k in tl.static_range(len(xs)):
        out = out + (tl.math.div_rn(1.0, xs[k]),)
    return out


@triton.jit
def only(xs, mask):
    """Tokens of a mask [tokens, 1], NaN for others."""
    out = ()
    for k in tl.static_range(len(xs)):
        out = out + (tl.where(mask, xs[k], float("nan")),)
    return out


@triton.jit
def zeros(TOKENS: tl.constexpr, LANES: tl.constexpr, COUNT: tl.constexpr):
    """A tuple of int32 zeros."""
    out = ()
    for _ in tl.static_range(COUNT):
        out = out + (tl.zeros([TOKENS, LANES], tl.int32),)
    return out


@triton.jit
def turned(xs, bits):
    """`xs ^ bits`."""
    out = ()
    for k in tl.static_range(len(xs)):
        out = out + (xs[k] ^ bits,)
    return out


@triton.jit
def plus_scaled(xs, ys, weight):
    """`xs + ys * weight`."""
    out = ()
    for k in tl.static_range(len(xs)):
        out = out + (xs[k] + ys[k] * weight,)
    return out


@triton.jit
def _largest(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _larger_halves(xs):
    out = ()
    for k in tl.static_range((len(xs) + 1) // 2):
        other = tl.abs(xs[min(k + (len(xs) + 1) // 2, len(xs) - 1)])
        out = out + (_largest(tl.abs(xs[k]), other),)
    return out


@triton.jit
def largest(xs):
    """Of the magnitudes of tokens, [tokens, 1]; NaN where one is."""
    # By halves: a chain of them all would be waited for.
    for _ in tl.static_range(log2(len(xs))):
        xs = _larger_halves(xs)
    peak = tl.abs(xs[0])
    for k in tl.static_range(1, len(xs)):
        peak = _largest(peak, tl.abs(xs[k]))
    return tl.reduce(peak, 1, _largest, keep_dims=True)


@triton.jit
def range_of(xs):
    """The least and the largest element of tokens, [tokens, 1], of those that are finite."""
    low = tl.full(xs[0].shape, float("inf"), tl.float32)
    high = -low
    for k in tl.static_range(len(xs)):
        finite = xs[k] * 0.0 == 0.0
        low = tl.minimum(low, tl.where(finite, xs[k], float("inf")))
        high = tl.maximum(high, tl.where(finite, xs[k], float("-inf")))
    return tl.min(low, 1, keep_dims=True), tl.max(high, 1, keep_dims=True)


@triton.jit
def total(x):
    """Of the lanes of tokens, [tokens, 1] float32, rounded once."""
    return tl.sum(x, 1, keep_dims=True).to(tl.float32)
