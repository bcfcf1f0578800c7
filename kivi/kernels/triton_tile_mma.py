"""Tokens in bfloat16, two channels in a register: small ones left out, and mapped by tensor cores.

Tuples are those of triton_token.py with 4 lanes and 8 neighbours, in pairs: tensors [tokens, 4]
int32. NVIDIA's from sm_90 on, where a warp has 8 tokens and a thread one element of a tensor.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kivi.transforms import LEAST_PART, SMALL_PART

# Bits of the least threshold as bfloat16, and by how much the threshold's are less than the peak's.
LEAST = tl.constexpr((127 + LEAST_PART) * 128)
SMALL = tl.constexpr(-SMALL_PART * 128)
HUGE = tl.constexpr((127 + 120) * 128)  # sums of such elements might overflow, in an order or not


@triton.jit
def pairs_of(x, LANES: tl.constexpr, VECTOR: tl.constexpr):
    """Elements [tokens, LANES * VECTOR] as pairs of neighbours, VECTOR / 2 tensors."""
    bits = tl.reshape(x.to(tl.int16, bitcast=True), [x.shape[0], LANES, VECTOR])
    place = tl.arange(0, VECTOR)[None, None, :]
    out = ()
    for k in tl.static_range(VECTOR // 2):
        low = tl.sum(tl.where(place == 2 * k, bits, 0), 2).to(tl.int32)
        high = tl.sum(tl.where(place == 2 * k + 1, bits, 0), 2).to(tl.int32)
        out = out + ((low & 65535) | (high << 16),)
    return out


@triton.jit
def pairs_of_inverses(xs):
    """Reciprocals of float32 powers of two, neighbours as pairs."""
    out = ()
    for k in tl.static_range(len(xs) // 2):
        low, high = xs[2 * k].to(tl.int32, bitcast=True), xs[2 * k + 1].to(tl.int32, bitcast=True)
        out = out + (((0x7F000000 - low) >> 16) | (0x7F000000 - high),)
    return out


@triton.jit
def _product(a, b):
    asm: tl.constexpr = "mul.rn.bf16x2 $0, $1, $2;"
    return tl.inline_asm_elementwise(asm, "=r,r,r", [a, b], tl.int32, True, 1)


@triton.jit
def times_pairs(xs, ys):
    """Products."""
    out = ()
    for k in tl.static_range(len(xs)):
        out = out + (_product(xs[k], ys[k]),)
    return out


@triton.jit
def _larger(a, b):
    """Of magnitudes; signs mean nothing."""
    asm: tl.constexpr = "max.xorsign.abs.bf16x2 $0, $1, $2;"
    return tl.inline_asm_elementwise(asm, "=r,r,r", [a, b], tl.int32, True, 1)


@triton.jit
def without_small(xs):
    """`transforms.without_small` of tokens, and where they are huge, [tokens, 1]."""
    peak = xs[0]
    for k in tl.static_range(1, len(xs)):
        peak = _larger(peak, xs[k])
    peak = _larger(peak, peak * 65536 | ((peak >> 16) & 65535))
    peak = tl.reduce(peak, 1, _larger, keep_dims=True) & 0x7FFF7FFF
    least = tl.maximum(peak, (LEAST + SMALL) * 65537) - SMALL * 65537
    asm: tl.constexpr = """{ .reg .b32 a, z; mov.b32 z, 0; abs.bf16x2 a, $1;
        set.ge.bf16x2.bf16x2 a, a, $2; fma.rn.bf16x2 $0, $1, a, z; }"""
    out = ()
    for k in tl.static_range(len(xs)):
        limit = tl.broadcast_to(least, xs[k].shape)
        kept = tl.inline_asm_elementwise(asm, "=r,r,r", [xs[k], limit], tl.int32, True, 1)
        out = out + (kept,)
    return out, peak >= HUGE * 65537


@triton.jit
def _multiply(a, b, c, d, first, second):
    asm: tl.constexpr = """{ .reg .f32 z; mov.f32 z, 0f00000000;
        mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {$0, $1, $2, $3},
        {$4, $5, $6, $7}, {$8, $9}, {z, z, z, z}; }"""
    return tl.inline_asm_elementwise(
        asm,
        "=f,=f,=f,=f,r,r,r,r,r,r",
        [a, b, c, d, first, second],
        (tl.float32, tl.float32, tl.float32, tl.float32),
        True,
        1,
    )


@triton.jit
def signs(TOKENS: tl.constexpr):
    """8 rows and columns of the Hadamard matrix as a thread passes them to the tensor cores."""
    n = tl.arange(0, TOKENS)[:, None] % 8
    lane = tl.arange(0, 4)[None, :]
    # The parity of n & (2 * lane) and of n & (2 * lane + 1).
    even = ((n // 2) & lane & 1) ^ ((n // 4) & (lane // 2))
    odd = even ^ (n & 1)
    return even * 32768 + odd * -2147483648


@triton.jit
def hadamard_of_pairs(xs, signs, EXPONENT: tl.constexpr):
    """Four steps of `transforms.hadamard`, of channels 1, 2, 8 and 16 apart, times 2^EXPONENT.

    Exact where small elements are left out, so that their order does not matter. Float32.
    """
    one: tl.constexpr = (127 + EXPONENT) * 128 * 65537
    same = signs | one
    other = same ^ -2147450880  # the sign of each
    out = ()
    for k in tl.static_range(len(xs) // 4):
        # Rows of the first operand: a warp's tokens, and once more. Columns: the channels, 2 apart.
        a, b, c, d = xs[4 * k], xs[4 * k + 2], xs[4 * k + 1], xs[4 * k + 3]
        a0, a1, b0, b1 = _multiply(a, b, c, d, same, same)
        c0, c1, d0, d1 = _multiply(a, b, c, d, same, other)
        out = out + (a0, a1, c0, c1, b0, b1, d0, d1)
    return out
