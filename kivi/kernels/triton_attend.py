"""The kernel of decode attention: scores, softmax and values in one pass over packed pages.

A program takes a block of query rows (the query heads of one KV head times the new tokens) and a
share of the row's tokens, a *chunk* of some planes at a time; the last share ends with the exact
slots. Scores come as [rows, tokens], outputs are accumulated as [channels, rows], so that the
probabilities pass from one product to the other in their registers.

What makes codes numbers is folded into what is small: a per-channel key's scale into the queries, a
per-token value's scale into the probabilities, zeros into one more small product for each of them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kivi.kernels import triton_tile_rows as ops
from kivi.kernels import triton_tiles as tiles
from kivi.kernels.triton_attend_exact import over_exact
from kivi.kernels.triton_tile_rows import LN2, LOG2E, NOTHING
from kivi.spec import PAGE_TOKENS

PAGE = tl.constexpr(PAGE_TOKENS)
# bfloat16 codes are so small that products would leave float32: 2^40 goes into the other operand.
FOLD = tl.constexpr(40)
# Numbers that change as a cache grows: the compiled kernel stays the same.
UNSPECIALIZED = (
    *("factor", "cap", "window", "heads", "columns", "tokens", "rows"),
    *("blocks", "splits", "sinks", "ring", "own_cost"),
)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def attend(
    q,  # [B, Hq, T, D]
    mapped_q,  # likewise, what goes with packed keys that were mapped; else q
    key_words,  # [pages, Hkv, K_BITS, 32, D], or [pages, Hkv, 512, D] where K_BITS is 0
    key_scale,  # channel: [pages, Hkv, 512 / G, D]; token: [pages, Hkv, 512, D / G]
    key_zero,
    value_words,
    value_scale,
    value_zero,
    key_center,  # [pages, Hkv, 512 / K_C, D], what was taken off the mapped keys; or None
    value_center,
    table,  # [B, columns]
    packed,  # [B]
    length,  # [B]
    query_position,  # [B, T]
    exact_key,  # [B, Hkv, sinks + ring + 1, D]
    exact_value,
    s_aux,  # [Hq], or None
    out,  # [rows, DV] where FINAL, else [rows, splits, DV] float32
    lse,  # [rows], natural, where FINAL, else [rows, splits], base 2
    q_row,  # strides of q
    q_head,
    q_token,
    factor,  # of the scores; 2 log2(e) and the softcap divided out
    cap,  # softcap * log2(e)
    window,
    heads,  # Hkv
    columns,
    tokens,  # T
    rows,  # query rows of a KV head: ratio * T
    blocks,  # of rows
    splits,
    sinks,
    ring,
    own_cost,  # of the exact slots, in chunks
    D: tl.constexpr, DV: tl.constexpr,
    K_BITS: tl.constexpr, K_CHANNEL: tl.constexpr, K_G: tl.constexpr, K_OFFSET: tl.constexpr,
    V_BITS: tl.constexpr, V_CHANNEL: tl.constexpr, V_G: tl.constexpr, V_OFFSET: tl.constexpr,
    K_C: tl.constexpr, V_C: tl.constexpr,  # tokens that share a center
    PLANES: tl.constexpr,  # of a chunk
    ROWS: tl.constexpr,  # of a block
    STEP: tl.constexpr,  # tokens of a plane at a time
    ALONE: tl.constexpr,  # the exact slots are the last share's alone: only the others are mapped
    WINDOW: tl.constexpr, CAP: tl.constexpr, FINAL: tl.constexpr,
    DENORMAL: tl.constexpr, FAST: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Attention of a block of query rows over a share of their tokens."""
    DTYPE: tl.constexpr = q.dtype.element_ty
    LINEAR: tl.constexpr = tiles.linear_bits(DTYPE, DENORMAL)
    # Channels in groups, each a tile of its own, where scales are per token.
    K_TOKEN: tl.constexpr = K_BITS > 0 and not K_CHANNEL
    V_TOKEN: tl.constexpr = V_BITS > 0 and not V_CHANNEL
    KG: tl.constexpr = K_G if K_TOKEN else D
    VG: tl.constexpr = V_G if V_TOKEN else DV
    KN: tl.constexpr = D // KG
    VN: tl.constexpr = DV // VG
    K_ROW: tl.constexpr = K_BITS * 32 if K_BITS > 0 else PAGE
    V_ROW: tl.constexpr = V_BITS * 32 if V_BITS > 0 else PAGE
    CHUNK: tl.constexpr = 32 * PLANES
    CHUNKS: tl.constexpr = PAGE // CHUNK  # of a page
    STEPS: tl.constexpr = 32 // STEP
    # Planes that share a scale, and scales of a chunk, where scales are per channel.
    K_SHARE: tl.constexpr = max(1, min(PLANES, K_G // 32))
    V_SHARE: tl.constexpr = max(1, min(PLANES, V_G // 32))
    K_CENTERS: tl.constexpr = max(1, min(PLANES, K_C // 32))
    # Rounding a scaled query costs less where codes count from their middle.
    MIDDLE: tl.constexpr = 0.0 if DTYPE.is_fp32() else (2**K_BITS - 1) / 2
    CENTRE: tl.constexpr = K_OFFSET if key_zero is None else MIDDLE
    HALF: tl.constexpr = DTYPE.is_fp16()
    SMALL: tl.constexpr = DTYPE.is_bf16() and LINEAR > 0
    # float16: so that a query times a scale stays in range, 8e6 at most.
    K_FOLD: tl.constexpr = FOLD if SMALL else (-7 if HALF and K_CHANNEL else 0)
    CENTRE_UNIT: tl.constexpr = CENTRE * tiles.power(-K_FOLD)
    V_FOLD: tl.constexpr = FOLD if SMALL else 0
    # float16: probabilities up to 2^15 keep their digits, times a scale they stay below 2^14.
    BIAS: tl.constexpr = 12.0 if HALF else (40.0 if SMALL and V_BITS > 0 else 0.0)
    SPARE: tl.constexpr = (1.0 if V_BITS == 3 else 3.0) if HALF else 0.0
    V_UNIT: tl.constexpr = tiles.unit_power(DTYPE, LINEAR)
    AS_VALUES: tl.constexpr = V_TOKEN and DTYPE.is_fp32()  # see ops.as_values

    program = tl.program_id(0)
    split, program = program % splits, program // splits
    block, pair = program % blocks, program // blocks
    b, h = pair // heads, pair % heads
    n = tl.load(packed + b).to(tl.int32)

    # As 16 rows if they are 8: then they are laid out as tensor cores take them.
    r = block * ROWS + tl.arange(0, max(16, ROWS))
    at = (h * (rows // tokens) + r // tokens).to(tl.int64) * q_head + r % tokens * q_token
    at += b.to(tl.int64) * q_row
    if ALONE:
        q = tl.where(split < splits - 1, mapped_q, q)
    query = ops.load_queries(q + at, (r < rows) & (tl.arange(0, max(16, ROWS)) < ROWS), KN, KG)
    # Only loads and constants go into what is scaled: else it takes a detour through memory.
    folded = ops.times_power_all(query, KN, K_FOLD, WIDE)
    if K_CHANNEL:
        ones = ops.cast(tl.full((8, tiles.padded(D)), 1.0, tl.float32), DTYPE, WIDE)
        to_scale = ops.top_half(folded[0]) if ROWS == 8 else folded[0]

    r = block * ROWS + tl.arange(0, ROWS)
    real = r < rows
    head = h * (rows // tokens) + r // tokens
    if K_TOKEN:
        total = ops.sums(query, KN, ROWS)
    query_position += b * tokens
    position = tl.load(query_position + r % tokens, mask=real, other=2**31 - 1).to(tl.int32)

    chunks = tl.cdiv(n, CHUNK)
    begin = 0
    if WINDOW:
        begin = tl.maximum(tl.min(position, 0) - window + 1 - sinks, 0) // CHUNK
        begin = tl.minimum(begin, chunks)
    if ALONE:
        share = tl.where(split < splits - 1, tl.cdiv(chunks - begin, splits - 1), 0)
        begin += split * tl.cdiv(chunks - begin, splits - 1)
    else:
        share = tl.cdiv(chunks - begin + own_cost, splits)
        begin += split * share
    end = tl.minimum(begin + share, chunks)

    m = tl.full((ROWS,), NOTHING, tl.float32)
    weight = tl.zeros((ROWS,), tl.float32)
    bound = -SPARE
    acc = ops.zeros_of(VN, tiles.padded(VG), ROWS)
    zero_acc = tl.zeros((tiles.padded(VN), ROWS), tl.float32)
    page = tl.load(table + b * columns + begin // CHUNKS, mask=begin < end, other=0)
    for it in range(begin * STEPS, end * STEPS):
        chunk = it // STEPS
        base = page * heads + h
        following = (it + 1) // STEPS
        page = tl.load(table + b * columns + following // CHUNKS, mask=following < end, other=0)
        plane = chunk % CHUNKS * PLANES
        # Planes that are not written read the last one that is, and get no weight.
        last = tl.minimum(n // 32 - chunk * PLANES, PLANES) - 1
        first = it % STEPS * STEP
        row = first + tl.arange(0, STEP)  # of a plane
        keys = key_words + base * (K_ROW * D)
        values = value_words + base * (V_ROW * DV)

        # All loads first: the products between them would make each wait for its own.
        k_words = tiles.load_words(keys, plane, row, KN, KG, K_BITS, PLANES, LINEAR, FAST)
        if K_CHANNEL:
            scales = key_scale + base * (PAGE // K_G * D)
            k_scales = tiles.channel_rows(scales, plane, last, first, K_G, K_SHARE, PLANES, D)
            if key_zero is not None:
                i = ((tl.minimum(tl.arange(0, 8) * K_SHARE, last) + plane) * 32 + first) // K_G
                zeros = key_zero + base * (PAGE // K_G * D)
                k_zeros = tiles.load_tile(zeros, i, D, D).to(DTYPE)
                if CENTRE > 0:
                    steps = tiles.load_tile(scales, i, D, D)
                    k_zeros = ops.plus_times(k_zeros, steps, CENTRE, WIDE)
        if K_TOKEN:
            scales = key_scale + base * (PAGE * KN)
            k_scales = tiles.token_rows(scales, plane, last, row, KN, PLANES)
            if key_zero is not None:
                zeros = key_zero + base * (PAGE * KN)
                k_zeros = tiles.token_rows(zeros, plane, last, row, KN, PLANES)
            if key_center is not None:
                centers = key_center + base * (PAGE // K_C * D)
                i = tl.minimum(tl.arange(0, 8) * K_CENTERS, last) + plane
                k_centers = tiles.load_tile(centers, i * 32 // K_C, D, D).to(DTYPE)
                center_scores = ops.rows_dot(query[0], k_centers, ROWS, WIDE)
        v_words = tiles.load_words(values, plane, row, VN, VG, V_BITS, PLANES, LINEAR, FAST)
        if V_CHANNEL:
            scales = value_scale + base * (PAGE // V_G * DV)
            v_scales = tiles.channel_rows(scales, plane, last, first, V_G, V_SHARE, PLANES, DV)
            if value_zero is not None:
                zeros = value_zero + base * (PAGE // V_G * DV)
                v_zeros = tiles.channel_rows(zeros, plane, last, first, V_G, V_SHARE, PLANES, DV)
        if V_TOKEN:
            scales = value_scale + base * (PAGE * VN)
            if value_zero is not None:
                zeros = value_zero + base * (PAGE * VN)
                v_zeros = tiles.token_zeros(zeros, plane, last, row, VN, PLANES, AS_VALUES)
            if BIAS > 0:
                # This also brings the scales near; kept until they are used, they fill registers.
                size = tiles.largest(scales, plane, last, first, STEP, VN, PLANES)
                bound = tl.maximum(bound, tl.log2(size))

        # Scores, in base 2.
        scores = ()
        if K_CHANNEL:
            zero_scores = tl.zeros((ROWS, 8), tl.float32)
            if key_zero is not None:
                zero_scores = ops.rows_dot(query[0], k_zeros, ROWS, WIDE) * factor
        for i in tl.static_range(PLANES):
            nowhere = tl.where(i <= last, 0.0, float("-inf"))
            up = tiles.power(-K_FOLD - tiles.code_power(K_BITS, 0, i, LINEAR, DTYPE))
            if K_CHANNEL:
                if i % K_SHARE == 0:
                    scaled = ops.times(to_scale, k_scales[i // K_SHARE][None, :], FAST, WIDE)
                    scaled = ops.pad16(scaled) if ROWS == 8 else scaled
                    column = tl.arange(0, 8)[None, :] == i // K_SHARE
                    if CENTRE > 0:
                        y = ops.rows_dot(scaled, ones, ROWS, WIDE) * (factor * CENTRE_UNIT)
                        zero_scores -= tl.where(column, y, 0.0)
                    zero = tl.sum(tl.where(column, zero_scores, 0.0), 1)
                x = ops.rows_dot_codes(scaled, k_words[0], i, K_BITS, LINEAR, ROWS, FAST, WIDE)
                x = x * (factor * up)
                x += (zero if CAP else zero + nowhere)[:, None]
            elif K_TOKEN:
                x = tl.zeros((ROWS, STEP), tl.float32)
                for g in tl.static_range(KN):
                    words = k_words[g]
                    y = ops.rows_dot_codes(folded[g], words, i, K_BITS, LINEAR, ROWS, FAST, WIDE)
                    scale = k_scales[i][g].to(tl.float32)[None, :]
                    if key_zero is None:
                        x += (y * up - (K_OFFSET * total[g])[:, None]) * scale
                    else:
                        zero = k_zeros[i][g].to(tl.float32)[None, :]
                        x += y * up * scale + zero * total[g][:, None]
                if key_center is not None:
                    column = tl.arange(0, 8)[None, :] == i // K_CENTERS
                    x += tl.sum(tl.where(column, center_scores, 0.0), 1)[:, None]
                x = x * factor
            else:
                token = (plane + tl.minimum(i, last)) * 32 + row
                x = ops.rows_dot(query[0], tiles.load_tile(keys, token, D, D), ROWS, WIDE) * factor
            if CAP:
                x = ops.capped(x, cap)
            if CAP or not K_CHANNEL:
                x += nowhere
            if WINDOW:
                token = sinks + chunk * CHUNK + i * 32 + row
                x = tl.where(token[None, :] > position[:, None] - window, x, float("-inf"))
            scores += (x,)
        best = ops.highest(scores, PLANES)
        m, alpha = ops.raised(m, tl.max(best, 1) + (bound - BIAS))
        acc = ops.rescaled(acc, alpha, VN)
        zero_acc = zero_acc * alpha[None, :]

        if V_TOKEN:
            v_scales = tiles.token_rows(scales, plane, last, row, VN, PLANES)
        likely = tl.zeros_like(best)
        for i in tl.static_range(PLANES):
            p = tl.exp2(scores[i] - m[:, None])
            likely += p
            p_t = tl.trans(p)
            if V_BITS == 0:
                token = (plane + tl.minimum(i, last)) * 32 + row
                x = tl.trans(tiles.load_tile(values, token, DV, DV))
                acc = (ops.dot(x, ops.cast(p_t, DTYPE, WIDE), acc[0], WIDE),)
            if value_center is not None:
                group = (plane + tl.minimum(i, last)) * 32 // V_C
                center = tiles.load_row(value_center + (base * (PAGE // V_C) + group) * DV, DV)
                center = center.to(tl.float32) * tiles.power(-V_FOLD)
                mass = tl.sum(p, 1) * tiles.power(V_FOLD - V_UNIT)
                acc = (acc[0] + center[:, None] * mass[None, :],)
            if V_TOKEN and value_zero is not None and not AS_VALUES:
                zero_acc = ops.dot(v_zeros[i].to(DTYPE), ops.cast(p_t, DTYPE, WIDE), zero_acc, WIDE)
            if V_CHANNEL and i % V_SHARE == 0:
                group_acc = tl.zeros((tiles.padded(VG), ROWS), tl.float32)
                group_sum = tl.zeros((ROWS,), tl.float32)
            for part in tl.static_range(tiles.part_count(V_BITS)):
                down = tiles.power(tiles.weight_power(V_BITS, part, i, LINEAR, DTYPE))
                w = ops.cast(p_t * down, DTYPE, WIDE)
                new_acc = ()
                for g in tl.static_range(VN):
                    x = tl.trans(tiles.codes(v_words[g], i, V_BITS, part, LINEAR, FAST, DTYPE))
                    if AS_VALUES:
                        zero = None if value_zero is None else v_zeros[i][g]
                        x = ops.as_values(x, v_scales[i][g], zero, V_OFFSET, part)
                        new_acc += (ops.dot(x, w, acc[g], WIDE),)
                    elif V_TOKEN:
                        y = ops.times(w, v_scales[i][g][:, None], FAST, WIDE)
                        new_acc += (ops.dot(x, y, acc[g], WIDE),)
                        if value_zero is None and part == 0:
                            # Of what was rounded, so that it cancels as the codes do.
                            x = ops.row_of(g, 1 / down, tiles.padded(VN), STEP, DTYPE, WIDE)
                            zero_acc = ops.dot(x, y, zero_acc, WIDE)
                    else:
                        group_acc = ops.dot(x, w, group_acc, WIDE)
                if V_TOKEN:
                    acc = new_acc
            if V_CHANNEL:
                group_sum += tl.sum(p, 1)
                if i % V_SHARE == V_SHARE - 1:
                    scale = v_scales[i // V_SHARE].to(tl.float32)
                    x = group_acc * tiles.power(V_UNIT - V_FOLD)
                    x *= (scale * tiles.power(V_FOLD))[:, None]
                    if value_zero is None:
                        zero = -V_OFFSET * scale
                    else:
                        zero = v_zeros[i // V_SHARE].to(tl.float32)
                    acc = (acc[0] + x + zero[:, None] * group_sum[None, :],)
        weight = weight * alpha + tl.sum(likely, 1)

    if V_TOKEN:
        if value_zero is None:
            zero_acc *= -V_OFFSET
        acc = ops.in_values(acc, zero_acc, VN, V_UNIT - V_FOLD, V_FOLD)

    # The exact slots: sinks, then the ring.
    newest = tl.load(length + b).to(tl.int32) - 1 - sinks
    own = pair.to(tl.int64) * (sinks + ring + 1)
    m, weight, acc = over_exact(
        m, weight, acc, query, exact_key + own * D, exact_value + own * DV,
        tl.where(split == splits - 1, sinks + ring, 0), position, newest, n, sinks, ring,
        factor, cap, window, bound - BIAS, D, KG, DV, VG, ROWS, STEP, WINDOW, CAP, WIDE,
    )  # fmt: skip

    total_lse, share_of = ops.normalised(m, weight)
    index = pair.to(tl.int64) * rows + r
    if FINAL:
        if s_aux is not None:
            aux = tl.load(s_aux + head, mask=real, other=0.0).to(tl.float32) * LOG2E
            total_lse, keep = ops.join(total_lse, aux)
            share_of *= keep
        tl.store(lse + index, tl.where(total_lse > NOTHING, total_lse * LN2, NOTHING), mask=real)
    else:
        index = index * splits + split
        tl.store(lse + index, total_lse, mask=real)
    for g in tl.static_range(VN):
        c = tl.arange(0, tiles.padded(VG))
        x = ops.saturated(acc[g] * share_of[None, :], out.dtype.element_ty, WIDE and FINAL)
        at = out + index[None, :] * DV + (g * VG + c)[:, None]
        tl.store(at, x, mask=real[None, :] & (c[:, None] < VG))
