"""extend_attention on Hopper, for the formats that matter: what makes it about as fast as dense.

A program takes 128 query rows of one KV head and a share of what they see, tiles of 128 tokens. Its
warp groups have different work: two compute attention of 64 rows each, one brings tiles of keys
into shared memory, one those of values: dequantized where they come from pages. Dequantizing so
costs issue slots that the matrix units leave free, and no time of those who wait for them.

Where packed tokens are mapped, pages take a query of their own, mapped first; what they give is
mapped back before exact tokens follow.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from kivi.kernels.triton_hopper_steps import consume, map_queries, produce
from kivi.kernels.triton_tile_gluon import FLAT
from kivi.kernels.triton_tile_hopper import put_map

UNSPECIALIZED = (
    *("factor", "cap", "window", "heads", "columns", "tokens", "ratio", "blocks", "splits"),
    *("sinks", "slots"),
)


@gluon.jit(do_not_specialize=UNSPECIALIZED)
def extend_hopper(
    q,  # [B, Hq, T, D]
    k,  # [B, Hkv, T, D]
    v,
    key_words,  # [pages, Hkv, KB, 32, D]
    key_scale,  # K_CHANNEL: [pages, Hkv, 512 / KG, D]; else [pages, Hkv, 512, D / KG]
    key_zero,  # as key_scale, read where K_OFFSET is 0; or the centers, [pages, Hkv, 512 / K_C, D]
    value_words,
    value_scale,  # [pages, Hkv, 512, D / VG]
    value_zero,
    smooth,  # [B, Hkv, n], of keys where K_SMOOTH, then of values where V_SMOOTH
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
    window,
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
    K_CHANNEL: gl.constexpr,
    K_OFFSET: gl.constexpr,  # the code of 0 where no zeros are stored; else 0
    K_C: gl.constexpr,  # tokens that share a center; 0: none
    K_BLOCK: gl.constexpr,  # channels that were rotated together; 1: none
    K_SMOOTH: gl.constexpr,  # whether channels were divided by factors
    VB: gl.constexpr,
    VG: gl.constexpr,
    V_OFFSET: gl.constexpr,
    V_C: gl.constexpr,
    V_BLOCK: gl.constexpr,
    V_SMOOTH: gl.constexpr,
    WINDOW: gl.constexpr,
    CAP: gl.constexpr,
    AUX: gl.constexpr,
    VALID: gl.constexpr,
    FINAL: gl.constexpr,
    STAGES: gl.constexpr,  # tiles of keys, and of values, in shared memory
    CONSUMER_REGISTERS: gl.constexpr,
    PRODUCER_REGISTERS: gl.constexpr,
):
    """Attention of 128 query rows over a share of their tokens."""
    DTYPE: gl.constexpr = q.dtype.element_ty
    SHARED: gl.constexpr = gl.NVMMASharedLayout(128, 16)
    KEYS_MAPPED: gl.constexpr = K_BLOCK > 1 or K_SMOOTH
    VALUES_MAPPED: gl.constexpr = V_BLOCK > 1 or V_SMOOTH
    MAPPED: gl.constexpr = KEYS_MAPPED or VALUES_MAPPED
    program = gl.program_id(0)
    split, program = program % splits, program // splits
    # The last tokens see the most: their blocks begin first.
    block, pair = blocks - 1 - program % blocks, program // blocks
    b, h = pair // heads, pair % heads
    final = gl.minimum((block * 128 + 127) // ratio, tokens - 1)
    many = gl.cdiv(gl.load(packed + b).to(gl.int32), 128)
    own = gl.cdiv(slots, 128)
    # Tiles that no query sees come first among the packed ones, and first among the new.
    begin, skipped = b * 0, b * 0
    if WINDOW:
        first = block * 128 // ratio
        oldest = gl.load(query_position + b.to(gl.int64) * tokens + first).to(gl.int32) - window + 1
        begin = gl.minimum(gl.maximum(oldest - sinks, 0) // 128, many)
        if not VALID:
            skipped = gl.maximum(first - window + 1, 0) // 128
    end = many + own + gl.cdiv(final + 1, 128) - skipped
    share = gl.cdiv(end - begin, splits)
    low = gl.minimum(begin + split * share, end)
    high = gl.minimum(low + share, end)

    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    c = gl.arange(0, D, layout=gl.SliceLayout(0, layout))
    queries = gl.allocate_shared_memory(DTYPE, [4 if MAPPED else 2, 64, D], SHARED)
    for half in gl.static_range(2):
        r = block * 128 + half * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, layout))
        token, head = r // ratio, h * ratio + r % ratio
        at = q + b.to(gl.int64) * q_row + head.to(gl.int64) * q_head + token.to(gl.int64) * q_token
        real = token < tokens
        if VALID:
            real &= gl.load(valid + b.to(gl.int64) * tokens + token, mask=real, other=0) != 0
        x = gl.load(at[:, None] + c[None, :], mask=real[:, None], other=0.0)
        queries.index(half).store(x)
    matrix = queries.index(0)  # not looked at
    if MAPPED:
        matrix = gl.allocate_shared_memory(DTYPE, [D, D], SHARED)
        smooth += (b * heads + h).to(gl.int64) * ((K_SMOOTH + V_SMOOTH) * D)
    if KEYS_MAPPED:
        put_map(matrix, smooth, D, K_BLOCK, K_SMOOTH, True)
        hopper.fence_async_shared()
        gl.thread_barrier()
        map_queries(queries, matrix, D)
        gl.thread_barrier()
    if VALUES_MAPPED:
        put_map(matrix, smooth + K_SMOOTH * D, D, V_BLOCK, V_SMOOTH, False)
    keys = gl.allocate_shared_memory(DTYPE, [STAGES, 128, D], SHARED)
    values = gl.allocate_shared_memory(DTYPE, [STAGES, 128, D], SHARED)
    bounds = gl.allocate_shared_memory(gl.int32, [STAGES, 128], FLAT)
    keys_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    keys_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    values_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    values_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(keys_ready.index(i), count=1)
        mbarrier.init(keys_free.index(i), count=2)
        mbarrier.init(values_ready.index(i), count=1)
        mbarrier.init(values_free.index(i), count=2)
    hopper.fence_async_shared()
    gl.thread_barrier()

    wide_b, wide_h = b.to(gl.int64), h.to(gl.int64)
    new_k = k + wide_b * k_row + wide_h * k_head
    new_v = v + wide_b * v_row + wide_h * v_head
    share_of = (low, high, many, own, skipped, packed, length)
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
            (consume, (queries, 0, matrix, keys, values, bounds, barriers, share_of, where,
                       rows, results, row, factor, cap, window,
                       D, KEYS_MAPPED, VALUES_MAPPED, WINDOW, CAP, AUX, VALID, STAGES, FINAL)),
            (consume, (queries, 1, matrix, keys, values, bounds, barriers, share_of, where,
                       rows, results, row + 64, factor, cap, window,
                       D, KEYS_MAPPED, VALUES_MAPPED, WINDOW, CAP, AUX, VALID, STAGES, FINAL)),
            (produce, (keys, bounds, keys_ready, keys_free, share_of, where, k_source,
                       D, KB, KG, K_CHANNEL, K_OFFSET, K_C, True, VALID, STAGES)),
            (produce, (values, bounds, values_ready, values_free, share_of, where, v_source,
                       D, VB, VG, False, V_OFFSET, V_C, False, VALID, STAGES)),
        ],
        [4, 4, 4],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS, PRODUCER_REGISTERS],
    )
    # fmt: on
