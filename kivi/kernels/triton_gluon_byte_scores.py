"""Scores of a step on 8-bit tensor cores, of a piece of the channels: see triton_gluon_bytes.py."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from kivi.kernels.triton_gluon_byte_steps import (
    all_planes,
    by_plane,
    sum_of_query,
    to_whole_query,
)
from kivi.kernels.triton_gluon_steps import cap
from kivi.kernels.triton_tile_bytes import codes_of, offset, operand, products, whole_product
from kivi.kernels.triton_tile_gluon import MMA, group_rows, halves, row_of
from kivi.kernels.triton_tile_heads import (
    LANES,
    across,
    fold_sum,
    group_numbers,
    plane_numbers,
    plane_of_slot,
    row_halves,
    row_numbers,
    split_groups,
    sum_of_rows,
)


@gluon.jit
def scores_by_channel(
    q, own_q, q_unit, unit_score, shift, before, codes, k_scale, k_zero, softcap,
    D: gl.constexpr, KB: gl.constexpr, KG: gl.constexpr, K_ZERO: gl.constexpr, NP: gl.constexpr,
    FIRST: gl.constexpr, LAST: gl.constexpr,
):  # fmt: skip
    """Scores of a step's tokens, `[4, 8, 4]` for each plane, less `shift`: keys per channel.

    Of a piece of D channels, added to those `before` where it is not the FIRST.
    """
    GROUPS: gl.constexpr = (32 * NP + KG - 1) // KG
    if GROUPS == 1:
        zq = sum_of_rows(fold_sum(own_q * row_numbers(k_zero.index(0), D))) * (q_unit * K_ZERO)
    else:
        meta = group_rows(k_zero, k_zero, GROUPS, D, q.dtype)
        zq = mma_v2(meta, q, gl.zeros([16, 8], gl.float32, layout=MMA))
        zq, _odd = gl.split(halves(zq)[0].reshape([8, 4, 2]))
        zq = gl.convert_layout(zq, LANES, assert_trivial=True) * (unit_score * K_ZERO)
    # The query times the scales, in 16 bits of the largest of all groups.
    scale = row_halves(k_scale.index(0), D)
    for g in gl.static_range(1, GROUPS):
        scale = gl.maximum(scale, row_halves(k_scale.index(g), D))
    _up, down = to_whole_query((own_q * scale.to(gl.float32),))
    to_whole, unit = across(offset(down), D), down * q_unit
    s = ()
    for i in gl.static_range(NP):
        if (i * 32) % KG == 0:
            qs = operand(own_q * row_numbers(k_scale.index(i * 32 // KG), D) + to_whole, D)
            bias = row_of(zq, i * 32 // KG, GROUPS)
            if FIRST and softcap is None:
                bias -= shift
        x = whole_product(codes_of(codes, KB, i), qs, 32)
        own = bias
        if KB * (i + 1) == 8:
            own += sum_of_query(qs, D) * unit * (128.0 / 2.0 ** (KB * i))
        x = x * across(unit * (1.0 / 2.0 ** (KB * i)), 32) + across(own, 32)
        if not FIRST:
            x += before[i]
        if LAST and softcap is not None:
            x = cap(x, softcap) - across(shift, 32)
        s = s + (x,)
    return s


@gluon.jit
def scores_by_token(
    own_q, qs, unit, sum_of_q, shift, before, codes, k_scale, k_center, softcap,
    D: gl.constexpr, KB: gl.constexpr, CENTER: gl.constexpr, K_ZERO: gl.constexpr,
    NP: gl.constexpr, FIRST: gl.constexpr, LAST: gl.constexpr,
):  # fmt: skip
    """As `scores_by_channel`: keys per token, code K_ZERO is 0, around a mean of CENTER tokens.

    What is not the LAST is sums of products. own_q and k_center are all pieces.
    """
    s = ()
    for i in gl.static_range(NP):
        if LAST and (i == 0 or (CENTER > 0 and (i * 32) % max(CENTER, 1) == 0)):
            bias = gl.zeros([8, 4], gl.float32, layout=LANES)
            if CENTER > 0:
                x = products(own_q[0], row_numbers(k_center[0].index(i * 32 // CENTER), D))
                total = fold_sum(x)
                for c in gl.static_range(1, len(own_q)):
                    x = products(own_q[c], row_numbers(k_center[c].index(i * 32 // CENTER), D))
                    total += fold_sum(x)
                bias = sum_of_rows(total) * unit
            if softcap is None:
                bias -= shift
        x = whole_product(codes_of(codes, KB, i), qs, 32)
        if not FIRST:
            x += before[i]
        if LAST:
            own = sum_of_q * -K_ZERO
            if KB * (i + 1) == 8:
                own += sum_of_q * (128.0 / 2.0 ** (KB * i))
            x = x * (1.0 / 2.0 ** (KB * i)) + across(own, 32)
            x = x * (row_numbers(k_scale.index(i), 32) * across(unit, 32)) + across(bias, 32)
            if softcap is not None:
                x = cap(x, softcap) - across(shift, 32)
        s = s + (x,)
    return s


@gluon.jit
def scores_by_channel_together(
    own_q, q_unit, shift, before, codes, k_scale, k_zero, softcap,
    D: gl.constexpr, KB: gl.constexpr, KG: gl.constexpr, K_ZERO: gl.constexpr, NP: gl.constexpr,
    FIRST: gl.constexpr, LAST: gl.constexpr,
):  # fmt: skip
    """As `scores_by_channel`, a plane a slot."""
    GROUPS: gl.constexpr = (32 * NP + KG - 1) // KG
    zq = fold_sum(own_q * group_numbers(k_zero, NP, GROUPS, D))
    bias = sum_of_rows(zq) * (q_unit * K_ZERO)
    x = own_q * group_numbers(k_scale, NP, GROUPS, D)
    _up, down = to_whole_query((x,))
    qs, unit = operand(x + across(offset(down), D), D), down * q_unit
    top = sum_of_query(qs, D) * (128.0 / 2.0 ** (KB * (NP - 1)))
    bias += gl.where(plane_of_slot(NP) == NP - 1, top, 0.0) * unit
    if FIRST and softcap is None:
        bias -= shift
    x = all_planes(codes, qs, KB, NP) * across(unit * by_plane(2.0, -KB, 8, NP), 32)
    x += across(bias, 32)
    if not FIRST:
        x += before[0]
    if LAST and softcap is not None:
        x = cap(x, softcap) - across(shift, 32)
    return (x,)


@gluon.jit
def scores_by_token_together(
    own_q, qs, unit, sum_of_q, shift, before, codes, k_scale, k_center, softcap,
    D: gl.constexpr, KB: gl.constexpr, CENTER: gl.constexpr, K_ZERO: gl.constexpr,
    NP: gl.constexpr, FIRST: gl.constexpr, LAST: gl.constexpr,
):  # fmt: skip
    """As `scores_by_token`, a plane a slot."""
    if not LAST:
        x = all_planes(codes, qs, KB, NP)
        if not FIRST:
            x += before[0]
        return (x,)
    bias = gl.zeros([8, 4], gl.float32, layout=LANES)
    if CENTER > 0:
        COUNT: gl.constexpr = (NP * 32 + CENTER - 1) // CENTER
        total = fold_sum(products(own_q[0], group_numbers(k_center[0], NP, COUNT, D)))
        for c in gl.static_range(1, len(own_q)):
            total += fold_sum(products(own_q[c], group_numbers(k_center[c], NP, COUNT, D)))
        bias = sum_of_rows(total) * unit
    if softcap is None:
        bias -= shift
    top = gl.where(plane_of_slot(NP) == NP - 1, 128.0 / 2.0 ** (KB * (NP - 1)), 0.0)
    own = sum_of_q * (top - K_ZERO)
    x = all_planes(codes, qs, KB, NP)
    if not FIRST:
        x += before[0]
    x = x * across(by_plane(2.0, -KB, 8, NP), 32) + across(own, 32)
    scales = split_groups(plane_numbers(k_scale, NP, 1, 0, 1), 1, 4)[0].to(gl.float32)
    x = x * (scales * across(unit, 32)) + across(bias, 32)
    if softcap is not None:
        x = cap(x, softcap) - across(shift, 32)
    return (x,)
