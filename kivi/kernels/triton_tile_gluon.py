"""Tile helpers of the Gluon kernel: layouts, words to codes, copies into shared memory.

The one place with CUDA-only instructions: `and` and `shr` on two packed words at a time, and
`movmatrix`. A program is one warp.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

MMA = gl.constexpr(
    gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[1, 1], instr_shape=[16, 8])
)
OPERAND_A = gl.constexpr(gl.DotOperandLayout(operand_index=0, parent=MMA.value, k_width=2))
OPERAND_B = gl.constexpr(gl.DotOperandLayout(operand_index=1, parent=MMA.value, k_width=2))
PLAIN = gl.constexpr(gl.SwizzledSharedLayout(vec=1, per_phase=1, max_phase=1, order=[1, 0]))
COLUMNS = gl.constexpr(gl.SwizzledSharedLayout(vec=1, per_phase=1, max_phase=1, order=[0, 1]))
FLAT = gl.constexpr(gl.SwizzledSharedLayout(vec=1, per_phase=1, max_phase=1, order=[0]))
LANES_OF_ROWS = gl.constexpr(gl.BlockedLayout([1], [32], [1], [0]))
# Tokens by heads as operand B holds them, spelled out: what `transpose_blocks` ends in.
TOKENS = gl.constexpr(
    gl.DistributedLinearLayout(
        reg_bases=[[1, 0], [8, 0], [16, 0]],
        lane_bases=[[2, 0], [4, 0], [0, 1], [0, 2], [0, 4]],
        warp_bases=[],
        block_bases=[],
        shape=[32, 8],
    )
)


# Gluon is young: names that changed after Triton 3.6.
start_copy = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared
if hasattr(gl.shared_memory_descriptor, "reinterpret"):

    @gluon.jit
    def view_as(memory, dtype: gl.constexpr, shape: gl.constexpr, layout: gl.constexpr):
        """The same shared memory under another shape and layout."""
        return memory.reinterpret(dtype, shape, layout)

else:  # Triton 3.6

    @gluon.jit
    def view_as(memory, dtype: gl.constexpr, shape: gl.constexpr, layout: gl.constexpr):
        """The same shared memory under another shape and layout."""
        return memory._reinterpret(dtype, shape, layout)


@gluon.constexpr_function
def rows_layout(columns):
    """16 bytes a thread along rows of `columns` 16-bit elements."""
    threads = min(32, columns // 8)
    return gl.BlockedLayout([1, 8], [32 // threads, threads], [1, 1], [1, 0])


@gluon.constexpr_function
def swizzled(columns):
    """Shared rows that ldmatrix reads without bank conflicts."""
    phases = min(8, columns // 8)
    return gl.SwizzledSharedLayout(8, 8 // phases, phases, [1, 0])


@gluon.constexpr_function
def scales_layout(groups):
    """All groups' scales `[32, groups]` of the tokens that a thread of operand B holds."""
    bits = groups.bit_length() - 1
    return gl.DistributedLinearLayout(
        reg_bases=[[0, 1 << i] for i in range(bits)] + [[1, 0], [8, 0], [16, 0]],
        lane_bases=[[2, 0], [4, 0], [0, 0], [0, 0], [0, 0]],
        warp_bases=[],
        block_bases=[],
        shape=[32, groups],
    )


@gluon.constexpr_function
def direct_planes(bits):
    """Planes that are codes where they lie: below bit 8 both float16 and bfloat16 are linear."""
    return 8 // bits


@gluon.constexpr_function
def per_code(dtype, bits, plane, over):
    """1 over what bit-casting makes of code 1 in a plane below bit 8, and over `over`.

    Code 1 in plane 0 becomes the least subnormal. That power of 2 alone can be out of float32's
    range.
    """
    return 2.0 ** ((24 if dtype == gl.float16 else 133) - bits * plane) / over


@gluon.jit
def planes(words, bits: gl.constexpr, plane: gl.constexpr, dtype: gl.constexpr):
    """One plane's codes, masked in place and bit-cast: `code / per_code`, exactly."""
    mask: gl.constexpr = ((1 << bits) - 1) * (1 << (bits * plane)) * 65537
    codes = gl.inline_asm_elementwise(
        f"and.b32 $0, $1, {mask};", "=r,r", [words], dtype=gl.int16, is_pure=True, pack=2
    )
    return codes.to(dtype, bitcast=True)


