"""extend_attention on Hopper, for the formats that matter: what makes it about as fast as dense.

A program takes 128 query rows of one KV head and a share of what they see, tiles of 128 tokens. Its
warp groups have different work: two compute attention of 64 rows each, one brings tiles of keys
into shared memory, one those of values: dequantized where they come from pages. Dequantizing so
costs issue slots that the matrix units leave free, and no time of those who wait for them.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from kivi.kernels.triton_gluon_steps import LOG2_E, NOTHING
from kivi.kernels.triton_tile_gluon import FLAT
from kivi.kernels.triton_tile_hopper import (
    put_bounds_of_exact,
    put_bounds_of_new,
    put_bounds_of_packed,
    put_exact,
    put_new,
    put_packed,
)

LN_2 = gl.constexpr(0.6931471805599453)
UNSPECIALIZED = (
    *("factor", "cap", "heads", "columns", "tokens", "ratio", "blocks", "splits"),
    *("sinks", "slots"),
)


@gluon.constexpr_function
def mma(columns):
    """What a warp group computes at once, `[64, columns]` float32."""
    return gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, columns, 16]
    )


@gluon.jit
def signal(barrier):
    """This warp group is done with a tile: written, or read."""
    hopper.fence_async_shared()
    gl.thread_barrier()
    mbarrier.arrive(barrier, count=1)


@gluon.jit
def produce(
    buffers,  # [2, 128, D]
    bounds,  # [2, 128]: with the keys, the first position that sees a token
    ready,
    free,
    share,
    where,
    source,
    D: gl.constexpr,
    bits: gl.constexpr,
    G: gl.constexpr,
    channel: gl.constexpr,
    offset: gl.constexpr,
    VALID: gl.constexpr,
):
    """Bring the tiles of keys, or those of values, one after the other."""
    low, high, many, own, packed, length = share
    b, h, heads, tokens, slots, sinks = where
    words, scale, zero, table, columns, exact_tokens, new, stride, query_position, valid = source
    query_position += b.to(gl.int64) * tokens
    if VALID:
        valid += b.to(gl.int64) * tokens
    else:
        valid = None
    table += b.to(gl.int64) * columns
    row = b * heads + h
    n = gl.load(packed + b).to(gl.int32)
    held = gl.load(length + b).to(gl.int32)
    meta: gl.constexpr = 512 // G * D if channel else 512 * (D // G)
    exact_tokens += row.to(gl.int64) * (slots + 1) * D
    page = gl.load(table + low // 4, mask=low < many, other=0)
    for i in range(low, high):
        k = i - low
        buffer = buffers.index(k % 2)
        mbarrier.wait(free.index(k % 2), k // 2 % 2 ^ 1)
        if i < many:
            base = page * heads + h
            page = gl.load(table + (i + 1) // 4, mask=i + 1 < many, other=0)
            put_packed(
                buffer,
                words + base * (bits * 32 * D),
                scale + base * meta,
                zero + base * meta,
                i % 4,
                gl.minimum(n // 32 - 1 - i // 4 * 16, 15),
                D,
                bits,
                G,
                channel,
                offset,
            )
            if channel:
                put_bounds_of_packed(bounds.index(k % 2), i, n)
        elif i < many + own:
            put_exact(buffer, exact_tokens, i - many, held, n, slots, sinks, D)
            if channel:
                put_bounds_of_exact(bounds.index(k % 2), i - many, held, n, slots, sinks)
        else:
            j = i - many - own
            put_new(buffer, new, stride, valid, j, tokens, D)
            if channel:
                put_bounds_of_new(bounds.index(k % 2), query_position, valid, j, tokens)
        signal(ready.index(k % 2))


@gluon.jit
def consume(
    q,  # [64, D]
    keys,  # [2, 128, D]
    values,
    bounds,
    barriers,
    share,
    where,
    rows,
    results,
    row,  # the first of 64
    factor,
    cap,
    D: gl.constexpr,
    CAP: gl.constexpr,
    AUX: gl.constexpr,
    VALID: gl.constexpr,
    FINAL: gl.constexpr,
):
    """Attention of 64 query rows over the tiles."""
    keys_ready, keys_free, values_ready, values_free = barriers
    low, high, many, own, packed, _length = share
    b, h, heads, tokens, _slots, _sinks = where
    query_position, ratio, splits, split = rows
    s_aux, out, lse = results
    SCORES: gl.constexpr = mma(128)
    SUMS: gl.constexpr = mma(D)
    PROBABILITIES: gl.constexpr = gl.DotOperandLayout(0, SUMS, 2)
    n = gl.load(packed + b).to(gl.int32)
    query_position += b.to(gl.int64) * tokens
    r = row + gl.arange(0, 64, layout=gl.SliceLayout(1, SCORES))
    token = r // ratio
    position = gl.load(query_position + token, mask=token < tokens, other=0).to(gl.int32)
    # New tiles before this one are seen by all rows.
    plain = row // ratio + 1
    unit = factor
    if CAP:
        unit = 1.0

    m = gl.full([64], NOTHING, gl.float32, layout=gl.SliceLayout(1, SCORES))
    total = gl.full([64], 0.0, gl.float32, layout=gl.SliceLayout(1, SCORES))
    none = gl.zeros([64, 128], gl.float32, layout=SCORES)
    sums = gl.zeros([64, D], gl.float32, layout=SUMS)
    for i in range(low, high):
        k = i - low
        mbarrier.wait(keys_ready.index(k % 2), k // 2 % 2)
        s = hopper.warpgroup_mma(
            q, keys.index(k % 2).permute((1, 0)), none, use_acc=False, is_async=True
        )
        s = hopper.warpgroup_mma_wait(0, deps=(s,))
        if CAP:
            s = cap - 2 * cap / (gl.exp2(s * factor) + 1)
        j = i - many - own  # tile of new tokens
        hidden = (j >= 0) & (VALID or (j + 1) * 128 > plain)
        if ((i + 1) * 128 > n) & (j < 0) | hidden:
            bound = bounds.index(k % 2).load(gl.SliceLayout(0, SCORES))
            s = gl.where(bound[None, :] <= position[:, None], s, NOTHING)
        gl.thread_barrier()
        mbarrier.arrive(keys_free.index(k % 2), count=1)
        new_m = gl.maximum(m, gl.max(s, 1))
        # Nothing seen yet: probabilities of what is hidden must be 0, not 1.
        base = gl.where(new_m > NOTHING, new_m, 0.0) * unit
        p = gl.exp2(s * unit - base[:, None])
        alpha = gl.exp2((m - new_m) * unit)
        total = total * alpha + gl.sum(p, 1)
        m = new_m
        alpha = gl.convert_layout(alpha, gl.SliceLayout(1, SUMS), assert_trivial=True)
        sums = sums * alpha[:, None]
        p = gl.convert_layout(p.to(q.dtype), PROBABILITIES)
        mbarrier.wait(values_ready.index(k % 2), k // 2 % 2)
        sums = hopper.warpgroup_mma(p, values.index(k % 2), sums, is_async=True)
        sums = hopper.warpgroup_mma_wait(0, deps=(sums,))
        gl.thread_barrier()
        mbarrier.arrive(values_free.index(k % 2), count=1)

    m = gl.convert_layout(m, gl.SliceLayout(1, SUMS), assert_trivial=True)
    total = gl.convert_layout(total, gl.SliceLayout(1, SUMS), assert_trivial=True)
    some = total > 0
    safe = gl.where(some, total, 1.0)
    keep = gl.where(some, 1 / safe, 0.0)
    logs = gl.where(some, m * unit + gl.log2(safe), NOTHING)
    r = row + gl.arange(0, 64, layout=gl.SliceLayout(1, SUMS))
    token = r // ratio
    head = h * ratio + r % ratio
    real = token < tokens
    index = (b.to(gl.int64) * heads * ratio + head) * tokens + token
    if FINAL:
        if AUX:
            aux = gl.load(s_aux + head, mask=real, other=0.0).to(gl.float32) * LOG2_E
            top = gl.maximum(logs, aux)
            kept = gl.exp2(logs - top)
            whole = kept + gl.exp2(aux - top)
            logs = top + gl.log2(whole)
            keep *= kept / whole
        gl.store(lse + index, gl.where(logs > NOTHING, logs * LN_2, NOTHING), mask=real)
    else:
        index = index * splits + split
        gl.store(lse + index, logs, mask=real)
    c = gl.arange(0, D, layout=gl.SliceLayout(0, SUMS))
    x = sums * keep[:, None]
    if out.dtype.element_ty == gl.float16:
        x = gl.minimum(gl.maximum(x, -65504.0), 65504.0)
    at = out + index[:, None] * D + c[None, :]
    gl.store(at, x.to(out.dtype.element_ty), mask=real[:, None])


@gluon.jit(do_not_specialize=UNSPECIALIZED)
def extend_hopper(
    q,  # [B, Hq, T, D]
    k,  # [B, Hkv, T, D]
    v,
    key_words,  # [pages, Hkv, KB, 32, D]
    key_scale,  # [pages, Hkv, 512 / KG, D]
    key_zero,  # read where K_OFFSET is 0
    value_words,
    value_scale,  # [pages, Hkv, 512, D / VG]
    value_zero,
    table,  # [B, columns]
    packed,  # [B]
    exact_key,  # [B, Hkv, slots + 1, D]
    exact_value,
    length,  # [B]
    query_position,  # [B, T]
    valid,  # [B, T] uint8 where VALID
    s_aux,  # [Hq] where AUX
    out,  # [rows, D] where FINAL, else [rows, splits, D] float32
    lse,  # [rows], natural, where FINAL, else [rows, splits], base 2
    q_row,
    q_head,
    q_token,
    k_row,
    k_head,
    k_token,
    v_row,
    v_head,
    v_token,
    factor,  # of the scores; log2(e), or 2 log2(e) and the softcap divided out; not negative
    cap,  # softcap * log2(e)
    heads,
    columns,
    tokens,
    ratio,
    blocks,
    splits,
    sinks,
    slots,
    D: gl.constexpr,
    KB: gl.constexpr,
    KG: gl.constexpr,
    K_OFFSET: gl.constexpr,  # symmetric: the code of 0; else 0
    VB: gl.constexpr,
    VG: gl.constexpr,
    V_OFFSET: gl.constexpr,
    CAP: gl.constexpr,
    AUX: gl.constexpr,
    VALID: gl.constexpr,
    FINAL: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr,
    PRODUCER_REGISTERS: gl.constexpr,
):
    """Attention of 128 query rows over a share of their tokens."""
    DTYPE: gl.constexpr = q.dtype.element_ty
    SHARED: gl.constexpr = gl.NVMMASharedLayout(128, 16)
    program = gl.program_id(0)
    split, program = program % splits, program // splits
    # The last tokens see the most: their blocks begin first.
    block, pair = blocks - 1 - program % blocks, program // blocks
    b, h = pair // heads, pair % heads
    final = gl.minimum((block * 128 + 127) // ratio, tokens - 1)
    many = gl.cdiv(gl.load(packed + b).to(gl.int32), 128)
    own = gl.cdiv(slots, 128)
    end = many + own + gl.cdiv(final + 1, 128)
    share = gl.cdiv(end, splits)
    low = gl.minimum(split * share, end)
    high = gl.minimum(low + share, end)

    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    c = gl.arange(0, D, layout=gl.SliceLayout(0, layout))
    queries = gl.allocate_shared_memory(DTYPE, [2, 64, D], SHARED)
    for half in gl.static_range(2):
        r = block * 128 + half * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, layout))
        token, head = r // ratio, h * ratio + r % ratio
        at = q + b.to(gl.int64) * q_row + head.to(gl.int64) * q_head + token.to(gl.int64) * q_token
        real = token < tokens
        if VALID:
            real &= gl.load(valid + b.to(gl.int64) * tokens + token, mask=real, other=0) != 0
        x = gl.load(at[:, None] + c[None, :], mask=real[:, None], other=0.0)
        queries.index(half).store(x)
    keys = gl.allocate_shared_memory(DTYPE, [2, 128, D], SHARED)
    values = gl.allocate_shared_memory(DTYPE, [2, 128, D], SHARED)
    bounds = gl.allocate_shared_memory(gl.int32, [2, 128], FLAT)
    keys_ready = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    keys_free = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    values_ready = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    values_free = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(keys_ready.index(i), count=1)
        mbarrier.init(keys_free.index(i), count=2)
        mbarrier.init(values_ready.index(i), count=1)
        mbarrier.init(values_free.index(i), count=2)
    hopper.fence_async_shared()
    gl.thread_barrier()

    wide_b, wide_h = b.to(gl.int64), h.to(gl.int64)
    new_k = k + wide_b * k_row + wide_h * k_head
    new_v = v + wide_b * v_row + wide_h * v_head
    share_of = (low, high, many, own, packed, length)
    where = (b, h, heads, tokens, slots, sinks)
    barriers = (keys_ready, keys_free, values_ready, values_free)
    rows = (query_position, ratio, splits, split)
    results = (s_aux, out, lse)
    row = block * 128
    # fmt: off
    k_source = (key_words, key_scale, key_zero, table, columns, exact_key, new_k, k_token,
                query_position, valid)
    v_source = (value_words, value_scale, value_zero, table, columns, exact_value, new_v, v_token,
                query_position, valid)
    gl.warp_specialize(
        [
            (consume, (queries.index(0), keys, values, bounds, barriers, share_of, where, rows,
                       results, row, factor, cap, D, CAP, AUX, VALID, FINAL)),
            (consume, (queries.index(1), keys, values, bounds, barriers, share_of, where, rows,
                       results, row + 64, factor, cap, D, CAP, AUX, VALID, FINAL)),
            (produce, (keys, bounds, keys_ready, keys_free, share_of, where, k_source,
                       D, KB, KG, True, K_OFFSET, VALID)),
            (produce, (values, bounds, values_ready, values_free, share_of, where, v_source,
                       D, VB, VG, False, V_OFFSET, VALID)),
        ],
        [4, 4, 4],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS, PRODUCER_REGISTERS],
    )
    # fmt: on
