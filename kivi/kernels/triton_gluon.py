"""decode_attention on NVIDIA GPUs from sm_80 on, for the formats that matter: what makes it fast.

One warp a program, as many programs as fit on the GPU at once, all with the same share of work. A
program's share is a run of *steps* (up to 128 packed tokens each, or 64 slots of the exact window)
in the list of all (row, kv head)s' steps, so ragged batches balance; a (row, head) that several
programs work on is merged by `combine`.

Scores are `[tokens, heads]` = words x query; the query carries the keys' scale. Their exponentials
are transposed in registers and become, multiplied by the values' scale, the other operand of
`[channels, heads]` = words^T x probabilities. Copies into shared memory are issued as soon as a
buffer has been read, about half a step ahead of their use.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2
from triton.language.extra.cuda import gdc_launch_dependents

from kivi.kernels.triton_gluon_exact import attend_exact
from kivi.kernels.triton_gluon_steps import (
    LOG2_E,
    NOTHING,
    cap,
    column,
    exact_tokens,
    fetch_key_groups,
    fetch_keys,
    fetch_value_groups,
    fetch_values,
    headroom,
    join_aux,
    load_query,
    rescale,
    scaled_query,
    units,
)
from kivi.kernels.triton_tile_gluon import (
    FLAT,
    MMA,
    OPERAND_A,
    OPERAND_B,
    PLAIN,
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
    swizzled,
    transpose_blocks,
    upper_byte,
    view_as,
)


@gluon.jit(do_not_specialize=["B", "Hkv", "blocks", "rows", "T", "pages", "slots", "sinks"])
def decode_kernel(
    q_ptr, kw, ks, kz, vw, vs, vz, table, packed, xk, xv, length, query_position,
    part, part_ml, out, lse, s_aux,
    scale, softcap, B, Hkv, blocks, rows, T, pages, slots, sinks,
    D: gl.constexpr, KB: gl.constexpr, VB: gl.constexpr, KG: gl.constexpr, VG: gl.constexpr,
    K_ZERO: gl.constexpr, V_ZERO: gl.constexpr, NP: gl.constexpr,
    ROWS: gl.constexpr, SINGLE: gl.constexpr, EARLY: gl.constexpr,
):  # fmt: skip
    """See the module. `rows` = query heads of a kv head times T; a program takes 8 of them.

    NP planes of 32 tokens make a step. K_ZERO, V_ZERO: factors of `kz` and `vz`: 1, or for a
    symmetric grid, which derives its zeros, its zero over its scale (and `kz` is `ks`). ROWS: B
    rounded up to a power of 2. SINGLE: a program for each (row, head, block) writes `out` and
    `lse`; else partial sums go to `part` and `part_ml`. EARLY: let the next kernel start to wait
    (from sm_90 on).
    """
    dtype: gl.constexpr = q_ptr.dtype.element_ty
    NG: gl.constexpr = D // VG
    PAIR: gl.constexpr = min(NG, 2)
    STEP: gl.constexpr = 32 * NP
    GROUPS: gl.constexpr = (STEP + KG - 1) // KG  # of keys in a step
    SPP: gl.constexpr = 512 // STEP  # steps a page
    SPK: gl.constexpr = 16 // KB // NP  # steps a tile
    SPV: gl.constexpr = 16 // VB // NP
    ROOM: gl.constexpr = headroom(dtype)
    SLACK: gl.constexpr = 2.0
    LIFT: gl.constexpr = 0.5 if dtype == gl.float16 else 2.0**64
    CENTRE: gl.constexpr = 2.0 ** (KB - 1) - 0.5
    CENTRED: gl.constexpr = KG > 32 or K_ZERO != 1.0
    ONES: gl.constexpr = NG < 8  # room for a column of ones beside the zeros
    HEADS: gl.constexpr = gl.SliceLayout(0, MMA)
    if EARLY:
        gdc_launch_dependents()
    k_words = gl.allocate_shared_memory(gl.int16, [1, 32, D], swizzled(D))
    v_words = gl.allocate_shared_memory(gl.int16, [NG, 32, VG], swizzled(VG))
    k_scale = gl.allocate_shared_memory(dtype, [GROUPS, D], FLAT)
    k_zero = gl.allocate_shared_memory(dtype, [GROUPS, D], FLAT)
    v_scale = gl.allocate_shared_memory(dtype, [NP, 32, NG], PLAIN)
    v_zero = gl.allocate_shared_memory(
        dtype, [NP, 32] if NG == 1 else [NP, 32, 8], FLAT if NG == 1 else PLAIN
    )
    if NG > 1:
        ones = gl.full(
            [STEP, 8], 1.0, dtype, layout=gl.BlockedLayout([1, 8], [32, 1], [1, 1], [1, 0])
        )
        view_as(v_zero, dtype, [STEP, 8], PLAIN).store(ones)

    heads = Hkv * blocks
    program = gl.program_id(0)
    steps_of, ends = units(packed, length, B, heads, sinks, STEP, ROWS)
    row_index = gl.arange(0, ROWS, layout=ends.type.layout)
    total = gl.max(ends, 0)
    share = (total + gl.num_programs(0) - 1) // gl.num_programs(0)
    at = program * share
    stop = gl.minimum(at + share, total)
    if SINGLE:
        b0 = program // heads
        at = gl.sum(gl.where(row_index < b0, steps_of, 0), 0)
        own = gl.sum(gl.where(row_index == b0, steps_of, 0), 0) // heads
        at += (program % heads) * own
        stop = at + own

    r8 = gl.arange(0, 8, layout=HEADS)
    while at < stop:
        # Which (row, head, block of queries), and which of its steps
        b = gl.sum((ends <= at).to(gl.int32), 0)
        before = gl.sum(gl.where(row_index < b, steps_of, 0), 0)
        own = gl.sum(gl.where(row_index == b, steps_of, 0), 0) // heads
        unit = (at - before) // own
        first = at - before - unit * own
        count = gl.minimum(stop - at, own - first)
        h = unit // blocks
        block = unit % blocks
        n = gl.load(packed + b).to(gl.int32)
        tokens = gl.load(length + b).to(gl.int32)
        steps = (n + STEP - 1) // STEP
        hi = gl.minimum(first + count, steps)

        # What the first step needs is on its way before the query is looked at.
        row_table = table + b * pages
        page = gl.load(row_table + first // SPP, mask=first < hi, other=0)
        next_page = gl.load(
            row_table + gl.minimum(first + 1, hi - 1) // SPP, mask=first < hi, other=0
        )
        if first < hi:
            sub = first % SPP
            at_page = page * Hkv + h
            last = gl.minimum((n - first * STEP) // 32, NP) - 1
            fetch_keys(k_words.index(0), kw, at_page, sub, KB, SPK, D)
            async_copy.commit_group()
            fetch_key_groups(k_scale, k_zero, ks, kz, at_page, sub, last, KG, NP, D)
            async_copy.commit_group()
            fetch_values(v_words, vw, at_page, sub, VB, SPV, NG, VG)
            async_copy.commit_group()
            fetch_value_groups(v_scale, v_zero, vs, vz, at_page, sub, last, NP, NG)
            async_copy.commit_group()

        q_at = ((b * Hkv + h) * rows).to(gl.int64) * D
        q, power = load_query(q_ptr + q_at, block, rows, LIFT, D)
        my_q = block * 8 + r8
        seen_to = gl.load(query_position + b * T + my_q % T).to(gl.int32)
        unit_score = scale * LOG2_E * power

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
                    fetch_key_groups(k_scale, k_zero, ks, kz, page1, sub1, last1, KG, NP, D)
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
                    fetch_values(v_words, vw, page1, sub1, VB, SPV, NG, VG)
                async_copy.commit_group()
                if more:
                    fetch_value_groups(v_scale, v_zero, vs, vz, page1, sub1, last1, NP, NG)
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

        # Exact slots
        tiles = (exact_tokens(tokens, n, sinks) + 31) // 32
        tile0 = gl.maximum(first - steps, 0) * 2
        tile1 = gl.minimum(gl.maximum(first + count - steps, 0) * 2, tiles)
        if tile0 < tile1:
            at_row = ((b * Hkv + h) * (slots + 1)).to(gl.int64) * D
            seen_to = gl.minimum(seen_to, tokens - 1)
            m, mass, values = attend_exact(
                m, mass, values, q, unit_score * (1.0 / LIFT), seen_to, k_words, v_words,
                xk + at_row, xv + at_row, tile0, tile1, tokens, n, slots, sinks, softcap, D, VG,
            )  # fmt: skip

        ch = gl.arange(0, VG, layout=gl.SliceLayout(1, MMA))
        if SINGLE:
            head = h * (rows // T) + my_q // T
            m, mass, weight = join_aux(m, mass, s_aux, head, my_q < rows)
            o_at = q_at + my_q[None, :] * D + ch[:, None]
            for g in gl.static_range(NG):
                o = (values[g] * weight[None, :]).to(out.dtype.element_ty)
                gl.store(out + o_at + g * VG, o, mask=my_q[None, :] < rows)
            total_lse = gl.where(mass > 0, (m + gl.log2(mass)) / LOG2_E, NOTHING)
            gl.store(lse + (b * Hkv + h) * rows + my_q, total_lse, mask=my_q < rows)
        else:
            slot_at = (program + b * heads + unit).to(gl.int64)
            for g in gl.static_range(NG):
                gl.store(part + (slot_at * 8 + r8[None, :]) * D + g * VG + ch[:, None], values[g])
            gl.store(part_ml + slot_at * 16 + r8, m)
            gl.store(part_ml + slot_at * 16 + 8 + r8, mass)
        at += count
