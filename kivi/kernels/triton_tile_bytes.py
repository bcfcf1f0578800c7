"""Tile helpers of the 8-bit tensor-core path: words to bytes, numbers to pairs of bytes and back.

Numbers that meet codes are integers of 16 bits, as two signed bytes: with 4 heads, the 8 columns of
an MMA's operand B are `(head, high or low byte)`, and a result's pair of columns is a head's in
every thread. A program is one warp.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from kivi.kernels.triton_tile_gluon import MMA
from kivi.kernels.triton_tile_heads import rows_of_heads

BYTES_A = gl.constexpr(gl.DotOperandLayout(operand_index=0, parent=MMA.value, k_width=4))
BYTES_B = gl.constexpr(gl.DotOperandLayout(operand_index=1, parent=MMA.value, k_width=4))
# 1.5 * 2^23: added to an integer of up to 22 bits, it is in a float32's low bits.
WHOLE = gl.constexpr(12582912.0)
WHOLE_BITS = gl.constexpr(0x4B400000)


@gluon.constexpr_function
def word_pairs(rows, columns):
    """16-bit operand A `[rows, columns]`, registers of columns 8 apart next to each other."""
    width, height = columns.bit_length() - 1, rows.bit_length() - 1
    return gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 8], [8, 0]]
        + [[0, 1 << i] for i in range(4, width)]
        + [[1 << i, 0] for i in range(4, height)],
        lane_bases=[[0, 2], [0, 4], [1, 0], [2, 0], [4, 0]],
        warp_bases=[],
        block_bases=[],
        shape=[rows, columns],
    )


@gluon.constexpr_function
def mean_code(bits):
    """Halfway between the least and the largest code."""
    return 2.0 ** (bits - 1) - 0.5


@gluon.constexpr_function
def pair_bits(x, dtype):
    """The bits of a number of few digits, from 1 on, twice, as 16-bit floats."""
    exponent = 0
    while x >= 2.0:
        x, exponent = x / 2.0, exponent + 1
    if dtype == gl.float16:
        bits = (15 + exponent) * 1024 + int((x - 1.0) * 1024)
    else:
        bits = (127 + exponent) * 128 + int((x - 1.0) * 128)
    return bits * 65537


@gluon.jit
def bytes_of(words, upper, rows: gl.constexpr, columns: gl.constexpr):
    """The lower bytes of words (operand A) as 8-bit operand A, or if `upper` is 1 the upper ones.

    Of 16 columns, that of index `2 c + 8 e + f` comes to `4 c + 2 f + e`: as `operand` has rows.
    """
    words = gl.convert_layout(words, word_pairs(rows, columns), assert_trivial=True)
    x = gl.inline_asm_elementwise(
        "prmt.b32 $0, $1, $2, $3;",
        "=r,r,r,r,r,r,r",
        [words, 0x6240 + upper * 0x1111],
        dtype=gl.int8,
        is_pure=True,
        pack=4,
    )
    x = gl.permute(x.reshape([rows, columns // 16, 2, 4, 2]), (0, 1, 3, 2, 4))
    return gl.convert_layout(x.reshape([rows, columns]), BYTES_A, assert_trivial=True)


@gluon.jit
def kept(x, mask):
    """Bytes where `mask` has ones."""
    return gl.inline_asm_elementwise(
        "and.b32 $0, $1, $2;", "=r,r,r", [x, mask], dtype=gl.int8, is_pure=True, pack=4
    )


@gluon.jit
def half_down(x):
    """Bytes with their upper 4 bits moved down; what comes from the neighbour is masked out."""
    return gl.inline_asm_elementwise(
        "shr.u32 $0, $1, 4;", "=r,r", [x], dtype=gl.int8, is_pure=True, pack=4
    )


@gluon.jit
def codes_of(x, bits: gl.constexpr, plane: gl.constexpr):
    """One plane's codes, masked in place: code * 2^(bits * plane), in the top plane less 128."""
    mask: gl.constexpr = ((1 << bits) - 1) * (1 << (bits * plane)) * 0x01010101
    if bits * (plane + 1) == 8:
        return gl.inline_asm_elementwise(
            f"lop3.b32 $0, $1, {mask}, 0x80808080, 0x6A;",
            "=r,r",
            [x],
            dtype=gl.int8,
            is_pure=True,
            pack=4,
        )
    else:
        return gl.inline_asm_elementwise(
            f"and.b32 $0, $1, {mask};", "=r,r", [x], dtype=gl.int8, is_pure=True, pack=4
        )


