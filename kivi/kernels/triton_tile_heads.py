"""Tile helpers of the 8-bit tensor-core path: numbers of heads between the MMAs.

`[R, 8, 4]`: row `8 r + g` of head h is in lane `4 g + h`, as `triton_tile_bytes.whole` has results.
Where there are fewer heads than 4, a head has a *slot* for each plane. A program is one warp.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from kivi.kernels.triton_tile_gluon import MMA, PLAIN, view_as

_LANES = [[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]]
# A number a lane, `[8, 4]`.
LANES = gl.constexpr(
    gl.DistributedLinearLayout(
        reg_bases=[], lane_bases=_LANES, warp_bases=[], block_bases=[], shape=[8, 4]
    )
)
PLAIN3 = gl.constexpr(gl.SwizzledSharedLayout(vec=1, per_phase=1, max_phase=1, order=[2, 1, 0]))
PLAIN4 = gl.constexpr(gl.SwizzledSharedLayout(vec=1, per_phase=1, max_phase=1, order=[3, 2, 1, 0]))
# Largest magnitude of a number that rounds to two signed bytes.
LARGEST = gl.constexpr(32600.0)


@gluon.constexpr_function
def rows_of_heads(rows):
    """`[rows / 8, 8, 4]`: numbers of 4 heads for `rows` rows."""
    bits = (rows // 8).bit_length() - 1
    return gl.DistributedLinearLayout(
        reg_bases=[[1 << i, 0, 0] for i in range(bits)],
        lane_bases=[[0, *x] for x in _LANES],
        warp_bases=[],
        block_bases=[],
        shape=[rows // 8, 8, 4],
    )


@gluon.constexpr_function
def planes_of_rows(planes, groups):
    """`[4 / planes, planes, 4, 8, groups]`: numbers of 32 rows in each plane, a plane a slot."""
    bits, width = planes.bit_length() - 1, groups.bit_length() - 1
    slots = [[0, 1 << i, 0, 0, 0] for i in range(bits)]
    slots += [[1 << i, 0, 0, 0, 0] for i in range(2 - bits)]
    return gl.DistributedLinearLayout(
        reg_bases=[[0, 0, 0, 0, 1 << i] for i in range(width)] + [[0, 0, 1, 0, 0], [0, 0, 2, 0, 0]],
        lane_bases=slots + [[0, 0, 0, 1 << i, 0] for i in range(3)],
        warp_bases=[],
        block_bases=[],
        shape=[4 // planes, planes, 4, 8, groups],
    )


@gluon.constexpr_function
def groups_of_planes(planes, groups, rows):
    """`[4 / planes, planes / groups, groups, rows / 8, 8]`: numbers of rows for each plane's group.

    A plane a slot, the first `planes / groups` of them in the first group.
    """
    inner, bits = (planes // groups).bit_length() - 1, groups.bit_length() - 1
    slots = [[0, 1 << i, 0, 0, 0] for i in range(inner)]
    slots += [[0, 0, 1 << i, 0, 0] for i in range(bits)]
    slots += [[1 << i, 0, 0, 0, 0] for i in range(2 - inner - bits)]
    return gl.DistributedLinearLayout(
        reg_bases=[[0, 0, 0, 1 << i, 0] for i in range((rows // 8).bit_length() - 1)],
        lane_bases=slots + [[0, 0, 0, 0, 1 << i] for i in range(3)],
        warp_bases=[],
        block_bases=[],
        shape=[4 // planes, planes // groups, groups, rows // 8, 8],
    )


@gluon.constexpr_function
def groups_of_rows(groups):
    """`[4, 8, groups]`: numbers of 32 rows, alike for all heads."""
    bits = groups.bit_length() - 1
    return gl.DistributedLinearLayout(
        reg_bases=[[0, 0, 1 << i] for i in range(bits)] + [[1, 0, 0], [2, 0, 0]],
        lane_bases=[[0, 0, 0], [0, 0, 0], [0, 1, 0], [0, 2, 0], [0, 4, 0]],
        warp_bases=[],
        block_bases=[],
        shape=[4, 8, groups],
    )


@gluon.jit
def exchanged(x, lanes: gl.constexpr):
    """The numbers of the lanes whose index differs in these bits."""
    return gl.inline_asm_elementwise(
        f"shfl.sync.bfly.b32 $0, $1, {lanes}, 31, -1;",
        "=r,r",
        [x],
        dtype=gl.float32,
        is_pure=True,
        pack=1,
    )


@gluon.jit
def across(x, rows: gl.constexpr):
    """`[8, 4]` to go with `[rows / 8, 8, 4]`."""
    to: gl.constexpr = gl.SliceLayout(0, rows_of_heads(rows))
    return gl.convert_layout(x, to, assert_trivial=True)[None, :, :]


@gluon.jit
def fold_max(x):
    """The largest of `[R, 8, 4]` over R."""
    return gl.convert_layout(gl.max(x, 0), LANES, assert_trivial=True)


@gluon.jit
def fold_sum(x):
    """The sum of `[R, 8, 4]` over R."""
    return gl.convert_layout(gl.sum(x, 0), LANES, assert_trivial=True)


@gluon.jit
def largest_row(x):
    """The largest of `[8, 4]` over rows, in every row."""
    x = gl.maximum(x, exchanged(x, 4))
    x = gl.maximum(x, exchanged(x, 8))
    return gl.maximum(x, exchanged(x, 16))


@gluon.jit
def largest_plane(x, NP: gl.constexpr):
    """The largest of `[8, 4]` over slots of planes, in each of them."""
    if NP > 1:
        x = gl.maximum(x, exchanged(x, 1))
    if NP > 2:
        x = gl.maximum(x, exchanged(x, 2))
    return x


@gluon.jit
def sum_of_planes(x, NP: gl.constexpr):
    """The sum over slots of planes, the last axis, in each of them."""
    if NP > 1:
        x += exchanged(x, 1)
    if NP > 2:
        x += exchanged(x, 2)
    return x


@gluon.jit
def plane_of_slot(NP: gl.constexpr):
    """`[8, 4]`: the plane of each slot."""
    h = gl.arange(0, 4, layout=gl.SliceLayout(0, LANES))
    return (h % NP)[None, :] + gl.zeros([8, 4], gl.int32, layout=LANES)


@gluon.jit
def sum_of_rows(x):
    """The sum of `[8, 4]` over rows, in every row."""
    x += exchanged(x, 4)
    x += exchanged(x, 8)
    return x + exchanged(x, 16)


@gluon.jit
def to_largest(x):
    """A power of 2 that brings numbers of magnitude `x` close to LARGEST, and its inverse."""
    exponent = gl.maximum(x * (32768.0 / LARGEST), 1e-30).to(gl.int32, bitcast=True) >> 23
    up = (268 - exponent) << 23
    down = (254 << 23) - up
    return up.to(gl.float32, bitcast=True), down.to(gl.float32, bitcast=True)


@gluon.jit
def is_any(x):
    """Whether a condition `[8, 4]` holds anywhere: a scalar."""
    return gl.max(x.to(gl.int32).reshape([32]), 0) != 0


@gluon.jit
def row_halves(memory, rows: gl.constexpr):
    """Shared 16-bit numbers of `rows` rows, alike for all heads: `[rows / 8, 8, 1]`."""
    from_memory = view_as(memory, memory.dtype, [rows // 8, 8], PLAIN)
    return from_memory.load(gl.SliceLayout(2, rows_of_heads(rows)))[:, :, None]


@gluon.jit
def row_numbers(memory, rows: gl.constexpr):
    """`row_halves` as float32."""
    return row_halves(memory, rows).to(gl.float32)


@gluon.jit
def one_plane(memory, NG: gl.constexpr, first: gl.constexpr, n: gl.constexpr):
    """Columns `first` to `first + n` of shared `[32, NG]` as `[4, 8, n]`."""
    x = view_as(memory, memory.dtype, [4, 8, NG], PLAIN3)
    if n < NG:
        x = x.slice(first, n, dim=2)
    return x.load(groups_of_rows(n))


@gluon.jit
def plane_numbers(memory, NP: gl.constexpr, NG: gl.constexpr, first: gl.constexpr, n: gl.constexpr):
    """Columns of shared `[NP, 32, NG]` as `[4, 8, 4, n]`: in each slot its plane's."""
    layout: gl.constexpr = planes_of_rows(NP, n)
    x = view_as(memory, memory.dtype, [NP, 4, 8, NG], PLAIN4)
    if n < NG:
        x = x.slice(first, n, dim=3)
    x = x.load(gl.SliceLayout(0, layout))
    every = gl.zeros([4 // NP, NP, 4, 8, n], memory.dtype, layout=layout)
    x, _every = gl.broadcast(x[None, :, :, :, :], every)
    return gl.permute(x, (2, 3, 0, 1, 4)).reshape([4, 8, 4, n])


@gluon.jit
def pieces(x, D: gl.constexpr, n: gl.constexpr):
    """`[D / 8, 8, 4]` as n (1 or 2) pieces of rows."""
    if n == 1:
        return (x,)
    else:
        a, b = gl.split(gl.permute(x.reshape([2, D // 16, 8, 4]), (1, 2, 3, 0)))
        layout: gl.constexpr = rows_of_heads(D // 2)
        a = gl.convert_layout(a, layout, assert_trivial=True)
        return (a, gl.convert_layout(b, layout, assert_trivial=True))


@gluon.jit
def group_numbers(memory, NP: gl.constexpr, GROUPS: gl.constexpr, rows: gl.constexpr):
    """Shared `[GROUPS, rows]` as `[rows / 8, 8, 4]` float32: in each slot its plane's group's."""
    layout: gl.constexpr = groups_of_planes(NP, GROUPS, rows)
    own: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, layout))
    x = view_as(memory, memory.dtype, [GROUPS, rows // 8, 8], PLAIN3).load(own)
    shape: gl.constexpr = [4 // NP, NP // GROUPS, GROUPS, rows // 8, 8]
    x, _every = gl.broadcast(x[None, None, :, :, :], gl.zeros(shape, memory.dtype, layout=layout))
    x = gl.permute(x, (3, 4, 0, 2, 1)).reshape([rows // 8, 8, 4])
    return gl.convert_layout(x, rows_of_heads(rows), assert_trivial=True).to(gl.float32)


@gluon.jit
def split_groups(x, n: gl.constexpr, SLOTS: gl.constexpr):
    """The n columns of `[4, 8, SLOTS (4 or 1), n]`, each `[4, 8, SLOTS]`."""
    if n == 1:
        if SLOTS == 4:
            x = gl.convert_layout(x.reshape([4, 8, 4]), rows_of_heads(32), assert_trivial=True)
        else:
            to: gl.constexpr = gl.SliceLayout(2, rows_of_heads(32))
            x = gl.convert_layout(x.reshape([4, 8]), to, assert_trivial=True)[:, :, None]
        return (x,)
    else:
        a, b = gl.split(x.reshape([4, 8, SLOTS, n // 2, 2]))
        even = split_groups(a, n // 2, SLOTS)
        odd = split_groups(b, n // 2, SLOTS)
        both = ()
        for i in gl.static_range(n // 2):
            both = both + (even[i], odd[i])
        return both


@gluon.jit
def spread(x, other, rows: gl.constexpr):
    """`[rows / 8, 8, 4]` as a result `[rows, 8]`: columns of the heads, `other` between them."""
    y = gl.join(x, other).reshape([rows, 8])
    return gl.convert_layout(y, MMA, assert_trivial=True)


@gluon.jit
def _either(a, b):
    return a


@gluon.jit
def spread_row(x, other):
    """`[8, 4]` of equal rows as a row `[8]` of a result: heads, `other` between them."""
    y = gl.reduce(gl.join(x, gl.full_like(x, other)).reshape([8, 8]), 0, _either)
    return gl.convert_layout(y, gl.SliceLayout(0, MMA), assert_trivial=True)
