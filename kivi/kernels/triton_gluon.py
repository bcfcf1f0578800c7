"""decode_attention on NVIDIA GPUs from sm_80 on, for the formats that matter: what makes it fast.

One warp a program, as many programs as fit on the GPU at once, all with the same share of work. A
program's share is a run of *steps* (up to 128 packed tokens each, or 64 to 96 slots of the exact
window) in the list of all (row, kv head)s' steps, so ragged batches balance; a (row, head) that
several programs work on is merged by `combine`.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.language.extra.cuda import gdc_launch_dependents

from kivi.kernels.triton_gluon_byte_steps import (
    channel_numbers,
    factors_to_rotate,
    own_query,
    query_to_rotate,
)
from kivi.kernels.triton_gluon_bytes import attend_packed_bytes
from kivi.kernels.triton_gluon_exact import attend_exact
from kivi.kernels.triton_gluon_half import attend_packed
from kivi.kernels.triton_gluon_steps import (
    LOG2_E,
    NOTHING,
    exact_tokens,
    fetch_centers,
    fetch_channels,
    fetch_key_groups,
    fetch_keys,
    fetch_token_groups,
    fetch_values,
    fetch_zeros,
    join_aux,
    lift,
    load_query,
    plain_query,
    units,
)
from kivi.kernels.triton_tile_gluon import COLUMNS, FLAT, MMA, PLAIN, swizzled, view_as
from kivi.kernels.triton_tile_heads import pieces, rows_of_heads, spread, spread_row
from kivi.kernels.triton_tile_rotate import inverse_scale, rotated, unmapped


@gluon.jit(do_not_specialize=["B", "Hkv", "rows", "T", "pages", "slots", "sinks"])
def decode_kernel(
    q_ptr, kw, ks, kz, vw, vs, vz, table, packed, xk, xv, length, query_position,
    part, part_ml, out, lse, s_aux, smooth,
    scale, softcap, B, Hkv, blocks, rows, T, pages, slots, sinks,
    D: gl.constexpr, KB: gl.constexpr, VB: gl.constexpr, KG: gl.constexpr, VG: gl.constexpr,
    K_ZERO: gl.constexpr, V_ZERO: gl.constexpr, NP: gl.constexpr,
    ROWS: gl.constexpr, SINGLE: gl.constexpr, EARLY: gl.constexpr, BYTES: gl.constexpr,
    TOGETHER: gl.constexpr,
    MAPPED: gl.constexpr, CENTER: gl.constexpr, K_BLOCK: gl.constexpr, V_BLOCK: gl.constexpr,
    K_SMOOTH: gl.constexpr, V_SMOOTH: gl.constexpr,
):  # fmt: skip
    """See the module. `rows` = query heads of a kv head times T; a program takes 8 of them, or 4.

    NP planes of 32 tokens make a step. K_ZERO, V_ZERO: factors of `kz` and `vz`: 1, or for a
    symmetric grid, which derives its zeros, its zero over its scale (and `kz` is `ks`). ROWS: B
    rounded up to a power of 2. SINGLE: a program for each (row, head, block) writes `out` and
    `lse`; else partial sums go to `part` and `part_ml`. EARLY: let the next kernel start to wait
    (from sm_90 on). BYTES: on 8-bit tensor cores, 4 queries a program, in every other column;
    TOGETHER: of those 4 / NP only, NP times as far apart.
    MAPPED (and BYTES): keys and values have a scale a token, means of CENTER tokens (0: none) in
    place of zeros, and were rotated in blocks (1: not) and divided by `smooth [B, Hkv, n]`, first
    the keys' (if K_SMOOTH), then the values' (if V_SMOOTH).
    """
    dtype: gl.constexpr = q_ptr.dtype.element_ty
    NG: gl.constexpr = D // VG
    STEP: gl.constexpr = 32 * NP
    GROUPS: gl.constexpr = (STEP + KG - 1) // KG  # of keys in a step
    SPP: gl.constexpr = 512 // STEP  # steps a page
    SPK: gl.constexpr = 16 // KB // NP  # steps a tile
    SPV: gl.constexpr = 16 // VB // NP
    LIFT: gl.constexpr = lift(dtype)
    HEADS: gl.constexpr = gl.SliceLayout(0, MMA)
    LATE: gl.constexpr = MAPPED or TOGETHER or (BYTES and GROUPS == 1)
    PLANES: gl.constexpr = NP if TOGETHER else 1
    APART: gl.constexpr = 2 * PLANES if BYTES else 1  # columns a query
    if EARLY:
        gdc_launch_dependents()
    # Of 256 channels a half at a time, of keys and values in the same place: more programs fit
    PIECES: gl.constexpr = D // 128 if BYTES and D > 128 else 1
    WIDE: gl.constexpr = D // PIECES
    VW: gl.constexpr = min(VG, WIDE)
    k_words = ()
    v_words = ()
    for _c in gl.static_range(PIECES):
        k_words = k_words + (gl.allocate_shared_memory(gl.int16, [1, 32, WIDE], swizzled(WIDE)),)
    of_values: gl.constexpr = [WIDE // VW, 32, VW]
    for c in gl.static_range(PIECES):
        if PIECES == 1:
            v_words = (gl.allocate_shared_memory(gl.int16, of_values, swizzled(VW)),)
        else:
            v_words = v_words + (view_as(k_words[c], gl.int16, of_values, swizzled(VW)),)
    v_scale = gl.allocate_shared_memory(dtype, [NP, 32, NG], PLAIN)
    if MAPPED:
        # A scale a token; the centers lie where zeros would
        centers: gl.constexpr = (STEP + CENTER - 1) // CENTER if CENTER > 0 else 1
        k_scale = gl.allocate_shared_memory(dtype, [NP, 32], FLAT)
        k_zero = ()
        v_zero = ()
        for _c in gl.static_range(PIECES):
            k_zero = k_zero + (gl.allocate_shared_memory(dtype, [centers, WIDE], FLAT),)
        for _c in gl.static_range(PIECES):
            v_zero = v_zero + (gl.allocate_shared_memory(dtype, [centers, WIDE], FLAT),)
        if V_SMOOTH:
            v_factor = gl.allocate_shared_memory(gl.float32, [D // 8, 8], COLUMNS)
    else:
        k_scale = ()
        k_zero = ()
        for _c in gl.static_range(PIECES):
            k_scale = k_scale + (gl.allocate_shared_memory(dtype, [GROUPS, WIDE], FLAT),)
        for _c in gl.static_range(PIECES):
            k_zero = k_zero + (gl.allocate_shared_memory(dtype, [GROUPS, WIDE], FLAT),)
        if NG == 1:
            v_zero = gl.allocate_shared_memory(dtype, [NP, 32], FLAT)
        else:
            v_zero = gl.allocate_shared_memory(dtype, [NP, 32, NG if BYTES else 8], PLAIN)
            if not BYTES:
                layout: gl.constexpr = gl.BlockedLayout([1, 8], [32, 1], [1, 1], [1, 0])
                ones = gl.full([STEP, 8], 1.0, dtype, layout=layout)
                view_as(v_zero, dtype, [STEP, 8], PLAIN).store(ones)

    heads = Hkv * blocks
    program = gl.program_id(0)
    steps_of, ends = units(packed, length, B, heads, sinks, STEP, ROWS)
    row_index = gl.arange(0, ROWS, layout=ends.type.layout)
    total = gl.max(ends, 0)
    gl.assume(total >= 0)
    share = (total + gl.num_programs(0) - 1) // gl.num_programs(0)
    at = program * share
    stop = gl.minimum(at + share, total)
    if SINGLE:
        b0 = program // heads
        at = gl.sum(gl.where(row_index < b0, steps_of, 0), 0) * heads
        own = gl.sum(gl.where(row_index == b0, steps_of, 0), 0)
        at += (program % heads) * own
        stop = at + own

    r8 = gl.arange(0, 8, layout=HEADS)
    while at < stop:
        # Which (row, head, block of queries), and which of its steps
        b = gl.sum((ends <= at).to(gl.int32), 0)
        before = gl.sum(gl.where(row_index < b, steps_of, 0), 0) * heads
        own = gl.sum(gl.where(row_index == b, steps_of, 0), 0)
        # Divisions of what may be negative take longer
        gl.assume(own > 0)
        gl.assume(at - before >= 0)
        unit = (at - before) // own
        first = at - before - unit * own
        count = gl.minimum(stop - at, own - first)
        h = unit // blocks
        block = unit % blocks
        gl.assume(unit >= 0)
        gl.assume(first >= 0)
        n = gl.load(packed + b).to(gl.int32)
        gl.assume(n >= 0)
        tokens = gl.load(length + b).to(gl.int32)
        steps = (n + STEP - 1) // STEP
        hi = gl.minimum(first + count, steps)

        # What the first step needs is on its way before the query is looked at.
        row_table = table + b * pages
        page = gl.load(row_table + first // SPP, mask=first < hi, other=0)
        next_page = gl.load(
            row_table + gl.minimum(first + 1, hi - 1) // SPP, mask=first < hi, other=0
        )
        sub = first % SPP
        q_at = ((b * Hkv + h) * rows).to(gl.int64) * D
        if BYTES:
            own_unit = scale * LOG2_E
            # On their way while the page's number is
            if MAPPED and K_BLOCK > 1:
                own_q = query_to_rotate(q_ptr + q_at, block, rows, PLANES, D)
            else:
                own_q = own_query(q_ptr + q_at, block, rows, PLANES, D)
        if K_SMOOTH or V_SMOOTH:
            factors = smooth + (b * Hkv + h) * ((K_SMOOTH + V_SMOOTH) * D)
        if K_SMOOTH:
            k_factor = factors_to_rotate(factors, D) if K_BLOCK > 1 else channel_numbers(factors, D)
        at_page = page * Hkv + h
        last = gl.minimum((n - first * STEP) // 32, NP) - 1
        if first < hi:
            fetch_keys(k_words[0].index(0), kw, at_page, sub, KB, SPK, D)
            if PIECES == 1:
                async_copy.commit_group()
            if MAPPED:
                fetch_token_groups(k_scale, ks, at_page, sub, last, NP, 1)
                fetch_centers(k_zero, kz, at_page, sub, last, CENTER, NP, D)
            else:
                fetch_key_groups(k_scale, k_zero, ks, kz, at_page, sub, last, KG, NP, D)
            async_copy.commit_group()

        if LATE:
            # Registers are dear: nothing but exact slots meets the query in this form.
            q = (own_q,) * PIECES
            unit_score = own_unit
        else:
            q, power = load_query(q_ptr + q_at, block, rows, LIFT, APART, D, WIDE)
            unit_score = scale * (LOG2_E / LIFT) * power
        my_q = block * (8 // APART) + r8 // APART
        real = (my_q < rows) & (r8 % APART == 0)
        m = gl.full([8], NOTHING, gl.float32, layout=HEADS)
        mass = gl.zeros([8], gl.float32, layout=HEADS)
        values = ()
        for _g in gl.static_range(D // VW):
            values = values + (gl.zeros([VW, 8], gl.float32, layout=MMA),)
        if first < steps:  # as above, in other words: else what follows would come before the keys
            # Later than the keys: these are wanted sooner, and all programs begin at once.
            if PIECES == 1:
                fetch_values(v_words[0], vw, at_page, sub, VB, SPV, D)
                async_copy.commit_group()
            for c in gl.static_range(1, PIECES):
                fetch_keys(k_words[c].index(0), kw + c * WIDE, at_page, sub, KB, SPK, D)
            fetch_token_groups(v_scale, vs, at_page, sub, last, NP, NG)
            if MAPPED:
                fetch_centers(v_zero, vz, at_page, sub, last, CENTER, NP, D)
                if V_SMOOTH:
                    fetch_channels(v_factor, factors + K_SMOOTH * D, D)
            elif BYTES:
                fetch_token_groups(v_zero, vz, at_page, sub, last, NP, NG)
            else:
                fetch_zeros(v_zero, vz, at_page, sub, last, NP, NG)
            async_copy.commit_group()

            if BYTES:
                query = own_q.to(gl.float32)
                if K_SMOOTH:
                    query = query * k_factor
                if MAPPED and K_BLOCK > 1:
                    query = rotated(query, D, K_BLOCK)
                m8, mass8, sums = attend_packed_bytes(
                    q, pieces(query, D, PIECES), own_unit, unit_score, k_words, v_words,
                    k_scale, k_zero, v_scale, v_zero, kw, ks, kz, vw, vs, vz, row_table, at_page,
                    next_page, Hkv, h, n, first, hi, softcap, D, KB, VB, KG, VG, K_ZERO, V_ZERO,
                    NP, MAPPED, CENTER, TOGETHER,
                )  # fmt: skip
                if MAPPED:
                    sums = unmapped(sums, D, V_BLOCK)
                    if V_SMOOTH:
                        x = ()
                        for c in gl.static_range(PIECES):
                            factor = v_factor
                            if PIECES > 1:
                                factor = v_factor.slice(c * (WIDE // 8), WIDE // 8, dim=0)
                            factor = factor.load(gl.SliceLayout(2, rows_of_heads(WIDE)))
                            x = x + (sums[c] * factor[:, :, None],)
                        sums = x
                    # The map's scale: in what sums are relative to
                    m8 += inverse_scale(V_BLOCK)
                    mass8 *= 2.0 ** -inverse_scale(V_BLOCK)
                m, mass = spread_row(m8, 0.0), spread_row(mass8, 0.0)
                values = ()
                for g in gl.static_range(D // VW):
                    values = values + (spread(sums[g], gl.zeros_like(sums[g]), VW),)
            else:
                m, mass, values = attend_packed(
                    q[0], unit_score * LIFT, k_words[0], v_words[0], k_scale[0], k_zero[0],
                    v_scale, v_zero,
                    kw, ks, kz, vw, vs, vz, row_table, next_page, Hkv, h, n, first, hi, softcap,
                    D, KB, VB, KG, VG, K_ZERO, V_ZERO, NP,
                )  # fmt: skip

        # Exact slots
        tiles = (exact_tokens(tokens, n, sinks) + 31) // 32
        # What is left over goes with the first step: the last may be followed by another unit's.
        rest = tiles - (own - steps) * 2
        tile0 = gl.where(first > steps, (first - steps) * 2 + rest, 0)
        tile1 = gl.where(first + count > steps, (first + count - steps) * 2 + rest, 0)
        if tile0 < tile1:
            at_row = ((b * Hkv + h) * (slots + 1)).to(gl.int64) * D
            seen_to = gl.load(query_position + b * T + my_q % T).to(gl.int32)
            seen_to = gl.minimum(seen_to, tokens - 1)
            if LATE:
                q16 = plain_query(q_ptr + q_at, block, rows, APART, D, WIDE)
                unit_score16 = own_unit
            else:
                q16, unit_score16 = q, unit_score
            m, mass, values = attend_exact(
                m, mass, values, q16, unit_score16, seen_to, k_words, v_words,
                xk + at_row, xv + at_row, tile0, tile1, tokens, n, slots, sinks, softcap, D,
            )  # fmt: skip

        ch = gl.arange(0, VW, layout=gl.SliceLayout(1, MMA))
        if SINGLE:
            head = h * (rows // T) + my_q // T
            m, mass, weight = join_aux(m, mass, s_aux, head, real)
            o_at = q_at + my_q[None, :] * D + ch[:, None]
            for g in gl.static_range(D // VW):
                o = (values[g] * weight[None, :]).to(out.dtype.element_ty)
                gl.store(out + o_at + g * VW, o, mask=real[None, :])
            total_lse = gl.where(mass > 0, (m + gl.log2(mass)) / LOG2_E, NOTHING)
            gl.store(lse + (b * Hkv + h) * rows + my_q, total_lse, mask=real)
        else:
            slot_at = (program + b * heads + unit).to(gl.int64)
            for g in gl.static_range(D // VW):
                at_part = (slot_at * 8 + r8[None, :]) * D + g * VW + ch[:, None]
                gl.store(part + at_part, values[g], mask=(r8 % APART == 0)[None, :])
            gl.store(part_ml + slot_at * 16 + r8, m)
            gl.store(part_ml + slot_at * 16 + 8 + r8, mass)
        at += count