@gluon.jit
def product_error(a, b, product):
    """`a * b - product`; spelled out, since elsewhere negating costs an instruction."""
    kind: gl.constexpr = "f16x2" if a.dtype == gl.float16 else "bf16x2"
    return gl.inline_asm_elementwise(
        f"{{ .reg .b32 t; neg.{kind} t, $3; fma.rn.{kind} $0, $1, $2, t; }}",
        "=r,r,r,r",
        [a, b, product],
        dtype=a.dtype,
        is_pure=True,
        pack=2,
    )


@gluon.jit
def upper_byte(words):
    """Words with the planes above bit 8 moved down; what comes from the neighbour is masked out."""
    return gl.inline_asm_elementwise(
        "shr.u32 $0, $1, 8;", "=r,r", [words], dtype=gl.int16, is_pure=True, pack=2
    )


@gluon.jit
def move_down(words, count):
    """Words shifted right by `count` bits, known at run time."""
    return gl.inline_asm_elementwise(
        "shr.u32 $0, $1, $2;", "=r,r,r,r", [words, count], dtype=gl.int16, is_pure=True, pack=2
    )


@gluon.jit
def transpose_blocks(p):
    """`[32 tokens, 8 heads]` from the layout of an MMA's result to that of its operand B."""
    x = gl.inline_asm_elementwise(
        "movmatrix.sync.aligned.m8n8.trans.b16 $0, $1;",
        "=r,r",
        [p.to(gl.int16, bitcast=True)],
        dtype=gl.int16,
        is_pure=True,
        pack=2,
    )
    # Every 8 x 8 block is transposed now; naming its axes anew moves nothing.
    x = gl.permute(x.reshape([4, 8, 8]), (0, 2, 1)).reshape([32, 8])
    return gl.convert_layout(x, TOKENS, assert_trivial=True).to(p.dtype, bitcast=True)


@gluon.jit
def heads_as_rows(p):
    """`[32 tokens, 8 heads]` as operand A `[16, 32]` whose last 8 rows are 0; moves nothing."""
    x = gl.permute(p, (1, 0))
    x = gl.permute(gl.join(x, gl.zeros_like(x)), (2, 0, 1)).reshape([16, 32])
    return gl.convert_layout(x, OPERAND_A, assert_trivial=True)


