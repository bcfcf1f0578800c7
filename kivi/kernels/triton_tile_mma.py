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
def _piece(xs, NUMBER: tl.constexpr):
    return xs[4 * NUMBER], xs[4 * NUMBER + 1], xs[4 * NUMBER + 2], xs[4 * NUMBER + 3]


@triton.jit
def _larger_quarters(xs):
    """Four of them: one chain would be waited for."""
    out = _piece(xs, 0)
    for k in tl.static_range(1, len(xs) // 4):
        more = _piece(xs, k)
        a, b = _larger(out[0], more[0]), _larger(out[1], more[1])
        out = (a, b, _larger(out[2], more[2]), _larger(out[3], more[3]))
    return out


@triton.jit
def without_small(xs):
    """`transforms.without_small` of tokens, and where they are huge, [tokens, 1]."""
    peaks = _larger_quarters(xs)
    peak = _larger(_larger(peaks[0], peaks[1]), _larger(peaks[2], peaks[3]))
    peak = _larger(peak, peak * 65536 | ((peak >> 16) & 65535))
    peak = tl.reduce(peak, 1, _larger, keep_dims=True) & 0x7FFF7FFF
    least = tl.maximum(peak, (LEAST + SMALL) * 65537) - SMALL * 65537
    # Magnitudes compare like float16: of what would be NaN there, all is huge.
    asm: tl.constexpr = """{ .reg .b32 a; abs.f16x2 a, $1; set.ge.u32.f16x2 a, a, $2;
        and.b32 $0, $1, a; }"""
    out = ()
    for k in tl.static_range(len(xs)):
        limit = tl.broadcast_to(least, xs[k].shape)
        kept = tl.inline_asm_elementwise(asm, "=r,r,r", [xs[k], limit], tl.int32, True, 1)
        out = out + (kept,)
    return out, peak >= HUGE * 65537


@triton.jit
def _multiply(a, first, second, c):
    """`a` times signs, plus c: the second operand's halves, its upper and lower rows."""
    asm: tl.constexpr = """mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {$0, $1, $2, $3},
        {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};"""
    return tl.inline_asm_elementwise(
        asm,
        "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f",
        [a[0], a[1], a[2], a[3], first, second, c[0], c[1], c[2], c[3]],
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
def hadamard_of_pairs(xs, signs, nothing, EXPONENT: tl.constexpr):
    """Five steps of `transforms.hadamard`, of channels 1 to 16 apart, times 2^EXPONENT.

    Exact where small elements are left out, so that their order does not matter. Float32.
    `nothing`: 0, unknown to the compiler.
    """
    one: tl.constexpr = (127 + EXPONENT) * 128 * 65537
    PIECES: tl.constexpr = len(xs) // 4
    plus = signs | one
    minus = plus ^ -2147450880  # the sign of each
    # Operands are pairs of neighbouring registers: no pair must be made of another one's.
    plus_0, plus_1, plus_2 = plus | nothing, plus | (nothing * 2), plus | (nothing * 3)
    minus_0, minus_1, minus_2 = minus | nothing, minus | (nothing * 2), minus | (nothing * 3)
    zero = tl.zeros(plus.shape, tl.float32)
    none = (zero, zero, zero, zero)
    out = ()
    for half in tl.static_range((PIECES + 1) // 2):
        # Rows: a warp's tokens, of one piece and of the next. Columns: the channels, 2 apart.
        one_piece, next_piece = _piece(xs, 2 * half), _piece(xs, min(2 * half + 1, PIECES - 1))
        low = (one_piece[0], next_piece[0], one_piece[1], next_piece[1])
        high = (one_piece[2], next_piece[2], one_piece[3], next_piece[3])
        sums = _multiply(low, plus, plus_0, none)
        differences = _multiply(low, plus_1, minus, none)
        a = _multiply(high, plus, plus_0, sums)
        b = _multiply(high, plus_1, minus, differences)
        c = _multiply(high, minus_0, minus_1, sums)
        d = _multiply(high, minus_2, plus_2, differences)
        out = out + (a[0], a[1], b[0], b[1], c[0], c[1], d[0], d[1])
        if 2 * half + 1 < PIECES:
            out = out + (a[2], a[3], b[2], b[3], c[2], c[3], d[2], d[3])
    return out
