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
def _signs_of(signs, nothing, EXPONENT: tl.constexpr):
    """Second operands, pairs of registers: signs of sums and of differences, and all turned."""
    plus = signs | ((127 + EXPONENT) * 128 * 65537)
    minus = plus ^ -2147450880  # the sign of each
    # They are pairs of neighbouring registers: no pair must be made of another one's.
    sums, differences = (plus, plus | nothing), (plus | (nothing * 2), minus)
    turned_sums = (minus | nothing, minus | (nothing * 2))
    turned_differences = (minus | (nothing * 3), plus | (nothing * 3))
    return sums, differences, turned_sums, turned_differences


@triton.jit
def _five_steps(a, b, plus, minus, none):
    """Of channels of a piece that are 1 to 16 apart."""
    first = _multiply(a, plus[0], plus[1], none)
    return _multiply(b, plus[0], plus[1], first), _multiply(b, minus[0], minus[1], first)


@triton.jit
def _six_steps(a, b, c, d, plus, minus, none):
    """Of channels of two pieces, 32 apart too."""
    even, odd = _five_steps(a, b, plus, minus, none)
    even_sum, even_rest = _multiply(c, *plus, even), _multiply(c, *minus, even)
    odd_sum, odd_rest = _multiply(c, *plus, odd), _multiply(c, *minus, odd)
    return (
        (_multiply(d, *plus, even_sum), _multiply(d, *minus, odd_sum)),
        (_multiply(d, *minus, even_rest), _multiply(d, *plus, odd_rest)),
    )


@triton.jit
def _rows(xs, ONE: tl.constexpr, OTHER: tl.constexpr):
    """First operands, rows of two pieces: their channels that differ in 2, then those 4 apart."""
    one, other = _piece(xs, ONE), _piece(xs, OTHER)
    return (one[0], other[0], one[1], other[1]), (one[2], other[2], one[3], other[3])


@triton.jit
def _of_rows(a, b, c, d, ROW: tl.constexpr):
    """Channels of a piece: of its sums and differences over 2, then over 4."""
    i: tl.constexpr = 2 * ROW
    return a[i], a[i + 1], b[i], b[i + 1], c[i], c[i + 1], d[i], d[i + 1]


@triton.jit
def hadamard_of_pairs(xs, signs, nothing, SIX: tl.constexpr, EXPONENT: tl.constexpr):
    """Five or SIX steps of `transforms.hadamard`, of channels 1 to 16 or 32 apart.

    Times 2^EXPONENT, float32. Exact where small elements are left out, so that their order does not
    matter.
    `nothing`: 0, unknown to the compiler.
    """
    PIECES: tl.constexpr = len(xs) // 4
    sums, differences, turned_sums, turned_differences = _signs_of(signs, nothing, EXPONENT)
    zero = tl.zeros(signs.shape, tl.float32)
    none = (zero, zero, zero, zero)
    out = ()
    if SIX:
        for four in tl.static_range(PIECES // 4):
            a, b = _rows(xs, 4 * four, 4 * four + 2)
            c, d = _rows(xs, 4 * four + 1, 4 * four + 3)
            even, odd = _six_steps(a, b, c, d, sums, turned_sums, none)
            even_2, odd_2 = _six_steps(a, b, c, d, differences, turned_differences, none)
            for row in tl.static_range(2):
                out = out + _of_rows(even[0], even_2[0], even[1], even_2[1], row)
                out = out + _of_rows(odd[0], odd_2[0], odd[1], odd_2[1], row)
    else:
        for half in tl.static_range((PIECES + 1) // 2):
            a, b = _rows(xs, 2 * half, min(2 * half + 1, PIECES - 1))
            low, high = _five_steps(a, b, sums, turned_sums, none)
            low_2, high_2 = _five_steps(a, b, differences, turned_differences, none)
            for row in tl.static_range(min(2, PIECES - 2 * half)):
                out = out + _of_rows(low, low_2, high, high_2, row)
    return out
