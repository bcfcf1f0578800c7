"""The Gluon kernel's part over packed tokens, on 8-bit tensor cores: at most 4 queries, 2 or 4 bits.

Half of the instructions of the 16-bit part: a register holds four codes instead of two, to be
masked at once and multiplied at once. The query times a group's scales, and probabilities times the
values' scales, are rounded to 16 bits of the largest of them, so products are exact integers; per
step, so that tokens of small probability count where they are among themselves.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

from kivi.kernels.triton_gluon_steps import (
    NOTHING,
    cap,
    fetch_key_groups,
    fetch_keys,
    fetch_value_groups,
    fetch_values,
)
from kivi.kernels.triton_tile_bytes import (
    BYTES_A,
    LANES,
    WHOLE_BITS,
    bytes_of,
    across,
    codes_of,
    fold_max,
    fold_sum,
    groups_of_rows,
    half_down,
    is_any,
    largest_row,
    multiply_add,
    operand,
    row_numbers,
    rows_of_heads,
    split_groups,
    spread,
    spread_row,
    sum_of_rows,
    to_largest,
    whole,
    whole_product,
)
from kivi.kernels.triton_tile_gluon import MMA, OPERAND_A, group_rows, halves, row_of, view_as

PLAIN3 = gl.constexpr(gl.SwizzledSharedLayout(vec=1, per_phase=1, max_phase=1, order=[2, 1, 0]))


@gluon.jit
def own_query(source, block, rows, D: gl.constexpr):
    """4 queries as `[D / 8, 8, 4]` float32."""
    layout: gl.constexpr = rows_of_heads(D)
    r = gl.arange(0, D // 8, layout=gl.SliceLayout(1, gl.SliceLayout(2, layout)))
    g = gl.arange(0, 8, layout=gl.SliceLayout(0, gl.SliceLayout(2, layout)))
    h = gl.arange(0, 4, layout=gl.SliceLayout(0, gl.SliceLayout(1, layout)))
    head = (block * 4 + h)[None, None, :]
    d = r[:, None, None] * 8 + g[None, :, None]
    return gl.load(source + head * D + d, mask=head < rows, other=0.0).to(gl.float32)


@gluon.jit
def attend_packed_bytes(
    q, own_q, q_unit, unit_score, k_words, v_words, k_scale, k_zero, v_scale, v_zero,
    kw, ks, kz, vw, vs, vz, row_table, next_page, Hkv, h, n, first, hi, softcap,
    D: gl.constexpr, KB: gl.constexpr, VB: gl.constexpr, KG: gl.constexpr, VG: gl.constexpr,
    K_ZERO: gl.constexpr, V_ZERO: gl.constexpr, NP: gl.constexpr,
):  # fmt: skip
    """As `attend_packed`, with heads in columns 0, 2, 4 and 6.

    own_q: `[D / 8, 8, 4]`; scores are its products times q_unit, those of q times unit_score.
    """
    dtype: gl.constexpr = q.dtype
    NG: gl.constexpr = D // VG
    STEP: gl.constexpr = 32 * NP
    GROUPS: gl.constexpr = (STEP + KG - 1) // KG
    SPP: gl.constexpr = 512 // STEP
    SPK: gl.constexpr = 2  # steps a tile: a byte each
    HUGE: gl.constexpr = 2.0**60
    CENTRE: gl.constexpr = 2.0 ** (VB - 1) - 0.5
    shift = gl.zeros([8, 4], gl.float32, layout=LANES)
    lsum = gl.zeros([8, 4], gl.float32, layout=LANES)
    msum = ()
    acc = ()
    for _ in gl.static_range(NG):
        msum = msum + (gl.zeros([8, 4], gl.float32, layout=LANES),)
        acc = acc + (gl.zeros([VG // 8, 8, 4], gl.float32, layout=rows_of_heads(VG)),)
    for step in range(first, hi):
        last = gl.minimum((n - step * STEP) // 32, NP) - 1
        step1 = step + 1
        more = step1 < hi
        sub1 = step1 % SPP
        page1 = next_page * Hkv + h
        last1 = gl.minimum((n - step1 * STEP) // 32, NP) - 1
        next_page = gl.load(row_table + gl.minimum(step + 2, hi - 1) // SPP)
        # Scores
        async_copy.wait_group(2)
        codes = bytes_of(k_words.index(0).load(OPERAND_A), step % SPK, 32, D)
        meta = group_rows(k_zero, k_zero, GROUPS, D, dtype)
        zq = mma_v2(meta, q, gl.zeros([16, 8], gl.float32, layout=MMA))
        zq, _odd = gl.split(halves(zq)[0].reshape([8, 4, 2]))
        zq = gl.convert_layout(zq, LANES, assert_trivial=True) * (unit_score * K_ZERO)
        s = ()
        for i in gl.static_range(NP):
            if (i * 32) % KG == 0:
                # The query times the scales, in 16 bits
                x = own_q * row_numbers(k_scale.index(i * 32 // KG), D)
                up, down = to_largest(largest_row(fold_max(gl.abs(x))))
                qs = operand(x * across(up, D), D)
                unit = down * q_unit
                one = gl.full([16, D], 1, gl.int8, layout=BYTES_A)
                sums = fold_max(whole_product(one, qs, 16))
                bias = row_of(zq, i * 32 // KG, GROUPS)
                if softcap is None:
                    bias -= shift
            x = whole_product(codes_of(codes, KB, i), qs, 32)
            own = bias
            if KB * (i + 1) == 8:
                own += sums * unit * (128.0 / 2.0 ** (KB * i))
            x = x * across(unit * (1.0 / 2.0 ** (KB * i)), 32) + across(own, 32)
            if softcap is not None:
                x = cap(x, softcap) - across(shift, 32)
            s = s + (x,)
        if last < NP - 1:
            some = ()
            for i in gl.static_range(NP):
                some = some + (s[i] + gl.where(i <= last, 0.0, float("-inf")),)
            s = some
        if more & (step1 % SPK == 0):
            fetch_keys(k_words.index(0), kw, page1, sub1, KB, SPK, D)
        async_copy.commit_group()
        if more:
            fetch_key_groups(k_scale, k_zero, ks, kz, page1, sub1, last1, KG, NP, D)
        async_copy.commit_group()
        # Probabilities
        async_copy.wait_group(2)
        raw_scales = ()
        groups = ()
        largest = ()
        for i in gl.static_range(NP):
            flat = view_as(v_scale.index(i), dtype, [4, 8, NG], PLAIN3)
            scales = flat.load(groups_of_rows(NG))
            raw_scales = raw_scales + (scales,)
            groups = groups + (split_groups(scales, NG),)
            top = groups[i][0]
            for g in gl.static_range(1, NG):
                top = gl.maximum(top, groups[i][g])
            largest = largest + (top.to(gl.float32),)
        p = ()
        for i in gl.static_range(NP):
            p = p + (gl.exp2(s[i]),)
        top = _largest_product(p, largest)
        # The reference follows the scores only where it must: nearly never.
        if (step == first) | is_any(top > HUGE):
            over = s[0]
            for i in gl.static_range(1, NP):
                over = gl.maximum(over, s[i])
            over = largest_row(fold_max(over))
            over = gl.maximum(over, gl.where(step == first, NOTHING, 0.0))
            alpha = gl.exp2(gl.minimum(-over, 0.0))
            shift += over
            lsum *= alpha
            scaled = ()
            scaled_sums = ()
            for g in gl.static_range(NG):
                scaled = scaled + (acc[g] * across(alpha, VG),)
                scaled_sums = scaled_sums + (msum[g] * alpha,)
            acc = scaled
            msum = scaled_sums
            some = ()
            for i in gl.static_range(NP):
                some = some + (gl.exp2(s[i] - across(over, 32)),)
            p = some
            top = _largest_product(p, largest)
        up, down = to_largest(top)
        operands = ()
        for i in gl.static_range(NP):
            lsum += fold_sum(p[i])
            zeros = view_as(v_zero.index(i), dtype, [4, 8, NG], PLAIN3).load(groups_of_rows(NG))
            if V_ZERO == 1.0:
                middle = multiply_add(raw_scales[i], CENTRE, zeros)
            else:
                middle = zeros * (V_ZERO + CENTRE)
            middle = split_groups(middle, NG)
            sums_of_middles = ()
            for g in gl.static_range(NG):
                x = p[i] * middle[g].to(gl.float32)
                sums_of_middles = sums_of_middles + (msum[g] + fold_sum(x),)
            msum = sums_of_middles
            x = p[i] * across(up * (1.0 / 2.0 ** (VB * i % 4)), 32)
            for g in gl.static_range(NG):
                operands = operands + (operand(x * groups[i][g].to(gl.float32), 32),)
        # Values
        scaled = ()
        for g in gl.static_range(NG):
            words = v_words.index(g).permute((1, 0)).load(OPERAND_A)
            lower = bytes_of(words, step % SPK, VG, 32)
            upper = half_down(lower)
            x = gl.full([VG, 8], WHOLE_BITS, gl.int32, layout=MMA)
            ones = gl.full([16, 8], WHOLE_BITS, gl.int32, layout=MMA)
            for i in gl.static_range(NP):
                source = lower if VB * i < 4 else upper
                x = mma_v2(codes_of(source, VB, i % (4 // VB)), operands[i * NG + g], x)
                one = gl.full([16, 32], 2 ** (VB * i % 4), gl.int8, layout=BYTES_A)
                ones = mma_v2(one, operands[i * NG + g], ones)
            # The mean code's part comes from the probabilities before they were rounded: small
            # ones all round to 0.
            rest = fold_max(whole(ones, 16)) * -CENTRE
            scaled = scaled + (acc[g] + (whole(x, VG) + across(rest, VG)) * across(down, VG),)
        acc = scaled
        if more & (step1 % SPK == 0):
            fetch_values(v_words, vw, page1, sub1, VB, SPK, NG, VG)
        async_copy.commit_group()
        if more:
            fetch_value_groups(v_scale, v_zero, vs, vz, page1, sub1, last1, NP, NG, False)
        async_copy.commit_group()
    async_copy.wait_group(0)
    m = spread_row(shift + gl.where(first < hi, 0.0, NOTHING), 0.0)
    mass = spread_row(sum_of_rows(lsum), 0.0)
    values = ()
    for g in gl.static_range(NG):
        x = acc[g] + across(sum_of_rows(msum[g]), VG)
        values = values + (spread(x, gl.zeros_like(x), VG),)
    return m, mass, values


@gluon.jit
def _largest_product(p, scales):
    """The largest of each head's probabilities times scales, `[8, 4]`."""
    top = fold_max(p[0] * scales[0])
    for i in gl.static_range(1, len(p)):
        top = gl.maximum(top, fold_max(p[i] * scales[i]))
    return largest_row(top)
