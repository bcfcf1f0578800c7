"""Queries of the Gluon kernel: loading, and the Hadamard map for keys that were packed under it."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from kivi.kernels.triton_tile_gluon import MMA, OPERAND_A, OPERAND_B, transpose_blocks


@gluon.constexpr_function
def inverse_shift(block):
    """Of the power of 2 that an inverse map ends with."""
    return block.bit_length() // 2


@gluon.jit
def _signs(dtype: gl.constexpr):
    """The Hadamard matrix `[16, 16]` as operand A: 1 or -1 by the parity of row & column."""
    i = gl.arange(0, 16, layout=gl.SliceLayout(1, OPERAND_A))
    j = gl.arange(0, 16, layout=gl.SliceLayout(0, OPERAND_A))
    x = i[:, None] & j[None, :]
    parity = (x % 2 + x // 2 % 2 + x // 4 % 2 + x // 8) % 2
    return gl.where(parity == 0, 1.0, -1.0).to(dtype)


@gluon.jit
def _parts(x, n: gl.constexpr, rows: gl.constexpr):
    """`[n * rows, 8]` as n tensors `[rows, 8]`, which moves nothing."""
    if n == 1:
        return (x,)
    else:
        x = gl.permute(x.reshape([2, n * rows // 2, 8]), (1, 2, 0))
        a, b = gl.split(x)
        return _parts(a, n // 2, rows) + _parts(b, n // 2, rows)


@gluon.jit
def _whole(parts, first: gl.constexpr, n: gl.constexpr, rows: gl.constexpr):
    """What `_parts` undoes."""
    if n == 1:
        return parts[first]
    else:
        a = _whole(parts, first, n // 2, rows)
        b = _whole(parts, first + n // 2, n // 2, rows)
        return gl.permute(gl.join(a, b), (2, 0, 1)).reshape([n * rows, 8])


@gluon.jit
def power_of_2(x):
    """The largest power of 2 that is not above `x`, a float32; at least 2^-100."""
    return gl.maximum(
        (x.to(gl.int32, bitcast=True) & 0x7F800000).to(gl.float32, bitcast=True), 2.0**-100
    )


@gluon.jit
def load_query(source, block, rows, LIFT: gl.constexpr, D: gl.constexpr):
    """8 queries as operand B `[D, 8]`, times LIFT over a power of 2; and that power.

    The largest power of 2 in them goes into the scores, so that q * scale stays in range.
    """
    r = block * 8 + gl.arange(0, 8, layout=gl.SliceLayout(0, OPERAND_B))
    d = gl.arange(0, D, layout=gl.SliceLayout(1, OPERAND_B))
    q = gl.load(source + r[None, :] * D + d[:, None], mask=r[None, :] < rows, other=0.0)
    power = power_of_2(gl.max(gl.max(gl.abs(q.to(gl.float32)), 1), 0))
    return (q.to(gl.float32) * (LIFT / power)).to(q.dtype), power


@gluon.jit
def rotated(q, LIFT: gl.constexpr, D: gl.constexpr, BLOCK: gl.constexpr):
    """The inverse Hadamard map (`kivi.transforms`) of each block of channels of a query.

    Args:
        q: of `load_query`.
        LIFT: see there.
        D: head dimension.
        BLOCK: 32 or more channels.

    Returns:
        Operand B times LIFT over a power of 2, and that power.
    """
    N: gl.constexpr = D // 16
    signs = _signs(q.dtype)
    parts = _parts(q, N, 16)
    x = ()
    for i in gl.static_range(N):
        part = gl.convert_layout(parts[i], OPERAND_B, assert_trivial=True)
        x = x + (mma_v2(signs, part, gl.zeros([16, 8], gl.float32, layout=MMA)),)
    # 16 channels are done; the rest of a block is sums and differences of whole parts.
    for level in gl.static_range(4):
        if 16 * 2**level < BLOCK:
            y = ()
            for i in gl.static_range(N):
                if i // 2**level % 2 == 0:
                    y = y + (x[i] + x[i + 2**level],)
                else:
                    y = y + (x[i - 2**level] - x[i],)
            x = y
    top = gl.abs(x[0])
    for i in gl.static_range(1, N):
        top = gl.maximum(top, gl.abs(x[i]))
    power = power_of_2(gl.max(gl.max(top, 1), 0))
    tiles = ()
    for i in gl.static_range(N // 2):
        tile = gl.permute(gl.join(x[2 * i], x[2 * i + 1]), (2, 0, 1)).reshape([32, 8])
        tile = gl.convert_layout(tile, MMA, assert_trivial=True) * (LIFT / power)
        tiles = tiles + (transpose_blocks(tile.to(q.dtype)),)
    y = gl.convert_layout(_whole(tiles, 0, N // 2, 32), OPERAND_B, assert_trivial=True)
    return y, power * (2.0 ** -inverse_shift(BLOCK) / LIFT)