@gluon.jit
def offset(down):
    """What added to numbers leaves them over `down`, rounded, in the low bits of a float32.

    `down`: a power of 2 below 2^104 that they are at most LARGEST times as large as. 128, as lower
    bytes have signs too. To add it costs nothing where numbers are products.
    """
    return down * (WHOLE + 128.0)


@gluon.jit
def operand(x, rows: gl.constexpr):
    """Numbers `[rows / 8, 8, 4]` plus their `offset`, rounded, as operand B `[rows, 8]`.

    Row `8 e + 2 c + f` of 16 comes to `4 c + 2 f + e`. `movmatrix` transposes pairs of bytes.
    """
    upper, lower = gl.inline_asm_elementwise(
        "{ .reg .b32 t, u; prmt.b32 t, $2, $3, 0x4051; prmt.b32 u, $4, $5, 0x4051; "
        "xor.b32 t, t, 0x80800000; xor.b32 u, u, 0x80800000; "
        "movmatrix.sync.aligned.m8n8.trans.b16 $0, t; "
        "movmatrix.sync.aligned.m8n8.trans.b16 $1, u; }",
        "=r,=r,r,r,r,r",
        [x],
        dtype=(gl.int8, gl.int8),
        is_pure=True,
        pack=4,
    )
    # What they are now: [32 rows, (bytes), columns, c] of two halves of 32 rows
    y = gl.join(upper, lower).reshape([rows // 32, 2, 2, 8, 4, 2])
    y = gl.permute(y, (0, 5, 4, 1, 2, 3)).reshape([rows, 8])
    return gl.convert_layout(y, BYTES_B, assert_trivial=True)


@gluon.jit
def whole_product(a, b, rows: gl.constexpr):
    """`a @ b` of 8-bit operands as `[rows / 8, 8, 4]` float32: exact up to 24 bits."""
    acc = gl.full([rows, 8], WHOLE_BITS, gl.int32, layout=MMA)
    return whole(mma_v2(a, b, acc), rows)


@gluon.jit
def whole(acc, rows: gl.constexpr):
    """Integers less WHOLE_BITS of the columns (head, high or low byte), as numbers of the heads."""
    x = acc.to(gl.float32, bitcast=True).reshape([rows // 8, 8, 4, 2])
    high, low = gl.split(x)
    layout: gl.constexpr = rows_of_heads(rows)
    high = gl.convert_layout(high, layout, assert_trivial=True)
    low = gl.convert_layout(low, layout, assert_trivial=True)
    return low + gl.fma(high, gl.full_like(high, 256.0), gl.full_like(high, -257 * WHOLE))


@gluon.jit
def multiply_add(x, factor: gl.constexpr, y):
    """`x * factor + y` of 16-bit numbers, rounded once."""
    kind: gl.constexpr = "f16x2" if x.dtype == gl.float16 else "bf16x2"
    bits: gl.constexpr = pair_bits(factor, x.dtype)
    return gl.inline_asm_elementwise(
        f"{{ .reg .b32 t; mov.b32 t, {bits}; fma.rn.{kind} $0, $1, t, $2; }}",
        "=r,r,r",
        [x, y],
        dtype=x.dtype,
        is_pure=True,
        pack=2,
    )


@gluon.jit
def products(x, y):
    """`x * y` in float32 of 16-bit `x`, which is not widened for good: that takes registers."""
    kind: gl.constexpr = "f16" if x.dtype == gl.float16 else "bf16"
    x, y = gl.broadcast(x, y)
    return gl.inline_asm_elementwise(
        "{ .reg .b16 h, k; .reg .f32 a, b; mov.b32 {h, k}, $2; "
        f"cvt.f32.{kind} a, h; cvt.f32.{kind} b, k; mul.f32 $0, a, $3; mul.f32 $1, b, $4; }}",
        "=f,=f,r,f,f",
        [x, y],
        dtype=gl.float32,
        is_pure=True,
        pack=2,
    )
