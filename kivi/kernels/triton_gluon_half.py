"""The Gluon kernel's part over packed tokens, on 16-bit tensor cores: any widths, 8 queries.

Scores are `[tokens, heads]` = words x query; the query carries the keys' scale. Their exponentials
are transposed in registers and become, multiplied by the values' scale, the other operand of
`[channels, heads]` = words^T x probabilities. Copies into shared memory are issued as soon as a
buffer has been read, about half a step ahead of their use.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

from kivi.kernels.triton_gluon_steps import (
    NOTHING,
    cap,
    column,
    fetch_key_groups,
    fetch_keys,
    fetch_token_groups,
    fetch_values,
    fetch_zeros,
    headroom,
    lift,
    rescale,
    scaled_query,
)
from kivi.kernels.triton_tile_gluon import (
    FLAT,
    MMA,
    OPERAND_A,
    OPERAND_B,
    columns,
    direct_planes,
    group_rows,
    halves,
    heads_as_rows,
    in_every_row,
    move_down,
    per_code,
    planes,
    row_of,
    scales_layout,
    transpose_blocks,
    upper_byte,
    view_as,
)


@gluon.jit
def attend_packed(
    q, unit_score, k_words, v_words, k_scale, k_zero, v_scale, v_zero,
    kw, ks, kz, vw, vs, vz, row_table, next_page, Hkv, h, n, first, hi, softcap,
    D: gl.constexpr, KB: gl.constexpr, VB: gl.constexpr, KG: gl.constexpr, VG: gl.constexpr,
    K_ZERO: gl.constexpr, V_ZERO: gl.constexpr, NP: gl.constexpr,
):  # fmt: skip
    """Steps `first` to `hi` of a (row, head)'s packed tokens; the first is on its way.

    Returns:
        The scores' maximum in log 2 `[8]`, the mass `[8]`, and sums of values, a group of channels
        each, `[VG, 8]`.
    """
    dtype: gl.constexpr = q.dtype
    NG: gl.constexpr = D // VG
    PAIR: gl.constexpr = min(NG, 2)
    STEP: gl.constexpr = 32 * NP
    GROUPS: gl.constexpr = (STEP + KG - 1) // KG  # of keys in a step
    SPP: gl.constexpr = 512 // STEP  # steps a page
    SPK: gl.constexpr = 16 // KB // NP  # steps a tile
    SPV: gl.constexpr = 16 // VB // NP
    ROOM: gl.constexpr = headroom(dtype)
    SLACK: gl.constexpr = 2.0
    LIFT: gl.constexpr = lift(dtype)
    CENTRE: gl.constexpr = 2.0 ** (KB - 1) - 0.5
    CENTRED: gl.constexpr = KG > 32 or K_ZERO != 1.0
    ONES: gl.constexpr = NG < 8  # room for a column of ones beside the zeros
    HEADS: gl.constexpr = gl.SliceLayout(0, MMA)
    # Packed scores are relative to this: their maximum less ROOM, or a little less.
    shift = gl.zeros([8], gl.float32, layout=HEADS)
    lsum = gl.zeros([8], gl.float32, layout=HEADS)
    acc = ()
    for _ in gl.static_range(NG):
        acc = acc + (gl.zeros([VG, 8], gl.float32, layout=MMA),)
    zacc = gl.zeros([16, 8], gl.float32, layout=MMA)

    if first < hi:
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
            words = k_words.index(0).load(OPERAND_A)
            if SPK > 1:
                words = move_down(words, (step % SPK) * (NP * KB))
            direct: gl.constexpr = direct_planes(KB)
            if NP > direct:
                upper = upper_byte(words)
            meta = group_rows(k_zero, k_scale, GROUPS, D, dtype)
            zq = mma_v2(meta, q, gl.zeros([16, 8], gl.float32, layout=MMA))
            zq, sq = halves(zq * (unit_score * (1.0 / LIFT)))
            zq = zq * K_ZERO
            if CENTRED:
                zq += sq * CENTRE
            s = ()
            for i in gl.static_range(NP):
                if (i * 32) % KG == 0:
                    scales = k_scale.index(i * 32 // KG).load(gl.SliceLayout(1, OPERAND_B))
                    bias = row_of(zq, i * 32 // KG, GROUPS)
                    if CENTRED:
                        # The rounding of qs shifts all scores of a group by its sum times the
                        # mean code: taken out, since the sum of q * scale is known better.
                        qs = q * scales[:, None]
                        one = gl.full([16, D], 1.0, dtype, layout=OPERAND_A)
                        x = mma_v2(one, qs, gl.zeros([16, 8], gl.float32, layout=MMA))
                        bias -= halves(x)[0] * (unit_score * (CENTRE / LIFT))
                    else:
                        qs = scaled_query(q, scales, D)
                    bias = in_every_row(bias)
                    if softcap is None:
                        bias -= shift[None, :]
                codes = planes(words if i < direct else upper, KB, i % direct, dtype)
                x = mma_v2(codes, qs, gl.zeros([32, 8], gl.float32, layout=MMA))
                x = x * (unit_score * per_code(dtype, KB, i % direct, LIFT)) + bias
                if softcap is not None:
                    x = cap(x, softcap) - shift[None, :]
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
                fetch_key_groups((k_scale,), (k_zero,), ks, kz, page1, sub1, last1, KG, NP, D)
            async_copy.commit_group()
            # Probabilities
            async_copy.wait_group(2)
            top = s[0]
            for i in gl.static_range(1, NP):
                top = gl.maximum(top, s[i])
            over = gl.max(top, 0) - ROOM
            if dtype == gl.float16:
                # p * 2^ROOM * scale must not overflow: see the portable kernel
                flat: gl.constexpr = gl.BlockedLayout([8], [32], [1], [0])
                every = view_as(v_scale, dtype, [STEP * NG], FLAT).load(flat)
                largest = gl.max(every, 0).to(gl.float32)
                over += gl.log2(gl.maximum(largest, 0.125))
            # The reference follows the maximum only where it must: nearly never.
            if (step == first) | (gl.max(over, 0) > SLACK):
                over = gl.maximum(over, gl.where(step == first, NOTHING, 0.0))
                acc, zacc, lsum = rescale(acc, zacc, lsum, gl.exp2(gl.minimum(-over, 0.0)))
                shift += over
                some = ()
                for i in gl.static_range(NP):
                    some = some + (s[i] - over[None, :],)
                s = some
            probabilities = ()
            v_direct: gl.constexpr = direct_planes(VB)
            for i in gl.static_range(NP):
                p = gl.exp2(s[i])
                if not ONES:
                    lsum += gl.sum(p, 0)
                p = transpose_blocks(p.to(dtype))
                if NG == 1:
                    z = v_zero.index(i).load(gl.SliceLayout(1, OPERAND_B))
                    is_zero = gl.arange(0, 8, layout=gl.SliceLayout(0, OPERAND_B)) == 0
                    one = gl.full([32, 8], 1.0, dtype, layout=OPERAND_B)
                    z = gl.where(is_zero[None, :], z[:, None], one)
                else:
                    z = v_zero.index(i).load(OPERAND_B)
                zacc = mma_v2(heads_as_rows(p), z, zacc)
                if i % v_direct != 0:
                    p = (p * (1.0 / 2.0 ** (VB * (i % v_direct)))).to(dtype)
                probabilities = probabilities + (p,)
            # Values, a pair of groups at a time: what is scaled takes registers
            new_acc = ()
            for g0 in gl.static_range(0, NG, PAIR):
                scaled = ()
                for i in gl.static_range(NP):
                    scales = v_scale.index(i).slice(g0, PAIR, dim=1).load(scales_layout(PAIR))
                    by_group = columns(scales, PAIR)
                    for g in gl.static_range(PAIR):
                        x = probabilities[i] * by_group[g][:, None]
                        x = gl.convert_layout(x, OPERAND_B, assert_trivial=True)
                        scaled = scaled + (x,)
                for g in gl.static_range(PAIR):
                    words = v_words.index(g0 + g).permute((1, 0)).load(OPERAND_A)
                    if SPV > 1:
                        words = move_down(words, (step % SPV) * (NP * VB))
                    if NP > v_direct:
                        upper = upper_byte(words)
                    a = acc[g0 + g]
                    for i in gl.static_range(NP):
                        source = words if i < v_direct else upper
                        codes = planes(source, VB, i % v_direct, dtype)
                        a = mma_v2(codes, scaled[i * PAIR + g], a)
                    new_acc = new_acc + (a,)
            acc = new_acc
            if more & (step1 % SPV == 0):
                fetch_values(v_words, vw, page1, sub1, VB, SPV, D)
            async_copy.commit_group()
            if more:
                fetch_token_groups(v_scale, vs, page1, sub1, last1, NP, NG)
                fetch_zeros(v_zero, vz, page1, sub1, last1, NP, NG)
            async_copy.commit_group()
    async_copy.wait_group(0)
    # From here on in units of values
    m = shift + gl.where(first < hi, ROOM, NOTHING)
    to_values: gl.constexpr = per_code(dtype, 1, 0, 2.0**ROOM)
    mass = lsum * 2.0**-ROOM
    if ONES:
        mass = column(zacc, 1 if NG == 1 else NG) * 2.0**-ROOM
    values = ()
    for g in gl.static_range(NG):
        z = column(zacc, g) * (V_ZERO * 2.0**-ROOM)
        values = values + (acc[g] * to_values + z[None, :],)
    return m, mass, values
