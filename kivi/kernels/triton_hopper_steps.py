"""What the warp groups of the Hopper kernel do: bring tiles, and compute attention over them."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from kivi.kernels.triton_gluon_steps import LOG2_E, NOTHING
from kivi.kernels.triton_tile_hopper import (
    put_bounds_of_exact,
    put_bounds_of_new,
    put_bounds_of_packed,
    put_exact,
    put_new,
    put_packed,
)

LN_2 = gl.constexpr(0.6931471805599453)


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
    buffers,  # [STAGES, 128, D]
    bounds,  # [STAGES, 128]: where BOUNDS, the first position that sees a token
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
    C: gl.constexpr,
    BOUNDS: gl.constexpr,
    VALID: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Bring the tiles of keys, or those of values, one after the other."""
    low, high, many, own, skipped, packed, length = share
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
    zeros: gl.constexpr = 512 // C * D if C > 0 else meta
    exact_tokens += row.to(gl.int64) * (slots + 1) * D
    page = gl.load(table + low // 4, mask=low < many, other=0)
    for i in range(low, high):
        k = i - low
        buffer = buffers.index(k % STAGES)
        mbarrier.wait(free.index(k % STAGES), k // STAGES % 2 ^ 1)
        if i < many:
            base = page * heads + h
            page = gl.load(table + (i + 1) // 4, mask=i + 1 < many, other=0)
            put_packed(
                buffer,
                words + base * (bits * 32 * D),
                scale + base * meta,
                zero + base * zeros,
                i % 4,
                gl.minimum(n // 32 - 1 - i // 4 * 16, 15),
                D,
                bits,
                G,
                channel,
                offset,
                C,
            )
            if BOUNDS:
                put_bounds_of_packed(bounds.index(k % STAGES), i, n, sinks)
        elif i < many + own:
            put_exact(buffer, exact_tokens, i - many, held, n, slots, sinks, D)
            if BOUNDS:
                put_bounds_of_exact(bounds.index(k % STAGES), i - many, held, n, slots, sinks)
        else:
            j = i - many - own + skipped
            put_new(buffer, new, stride, valid, j, tokens, D)
            if BOUNDS:
                put_bounds_of_new(bounds.index(k % STAGES), query_position, valid, j, tokens)
        signal(ready.index(k % STAGES))


@gluon.jit
def saturated(x, dtype: gl.constexpr):
    """To a dtype, finite."""
    if dtype == gl.float16:
        x = gl.minimum(gl.maximum(x, -65504.0), 65504.0)
    return x.to(dtype)


@gluon.jit
def map_queries(queries, matrix, D: gl.constexpr):
    """The queries of mapped keys behind the others."""
    none = gl.zeros([64, D], gl.float32, layout=mma(D))
    for half in gl.static_range(2):
        x = hopper.warpgroup_mma(queries.index(half), matrix, none, use_acc=False, is_async=True)
        x = hopper.warpgroup_mma_wait(0, deps=(x,))
        queries.index(2 + half).store(saturated(x, queries.dtype))


@gluon.jit
def map_back(sums, total, room, matrix, D: gl.constexpr):
    """Sums of mapped values `[64, D]` as sums of values."""
    SUMS: gl.constexpr = mma(D)
    NARROW: gl.constexpr = room.dtype == gl.float16
    total = gl.convert_layout(total, gl.SliceLayout(1, SUMS), assert_trivial=True)
    if NARROW:  # means have the range of values, sums have not
        total = gl.where(total > 0, total, 1.0)
        sums = gl.minimum(gl.maximum(sums * (1 / total)[:, None], -65504.0), 65504.0)
    # In two parts: more exact than the result is.
    kept: gl.constexpr = -(2**13) if NARROW else -(2**16)
    high = (sums.to(gl.int32, bitcast=True) & kept).to(gl.float32, bitcast=True)
    low = sums - high
    sums = gl.zeros([64, D], gl.float32, layout=SUMS)
    for part in gl.static_range(2):
        gl.thread_barrier()
        room.store((low if part == 0 else high).to(room.dtype))
        hopper.fence_async_shared()
        gl.thread_barrier()
        sums = hopper.warpgroup_mma(room, matrix, sums, use_acc=part > 0, is_async=True)
        sums = hopper.warpgroup_mma_wait(0, deps=(sums,))
    return sums * total[:, None] if NARROW else sums


@gluon.jit
def consume(
    queries,  # [2 or 4, 64, D]: the last two are for mapped keys
    half,  # of them
    matrix,  # [D, D], maps values back
    keys,  # [STAGES, 128, D]
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
    window,
    D: gl.constexpr,
    KEYS_MAPPED: gl.constexpr,
    VALUES_MAPPED: gl.constexpr,
    WINDOW: gl.constexpr,
    CAP: gl.constexpr,
    AUX: gl.constexpr,
    VALID: gl.constexpr,
    STAGES: gl.constexpr,
    FINAL: gl.constexpr,
):
    """Attention of 64 query rows over the tiles."""
    keys_ready, keys_free, values_ready, values_free = barriers
    low, high, many, own, skipped, packed, _length = share
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
        which = half
        if KEYS_MAPPED:
            which += gl.where(i < many, 2, 0)
        mbarrier.wait(keys_ready.index(k % STAGES), k // STAGES % 2)
        s = hopper.warpgroup_mma(
            queries.index(which),
            keys.index(k % STAGES).permute((1, 0)),
            none,
            use_acc=False,
            is_async=True,
        )
        s = hopper.warpgroup_mma_wait(0, deps=(s,))
        if CAP:
            s = cap - 2 * cap / (gl.exp2(s * factor) + 1)
        j = i - many - own + skipped  # tile of new tokens, if not before them
        new = i >= many + own
        hidden = new & (VALID or (j + 1) * 128 > plain)
        if WINDOW or ((i + 1) * 128 > n) & (i < many + own) | hidden:
            bound = bounds.index(k % STAGES).load(gl.SliceLayout(0, SCORES))
            if WINDOW:
                near = bound[None, :] > position[:, None] - window
                s = gl.where(near, s, NOTHING)
            s = gl.where(bound[None, :] <= position[:, None], s, NOTHING)
        gl.thread_barrier()
        mbarrier.arrive(keys_free.index(k % STAGES), count=1)
        new_m = gl.maximum(m, gl.max(s, 1))
        # Nothing seen yet: probabilities of what is hidden must be 0, not 1.
        base = gl.where(new_m > NOTHING, new_m, 0.0) * unit
        p = gl.exp2(s * unit - base[:, None])
        alpha = gl.exp2((m - new_m) * unit)
        total = total * alpha + gl.sum(p, 1)
        m = new_m
        alpha = gl.convert_layout(alpha, gl.SliceLayout(1, SUMS), assert_trivial=True)
        sums = sums * alpha[:, None]
        p = gl.convert_layout(p.to(queries.dtype), PROBABILITIES)
        mbarrier.wait(values_ready.index(k % STAGES), k // STAGES % 2)
        sums = hopper.warpgroup_mma(p, values.index(k % STAGES), sums, is_async=True)
        sums = hopper.warpgroup_mma_wait(0, deps=(sums,))
        gl.thread_barrier()
        mbarrier.arrive(values_free.index(k % STAGES), count=1)
        if VALUES_MAPPED:
            last = (i + 1 == many) | ((i + 1 == high) & (i < many))  # of the pages
            if last:
                sums = map_back(sums, total, queries.index(2 + half), matrix, D)

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
    at = out + index[:, None] * D + c[None, :]
    gl.store(at, saturated(x, out.dtype.element_ty), mask=real[:, None])
