"""Tile helpers of the 8-bit tensor-core path: Walsh-Hadamard maps of heads' numbers.

A program is one warp.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from kivi.kernels.triton_tile_gluon import MMA
from kivi.kernels.triton_tile_heads import exchanged, rows_of_heads

SINGLE_A = gl.constexpr(gl.DotOperandLayout(operand_index=0, parent=MMA.value, k_width=1))
SINGLE_B = gl.constexpr(gl.DotOperandLayout(operand_index=1, parent=MMA.value, k_width=1))


@gluon.jit
def here(x):
    """The same int32 numbers. What is made of them is not made before a loop, to take registers."""
    asm: gl.constexpr = "mov.u32 $0, $1;"
    return gl.inline_asm_elementwise(asm, "=r,r", [x], dtype=gl.int32, is_pure=False, pack=1)


@gluon.constexpr_function
def inverse_scale(block):
    """What the inverse Walsh-Hadamard map of blocks is scaled by, as a power of 2."""
    return -(block.bit_length() // 2)


@gluon.jit
def _butterflies(x, D: gl.constexpr, FIRST: gl.constexpr, BLOCK: gl.constexpr):
    """Sums and differences of rows `[D / 8, 8, 4]` that are 2^FIRST, ..., BLOCK / 2 apart."""
    for k in gl.static_range(FIRST, 9):
        if 2**k < BLOCK:
            y = gl.permute(x.reshape([D // (2 * 2**k), 2, 2 ** (k - 3), 8, 4]), (0, 2, 3, 4, 1))
            low, high = gl.split(y)
            y = gl.permute(gl.join(low + high, low - high), (0, 4, 1, 2, 3)).reshape([D // 8, 8, 4])
            x = gl.convert_layout(y, rows_of_heads(D), assert_trivial=True)
    return x


@gluon.jit
def unmapped(x, D: gl.constexpr, BLOCK: gl.constexpr):
    """`kivi.transforms.inverse_hadamard` over the rows of D channels in 1 or 2 pieces, not scaled.

    A piece is `[n / 8, 8, 4]`.
    """
    n: gl.constexpr = D // len(x)
    y = ()
    for c in gl.static_range(len(x)):
        y = y + (sums_and_differences(x[c], n, min(BLOCK, n)),)
    if BLOCK > n:
        y = (y[0] + y[1], y[0] - y[1])
    return y


@gluon.jit
def sums_and_differences(x, D: gl.constexpr, BLOCK: gl.constexpr):
    """`kivi.transforms.inverse_hadamard` over the rows of `[D / 8, 8, 4]`, not scaled."""
    layout: gl.constexpr = rows_of_heads(D)
    g = here(gl.arange(0, 8, layout=gl.SliceLayout(0, gl.SliceLayout(2, layout))))
    for k in gl.static_range(3):
        if 2**k < BLOCK:
            sign = gl.where((g // 2**k) % 2 == 0, 1.0, -1.0)
            x = x * sign[None, :, None] + exchanged(x, 4 * 2**k)
    return _butterflies(x, D, 3, BLOCK)


@gluon.constexpr_function
def channels_of_heads(D):
    """`[4, D]`: 4 neighbours a thread, and together what `rotated` wants in operand B."""
    return gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2]] + [[0, 1 << i] for i in range(5, D.bit_length() - 1)],
        lane_bases=[[0, 4], [0, 8], [0, 16], [1, 0], [2, 0]],
        warp_bases=[],
        block_bases=[],
        shape=[4, D],
    )


@gluon.jit
def rotated(x, D: gl.constexpr, BLOCK: gl.constexpr):
    """`kivi.transforms.inverse_hadamard` of `[4, D]` as `[D / 8, 8, 4]`; blocks of 16 or more.

    Across lanes by tensor cores, which take 11 bits: 16-bit floats times powers of 2.
    """
    x = gl.permute(x.reshape([4, D // 32, 2, 4, 4]), (4, 3, 1, 0, 2)).reshape([16, D // 4])
    x = gl.convert_layout(x, SINGLE_B, assert_trivial=True)
    row = gl.arange(0, 16, layout=gl.SliceLayout(1, SINGLE_A))
    column = gl.arange(0, 16, layout=gl.SliceLayout(0, SINGLE_A))
    row, column = here(row), column // 4 + column % 4 * 4
    bits = gl.full([16, 16], (127 + inverse_scale(BLOCK)) << 23, gl.int32, layout=SINGLE_A)
    for k in gl.static_range(4):
        bits ^= ((row << (31 - k))[:, None] & (column << (31 - k))[None, :]) & -2147483648
    zero = gl.zeros([16, D // 4], gl.float32, layout=MMA)
    y = mma_v2(bits.to(gl.float32, bitcast=True), x, zero, input_precision="tf32")
    y = gl.permute(y.reshape([2, 8, D // 32, 4, 2]), (2, 4, 0, 1, 3)).reshape([D // 8, 8, 4])
    y = gl.convert_layout(y, rows_of_heads(D), assert_trivial=True)
    return _butterflies(y, D, 4, BLOCK)
