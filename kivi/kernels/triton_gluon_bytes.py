"""The Gluon kernel's part over packed tokens, on 8-bit tensor cores: 4 queries, 2 or 4 bits.

Half of the instructions of the 16-bit part: a register holds four codes instead of two, to be
masked at once and multiplied at once. The query times a group's scales, and probabilities times the
values' scales, are rounded to 16 bits of the largest of them, so products are exact integers; per
step, so that tokens of small probability count where they are among themselves.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

from kivi.kernels.triton_gluon_byte_steps import (
    add_centers,
    all_planes,
    by_plane,
    follow,
    plane_masks,
    too_large,
    weigh_values,
    whole_query,
)
from kivi.kernels.triton_gluon_steps import (
    cap,
    fetch_centers,
    fetch_key_groups,
    fetch_keys,
    fetch_token_groups,
    fetch_values,
)
from kivi.kernels.triton_tile_bytes import (
    bytes_of,
    codes_of,
    mean_code,
    multiply_add,
    products,
    whole_product,
)
from kivi.kernels.triton_tile_gluon import MMA, OPERAND_A, group_rows, halves, row_of
from kivi.kernels.triton_tile_heads import (
    LANES,
    across,
    fold_max,
    fold_sum,
    group_numbers,
    largest_row,
    one_plane,
    plane_numbers,
    plane_of_slot,
    row_numbers,
    rows_of_heads,
    split_groups,
    sum_of_planes,
    sum_of_rows,
)


@gluon.jit
def _scores_by_channel(
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
    s = ()
    for i in gl.static_range(NP):
        if (i * 32) % KG == 0:
            # The query times the scales, in 16 bits
            x = own_q * row_numbers(k_scale.index(i * 32 // KG), D)
            qs, unit, sum_of_q, _x = whole_query((x,), q_unit, D)
            bias = row_of(zq, i * 32 // KG, GROUPS)
            if FIRST and softcap is None:
                bias -= shift
        x = whole_product(codes_of(codes, KB, i), qs[0], 32)
        own = bias
        if KB * (i + 1) == 8:
            own += sum_of_q * unit * (128.0 / 2.0 ** (KB * i))
        x = x * across(unit * (1.0 / 2.0 ** (KB * i)), 32) + across(own, 32)
        if not FIRST:
            x += before[i]
        if LAST and softcap is not None:
            x = cap(x, softcap) - across(shift, 32)
        s = s + (x,)
    return s


@gluon.jit
def _scores_by_token(
    own_q, qs, unit, sum_of_q, shift, before, codes, k_scale, k_center, softcap,
    D: gl.constexpr, KB: gl.constexpr, CENTER: gl.constexpr, K_ZERO: gl.constexpr,
    NP: gl.constexpr, FIRST: gl.constexpr, LAST: gl.constexpr,
):  # fmt: skip
    """As `_scores_by_channel`: keys per token, code K_ZERO is 0, around a mean of CENTER tokens.

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
def _scores_by_channel_together(
    own_q, q_unit, shift, before, codes, k_scale, k_zero, softcap,
    D: gl.constexpr, KB: gl.constexpr, KG: gl.constexpr, K_ZERO: gl.constexpr, NP: gl.constexpr,
    FIRST: gl.constexpr, LAST: gl.constexpr,
):  # fmt: skip
    """As `_scores_by_channel`, a plane a slot."""
    GROUPS: gl.constexpr = (32 * NP + KG - 1) // KG
    zq = fold_sum(own_q * group_numbers(k_zero, NP, GROUPS, D))
    bias = sum_of_rows(zq) * (q_unit * K_ZERO)
    x = own_q * group_numbers(k_scale, NP, GROUPS, D)
    qs, unit, sum_of_q, _x = whole_query((x,), q_unit, D)
    top = sum_of_q * (128.0 / 2.0 ** (KB * (NP - 1)))
    bias += gl.where(plane_of_slot(NP) == NP - 1, top, 0.0) * unit
    if FIRST and softcap is None:
        bias -= shift
    x = all_planes(codes, qs[0], KB, NP) * across(unit * by_plane(2.0, -KB, 8, NP), 32)
    x += across(bias, 32)
    if not FIRST:
        x += before[0]
    if LAST and softcap is not None:
        x = cap(x, softcap) - across(shift, 32)
    return (x,)


@gluon.jit
def _scores_by_token_together(
    own_q, qs, unit, sum_of_q, shift, before, codes, k_scale, k_center, softcap,
    D: gl.constexpr, KB: gl.constexpr, CENTER: gl.constexpr, K_ZERO: gl.constexpr,
    NP: gl.constexpr, FIRST: gl.constexpr, LAST: gl.constexpr,
):  # fmt: skip
    """As `_scores_by_token`, a plane a slot."""
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
        qs, unit, sum_of_q, x = whole_query(own_q, q_unit, WIDE)
        own_q = ()
        for c in gl.static_range(PIECES):
            own_q = own_q + (x[c].to(dtype),)
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
                    s = _scores_by_token_together(
                        own_q, qs[c], unit, sum_of_q, shift, s, codes, k_scale, k_zero, softcap,
                        WIDE, KB, CENTER, K_ZERO, NP, c == 0, c == PIECES - 1,
                    )  # fmt: skip
                else:
                    s = _scores_by_token(
                        own_q, qs[c], unit, sum_of_q, shift, s, codes, k_scale, k_zero, softcap,
                        WIDE, KB, CENTER, K_ZERO, NP, c == 0, c == PIECES - 1,
                    )  # fmt: skip
            elif TOGETHER:
                s = _scores_by_channel_together(
                    own_q[c], q_unit, shift, s, codes, k_scale[c], k_zero[c], softcap,
                    WIDE, KB, KG, K_ZERO, NP, c == 0, c == PIECES - 1,
                )  # fmt: skip
            else:
                s = _scores_by_channel(
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