@gluon.constexpr_function
def group_rows_layout(groups, columns):
    """`[groups, columns]` as the first 8 rows of operand A, repeated where there are fewer."""
    bits = groups.bit_length() - 1
    rows = [[0, 1 << i, 0] for i in range(bits)] + [[1 << i, 0, 0] for i in range(3 - bits)]
    width = columns.bit_length() - 1
    return gl.DistributedLinearLayout(
        reg_bases=[[0, 0, 1]] + [[0, 0, 1 << i] for i in range(3, width)],
        lane_bases=[[0, 0, 2], [0, 0, 4]] + rows,
        warp_bases=[],
        block_bases=[],
        shape=[8 // groups, groups, columns],
    )


@gluon.jit
def _eight_rows(memory, groups: gl.constexpr, columns: gl.constexpr, dtype: gl.constexpr):
    layout: gl.constexpr = group_rows_layout(groups, columns)
    x = view_as(memory, dtype, [groups, columns], PLAIN).load(gl.SliceLayout(0, layout))
    every = gl.zeros([8 // groups, groups, columns], dtype, layout=layout)
    x, _ = gl.broadcast(x[None, :, :], every)
    return x.reshape([8, columns])


@gluon.jit
def group_rows(upper, lower, groups: gl.constexpr, columns: gl.constexpr, dtype: gl.constexpr):
    """`[groups, columns]` twice as operand A: row r and row 8 + r are of group r % groups."""
    x = _eight_rows(upper, groups, columns, dtype)
    y = _eight_rows(lower, groups, columns, dtype)
    x = gl.permute(gl.join(x, y), (2, 0, 1)).reshape([16, columns])
    return gl.convert_layout(x, OPERAND_A, assert_trivial=True)


@gluon.jit
def halves(x):
    """The first and the last 8 rows of a result `[16, 8]`."""
    return gl.split(gl.permute(x.reshape([2, 8, 8]), (1, 2, 0)))


@gluon.jit
def row_of(x, row: gl.constexpr, different: gl.constexpr):
    """`[8, 8]`, half of a result, with this row everywhere; only `different` rows differ."""
    if different == 1:
        return x
    else:
        return gl.inline_asm_elementwise(
            "{ .reg .b32 lane; mov.u32 lane, %laneid; and.b32 lane, lane, 3; "
            f"or.b32 lane, lane, {4 * row}; shfl.sync.idx.b32 $0, $1, lane, 31, -1; }}",
            "=r,r",
            [x],
            dtype=gl.float32,
            is_pure=True,
            pack=1,
        )


@gluon.jit
def in_every_row(x):
    """`[8, 8]` of equal rows, half of a result, as a result `[32, 8]`."""
    x = gl.join(x, x)
    x = gl.permute(gl.join(x, x), (2, 3, 0, 1)).reshape([32, 8])
    return gl.convert_layout(x, MMA, assert_trivial=True)


@gluon.jit
def columns(x, n: gl.constexpr):
    """The n columns of `[32, n]`, each `[32]` as rows of TOKENS."""
    if n == 1:
        return (gl.convert_layout(x.reshape([32]), gl.SliceLayout(1, TOKENS), assert_trivial=True),)
    elif n == 2:
        a, b = gl.split(x)
        return (
            gl.convert_layout(a, gl.SliceLayout(1, TOKENS), assert_trivial=True),
            gl.convert_layout(b, gl.SliceLayout(1, TOKENS), assert_trivial=True),
        )
    else:
        a, b = gl.split(x.reshape([32, n // 2, 2]))
        even = columns(a, n // 2)
        odd = columns(b, n // 2)
        both = ()
        for i in gl.static_range(n // 2):
            both = both + (even[i], odd[i])
        return both


@gluon.jit
def copy_rows(target, source, rows: gl.constexpr, cols: gl.constexpr, stride):
    """Start copying `[rows, cols]` 16-bit elements with row stride `stride` into shared memory."""
    layout: gl.constexpr = rows_layout(cols)
    r = gl.arange(0, rows, layout=gl.SliceLayout(1, layout))
    c = gl.arange(0, cols, layout=gl.SliceLayout(0, layout))
    start_copy(target, source + r[:, None] * stride + c[None, :])


@gluon.jit
def copy_groups(target, source, rows: gl.constexpr, cols: gl.constexpr, stride, last):
    """Row r comes from row `min(r, last)`: nothing past the last valid one is read."""
    layout: gl.constexpr = rows_layout(cols)
    r = gl.arange(0, rows, layout=gl.SliceLayout(1, layout))
    c = gl.arange(0, cols, layout=gl.SliceLayout(0, layout))
    r = gl.minimum(r, last)
    start_copy(target, source + r[:, None] * stride + c[None, :])


@gluon.jit
def exact_rows(first, start, tokens, packed, ring, sinks):
    """The slots of 32 exact tokens from the first-th on, -1 past their end: a token a lane.

    `start`: the slot of the ring, or what would be it before slot 0, of the first one.
    """
    lane = gl.arange(0, 32, layout=LANES_OF_ROWS)
    i = first + lane
    slot = start + lane
    slot = gl.where(i < sinks, i, sinks + gl.where(slot < ring, slot, slot - ring))
    return gl.where(gl.where(i < sinks, i, packed + i) < tokens, slot, -1)


@gluon.jit
def copy_exact(target, source, slots, cols: gl.constexpr, stride: gl.constexpr):
    """Dense rows from 32 slots. Rows that are not part of the sequence (-1) become 0."""
    layout: gl.constexpr = rows_layout(cols)
    slots = gl.convert_layout(slots, gl.SliceLayout(1, layout))
    c = gl.arange(0, cols, layout=gl.SliceLayout(0, layout))
    source = source.to(gl.pointer_type(gl.int16), bitcast=True)
    at = slots[:, None] * stride + c[None, :]
    start_copy(target, source + at, mask=(slots >= 0)[:, None])


@gluon.jit
def copy_zeros(target, source, tokens: gl.constexpr, groups: gl.constexpr, last):
    """Zeros `[tokens, groups]`, beside a column of ones in rows of 8."""
    layout: gl.constexpr = gl.BlockedLayout([1, groups], [32, 1], [1, 1], [1, 0])
    r = gl.arange(0, tokens, layout=gl.SliceLayout(1, layout))
    c = gl.arange(0, groups, layout=gl.SliceLayout(0, layout))
    r = gl.minimum(r, last * 32 + 31)
    rows = view_as(target, target.dtype, [tokens, 8], PLAIN).slice(0, groups, dim=1)
    start_copy(rows, source + r[:, None] * groups + c[None, :])
