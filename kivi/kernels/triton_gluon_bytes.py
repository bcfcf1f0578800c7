"""The Gluon kernel's part over packed tokens, on 8-bit tensor cores: 4 queries, 2 or 4 bits.

Half of the instructions of the 16-bit part: a register holds four codes instead of two, to be
masked at once and multiplied at once. The query times a group's scales, and probabilities times the
values' scales, are rounded to 16 bits of the largest of them, so products are exact integers; per
step, so that tokens of small probability count where they are among themselves.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from kivi.kernels.triton_gluon_byte_scores import (
    scores_by_channel,
    scores_by_channel_together,
    scores_by_token,
    scores_by_token_together,
)
from kivi.kernels.triton_gluon_byte_steps import (
    add_centers,
    follow,
    plane_masks,
    sum_of_query,
    to_whole_query,
    too_large,
    weigh_values,
)
from kivi.kernels.triton_gluon_steps import (
    fetch_centers,
    fetch_key_groups,
    fetch_keys,
    fetch_token_groups,
    fetch_values,
)
from kivi.kernels.triton_tile_bytes import (
    bytes_of,
    mean_code,
    multiply_add,
    offset,
    operand,
)
from kivi.kernels.triton_tile_gluon import OPERAND_A
from kivi.kernels.triton_tile_heads import (
    LANES,
    across,
    fold_max,
    fold_sum,
    largest_row,
    one_plane,
    plane_numbers,
    plane_of_slot,
    rows_of_heads,
    split_groups,
    sum_of_planes,
    sum_of_rows,
)


@gluon.jit
def attend_packed_bytes(
    q, own_q, q_unit, unit_score, k_words, v_words, k_scale, k_zero, v_scale, v_zero,
    kw, ks, kz, vw, vs, vz, row_table, page, next_page, Hkv, h, n, first, hi, softcap,
    D: gl.constexpr, KB: gl.constexpr, VB: gl.constexpr, KG: gl.constexpr, VG: gl.constexpr,
    K_ZERO: gl.constexpr, V_ZERO: gl.constexpr, NP: gl.constexpr,
    MAPPED: gl.constexpr, CENTER: gl.constexpr, TOGETHER: gl.constexpr,
):  # fmt: skip
    """As `attend_packed`, with heads in columns 0, 2, 4 and 6.

    TOGETHER: fewer heads, each with a slot for every plane of a step.

    own_q: `[n / 8, 8, 4]`, in pieces of n channels; scores are its products times q_unit, those of
    q, in pieces as well, times unit_score. There is a step at least: first < hi.
    Where there are several pieces, words are fetched a piece at a time, those of keys and of values
    to the same place one after the other: what a program does not hold, another one may. What is
    fetched with a piece of values is wanted after the keys' next one.
    MAPPED: keys and values have a scale a token, and centers of CENTER tokens (0: none) in place of
    zeros; K_ZERO and V_ZERO are the codes that are 0. own_q is mapped, and so are the results.

    Returns:
        The scores' maximum in log 2, and the mass, `[8, 4]` in every row; sums of values, a group
        of channels each or a piece of it, `[n / 8, 8, 4]`.
    """
    dtype: gl.constexpr = v_scale.dtype
    NG: gl.constexpr = D // VG
    PIECES: gl.constexpr = len(own_q)
    WIDE: gl.constexpr = D // PIECES
    VW: gl.constexpr = min(VG, WIDE)
    EACH: gl.constexpr = WIDE // VW  # sums of a piece
    OWN: gl.constexpr = min(NG, EACH)  # groups of a piece
    NEXT: gl.constexpr = OWN if NG > 1 else 0  # to the next piece's first
    SLOTS: gl.constexpr = 4 if TOGETHER else 1
    PENDING: gl.constexpr = 2 if PIECES == 1 else 1
    STEP: gl.constexpr = 32 * NP
    SPP: gl.constexpr = 512 // STEP
    SPK: gl.constexpr = 2  # steps a tile: a byte each
    MIDDLES: gl.constexpr = not MAPPED or V_ZERO != mean_code(VB)
    shift = gl.zeros([8, 4], gl.float32, layout=LANES)
    sums = (gl.zeros([8, 4], gl.float32, layout=LANES),)  # of p; of p times middles
    acc = ()
    for _g in gl.static_range(NG):
        if MIDDLES:
            sums = sums + (gl.zeros([8, 4], gl.float32, layout=LANES),)
    for _g in gl.static_range(D // VW):
        acc = acc + (gl.zeros([VW // 8, 8, 4], gl.float32, layout=rows_of_heads(VW)),)
    PLANES: gl.constexpr = NP if TOGETHER else 1  # a head
    SETS: gl.constexpr = NP // PLANES
    masks = plane_masks(PLANES)
    if MAPPED:
        up, down = to_whole_query(own_q)
        unit = down * q_unit
        sum_of_q = gl.zeros([8, 4], gl.float32, layout=LANES)
        qs = ()
        x = ()
        for c in gl.static_range(PIECES):
            qs = qs + (operand(own_q[c] + across(offset(down), WIDE), WIDE),)
            sum_of_q += sum_of_query(qs[c], WIDE)
            x = x + ((own_q[c] * across(up, WIDE)).to(dtype),)
        own_q = x
    for step in range(first, hi):
        last = gl.minimum((n - step * STEP) // 32, NP) - 1
        step1 = step + 1
        more = step1 < hi
        sub1 = step1 % SPP
        page1 = next_page * Hkv + h
        last1 = gl.minimum((n - step1 * STEP) // 32, NP) - 1
        next_page = gl.load(row_table + gl.minimum(step + 2, hi - 1) // SPP)
        # Scores
        s = ()
        for c in gl.static_range(PIECES):
            async_copy.wait_group(PENDING)
            codes = bytes_of(k_words[c].index(0).load(OPERAND_A), step % SPK, 32, WIDE)
            if MAPPED:
                if TOGETHER:
                    s = scores_by_token_together(
                        own_q, qs[c], unit, sum_of_q, shift, s, codes, k_scale, k_zero, softcap,
                        WIDE, KB, CENTER, K_ZERO, NP, c == 0, c == PIECES - 1,
                    )  # fmt: skip
                else:
                    s = scores_by_token(
                        own_q, qs[c], unit, sum_of_q, shift, s, codes, k_scale, k_zero, softcap,
                        WIDE, KB, CENTER, K_ZERO, NP, c == 0, c == PIECES - 1,
                    )  # fmt: skip
            elif TOGETHER:
                s = scores_by_channel_together(
                    own_q[c], q_unit, shift, s, codes, k_scale[c], k_zero[c], softcap,
                    WIDE, KB, KG, K_ZERO, NP, c == 0, c == PIECES - 1,
                )  # fmt: skip
            else:
                s = scores_by_channel(
                    q[c], own_q[c], q_unit, unit_score, shift, s, codes, k_scale[c], k_zero[c],
                    softcap, WIDE, KB, KG, K_ZERO, NP, c == 0, c == PIECES - 1,
                )  # fmt: skip
            if PIECES > 1:
                fetch_values(v_words[c], vw + c * WIDE, page, step % SPP, VB, SPK, D)
                if c < PIECES - 1:
                    async_copy.commit_group()
        if last < NP - 1:
            some = ()
            for i in gl.static_range(SETS):
                hidden = gl.where(i + plane_of_slot(PLANES) <= last, 0.0, float("-inf"))
                some = some + (s[i] + across(hidden, 32),)
            s = some
        over, is_far = too_large(s)
        if PIECES == 1:
            if more & (step1 % SPK == 0):
                fetch_keys(k_words[0].index(0), kw, page1, sub1, KB, SPK, D)
            async_copy.commit_group()
        if more:
            if MAPPED:
                fetch_token_groups(k_scale, ks, page1, sub1, last1, NP, 1)
                fetch_centers(k_zero, kz, page1, sub1, last1, CENTER, NP, D)
            else:
                fetch_key_groups(k_scale, k_zero, ks, kz, page1, sub1, last1, KG, NP, D)
        async_copy.commit_group()
        # The reference follows the scores only where it must: nearly never.
        if (step == first) | is_far:
            s, shift, sums, acc = follow(over, step == first, s, shift, sums, acc, PLANES)
        # Probabilities
        new_sums = ()
        new_acc = ()
        for c in gl.static_range(PIECES):
            async_copy.wait_group(PENDING)
            groups = ()
            middles = ()
            largest = ()
            for i in gl.static_range(SETS):
                if TOGETHER:
                    scales = plane_numbers(v_scale, NP, NG, c * NEXT, OWN)
                else:
                    scales = one_plane(v_scale.index(i), NG, c * NEXT, OWN)
                # What the mean code stands for
                if MIDDLES:
                    if MAPPED:
                        middle = scales * (mean_code(VB) - V_ZERO)
                    elif V_ZERO != 1.0:
                        middle = scales * (V_ZERO + mean_code(VB))
                    else:
                        if TOGETHER:
                            zeros = plane_numbers(v_zero, NP, NG, c * NEXT, OWN)
                        else:
                            zeros = one_plane(v_zero.index(i), NG, c * NEXT, OWN)
                        middle = multiply_add(scales, mean_code(VB), zeros)
                    middles = middles + (split_groups(middle, OWN, SLOTS),)
                groups = groups + (split_groups(scales, OWN, SLOTS),)
                top = groups[i][0]
                for g in gl.static_range(1, OWN):
                    top = gl.maximum(top, groups[i][g])
                largest = largest + (top.to(gl.float32),)
            if c == 0:
                p = ()
            top = gl.full([8, 4], 0.0, gl.float32, layout=LANES)
            for i in gl.static_range(SETS):
                if c == 0:
                    p = p + (gl.exp2(s[i]),)
                top = gl.maximum(top, fold_max(p[i] * largest[i]))
            own_acc = weigh_values(
                acc[c * EACH : (c + 1) * EACH], p, groups, largest_row(top), masks, v_words[c],
                step % SPK, VB, VW, NP, TOGETHER,
            )  # fmt: skip
            if c == 0:
                mass = sums[0]
                for i in gl.static_range(SETS):
                    mass += fold_sum(p[i])
                new_sums = (mass,)
            if MAPPED and CENTER > 0:
                own_acc = add_centers(own_acc, p, v_zero[c], WIDE, CENTER, NP, TOGETHER)
            new_acc = new_acc + own_acc
            if MIDDLES and (c == 0 or NG > 1):
                for g in gl.static_range(OWN):
                    total = sums[1 + c * NEXT + g]
                    for i in gl.static_range(SETS):
                        total += fold_sum(p[i] * middles[i][g].to(gl.float32))
                    new_sums = new_sums + (total,)
            if PIECES > 1:
                if more:
                    fetch_keys(k_words[c].index(0), kw + c * WIDE, page1, sub1, KB, SPK, D)
                if c < PIECES - 1:
                    async_copy.commit_group()
        sums = new_sums
        acc = new_acc
        if PIECES == 1:
            if more & (step1 % SPK == 0):
                fetch_values(v_words[0], vw, page1, sub1, VB, SPK, D)
            async_copy.commit_group()
        else:
            page = page1
        if more:
            fetch_token_groups(v_scale, vs, page1, sub1, last1, NP, NG)
            if MAPPED:
                fetch_centers(v_zero, vz, page1, sub1, last1, CENTER, NP, D)
            else:
                fetch_token_groups(v_zero, vz, page1, sub1, last1, NP, NG)
        async_copy.commit_group()
    async_copy.wait_group(0)
    values = ()
    for g in gl.static_range(D // VW):
        x = acc[g]
        if MIDDLES:
            x += across(sum_of_rows(sums[1 + g * VW // VG]), VW)
        values = values + (sum_of_planes(x, PLANES),)
    mass = sum_of_planes(sum_of_rows(sums[0]), PLANES)
    return shift, mass, values
