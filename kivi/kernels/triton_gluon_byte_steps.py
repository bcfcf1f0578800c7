"""What a step on 8-bit tensor cores is made of: see triton_gluon_bytes.py."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from kivi.kernels.triton_gluon_steps import NOTHING
from kivi.kernels.triton_tile_bytes import (
    BYTES_A,
    BYTES_B,
    WHOLE_BITS,
    bytes_of,
    codes_of,
    half_down,
    kept,
    mean_code,
    offset,
    operand,
    whole,
    whole_product,
)
from kivi.kernels.triton_tile_gluon import MMA, OPERAND_A
from kivi.kernels.triton_tile_heads import (
    LANES,
    across,
    fold_max,
    fold_sum,
    group_numbers,
    is_any,
    largest_plane,
    largest_row,
    plane_of_slot,
    row_numbers,
    rows_of_heads,
    sum_of_rows,
    to_largest,
)
from kivi.kernels.triton_tile_rotate import channels_of_heads


@gluon.jit
def own_query(source, block, rows, PLANES: gl.constexpr, D: gl.constexpr):
    """4 queries, or one for PLANES slots, as `[D / 8, 8, 4]` float32."""
    layout: gl.constexpr = rows_of_heads(D)
    r = gl.arange(0, D // 8, layout=gl.SliceLayout(1, gl.SliceLayout(2, layout)))
    g = gl.arange(0, 8, layout=gl.SliceLayout(0, gl.SliceLayout(2, layout)))
    h = gl.arange(0, 4, layout=gl.SliceLayout(0, gl.SliceLayout(1, layout)))
    head = (block * (4 // PLANES) + h // PLANES)[None, None, :]
    d = r[:, None, None] * 8 + g[None, :, None]
    return gl.load(source + head * D + d, mask=head < rows, other=0.0).to(gl.float32)


@gluon.jit
def query_to_rotate(source, block, rows, PLANES: gl.constexpr, D: gl.constexpr):
    """The queries of `own_query` as `[4, D]`, in their dtype."""
    layout: gl.constexpr = channels_of_heads(D)
    h = gl.arange(0, 4, layout=gl.SliceLayout(1, layout))
    d = gl.arange(0, D, layout=gl.SliceLayout(0, layout))
    head = (block * (4 // PLANES) + h // PLANES)[:, None]
    return gl.load(source + head * D + d[None, :], mask=head < rows, other=0.0)


@gluon.jit
def factors_to_rotate(source, D: gl.constexpr):
    """`[D]` float32 as `[1, D]`, to go with `query_to_rotate`."""
    d = gl.arange(0, D, layout=gl.SliceLayout(0, channels_of_heads(D)))
    return gl.load(source + d)[None, :]


@gluon.jit
def channel_numbers(source, D: gl.constexpr):
    """`[D]` float32 as `[D / 8, 8, 1]`."""
    layout: gl.constexpr = rows_of_heads(D)
    r = gl.arange(0, D // 8, layout=gl.SliceLayout(1, gl.SliceLayout(2, layout)))
    g = gl.arange(0, 8, layout=gl.SliceLayout(0, gl.SliceLayout(2, layout)))
    return gl.load(source + r[:, None] * 8 + g[None, :])[:, :, None]


@gluon.jit
def weigh_values(
    acc, p, scales, top, masks, v_words, upper,
    VB: gl.constexpr, VG: gl.constexpr, NP: gl.constexpr, TOGETHER: gl.constexpr,
):  # fmt: skip
    """`acc`, a group of channels each, with a step's values times `p` times their scales.

    `top [8, 4]` is the largest of each head's `p * scales`; `upper`: which byte of the words. The
    mean code counts as 0, and what its part would be is left to the caller, who knows it from
    probabilities that were not rounded: the small ones among them all round to 0.
    """
    NG: gl.constexpr = len(acc)
    _up, down = to_largest(top)
    operands = ()
    for i in gl.static_range(len(p)):
        weight = by_plane(2.0, VB, 4, NP) if TOGETHER else 2.0 ** (VB * i % 4)
        to_whole = across(offset(down * weight), 32)
        for g in gl.static_range(NG):
            operands = operands + (operand(p[i] * scales[i][g].to(gl.float32) + to_whole, 32),)
    out = ()
    for g in gl.static_range(NG):
        lower_half = bytes_of(v_words.index(g).permute((1, 0)).load(OPERAND_A), upper, VG, 32)
        upper_half = half_down(lower_half)
        x = gl.full([VG, 8], WHOLE_BITS, gl.int32, layout=MMA)
        ones = gl.full([16, 8], WHOLE_BITS, gl.int32, layout=MMA)
        for i in gl.static_range(NP):
            source = lower_half if VB * i < 4 else upper_half
            weights = kept(operands[g], masks[i]) if TOGETHER else operands[i * NG + g]
            x = mma_v2(codes_of(source, VB, i % (4 // VB)), weights, x)
            one = gl.full([16, 32], 2 ** (VB * i % 4), gl.int8, layout=BYTES_A)
            ones = mma_v2(one, weights, ones)
        mean = fold_max(whole(ones, 16)) * -mean_code(VB)
        out = out + (acc[g] + (whole(x, VG) + across(mean, VG)) * across(down, VG),)
    return out


@gluon.constexpr_function
def power(base, step, i, period):
    """`base ** (step * i)`, with `step * i` modulo the period."""
    exponent = abs(step) * i % period
    return base**exponent if step > 0 else base**-exponent


@gluon.jit
def by_plane(base: gl.constexpr, step: gl.constexpr, period: gl.constexpr, NP: gl.constexpr):
    """`[8, 4]`: in the slot of plane i, base ** (step * i), with `step * i` modulo the period."""
    plane = plane_of_slot(NP)
    x = gl.full([8, 4], 1.0, gl.float32, layout=LANES)
    for i in gl.static_range(1, NP):
        x = gl.where(plane == i, power(base, step, i, period), x)
    return x


@gluon.jit
def plane_masks(NP: gl.constexpr):
    """For each plane, the columns of operand B that are its slot's."""
    column = gl.arange(0, 8, layout=gl.SliceLayout(0, BYTES_B))
    every = gl.full([32, 8], -1, gl.int8, layout=BYTES_B)
    masks = ()
    for i in gl.static_range(NP):
        masks = masks + (gl.where((column // 2 % NP == i)[None, :], every, 0),)
    return masks


@gluon.jit
def all_planes(codes, qs, KB: gl.constexpr, NP: gl.constexpr):
    """Products of all planes' codes and queries that have a slot a plane, `[4, 8, 4]`."""
    plane = plane_of_slot(NP)
    x = whole_product(codes_of(codes, KB, 0), qs, 32)
    for i in gl.static_range(1, NP):
        own = whole_product(codes_of(codes, KB, i), qs, 32)
        x = gl.where(across((plane == i).to(gl.int32), 32) != 0, own, x)
    return x


@gluon.jit
def to_whole_query(x):
    """The power of 2 that brings queries, pieces of channels, close to LARGEST, and its inverse."""
    top = fold_max(gl.abs(x[0]))
    for c in gl.static_range(1, len(x)):
        top = gl.maximum(top, fold_max(gl.abs(x[c])))
    return to_largest(largest_row(top))


@gluon.jit
def sum_of_query(q, D: gl.constexpr):
    """Sums `[8, 4]` of an operand B of D channels."""
    one = gl.full([16, D], 1, gl.int8, layout=BYTES_A)
    return fold_max(whole_product(one, q, 16))


@gluon.jit
def add_centers(
    acc, p, centers, D: gl.constexpr, CENTER: gl.constexpr, NP: gl.constexpr, TOGETHER: gl.constexpr
):
    """`acc`, of D channels, with the means of CENTER tokens each, times their probabilities."""
    x = acc[0]
    if TOGETHER:
        count: gl.constexpr = (NP * 32 + CENTER - 1) // CENTER
        mass = sum_of_rows(fold_sum(p[0]))
        x += across(mass, D) * group_numbers(centers, NP, count, D)
    else:
        PLANES: gl.constexpr = min(CENTER // 32, NP)  # of a center in a step
        for c in gl.static_range(NP // PLANES):
            mass = fold_sum(p[c * PLANES])
            for i in gl.static_range(1, PLANES):
                mass += fold_sum(p[c * PLANES + i])
            x += across(sum_of_rows(mass), D) * row_numbers(centers.index(c), D)
    return (x,)


@gluon.jit
def too_large(s):
    """The largest of each lane's scores `[8, 4]`, and whether any is far above 0."""
    over = fold_max(s[0])
    for i in gl.static_range(1, len(s)):
        over = gl.maximum(over, fold_max(s[i]))
    return over, is_any(over > 60.0)


@gluon.jit
def follow(over, is_first, s, shift, sums, acc, PLANES: gl.constexpr):
    """Make the scores' maximum their reference: `s`, `shift` and what was summed by it."""
    over = largest_plane(largest_row(over), PLANES)
    over = gl.maximum(over, gl.where(is_first, NOTHING, 0.0))
    alpha = gl.exp2(gl.minimum(-over, 0.0))
    lower = ()
    for i in gl.static_range(len(s)):
        lower = lower + (s[i] - across(over, 32),)
    scaled_sums = ()
    for i in gl.static_range(len(sums)):
        scaled_sums = scaled_sums + (sums[i] * alpha,)
    scaled = ()
    for g in gl.static_range(len(acc)):
        scaled = scaled + (acc[g] * across(alpha, 8 * acc[g].shape[0]),)
    return lower, shift + over, scaled_sums, scaled
