"""Merges the partial results of programs that shared a (row, head): plain Triton."""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
NOTHING = tl.constexpr(-1e30)


@triton.jit(do_not_specialize=["B", "Hkv", "rows", "T", "sinks", "programs"])
def combine_kernel(
    part, part_ml, packed, length, out, lse, s_aux, B, Hkv, blocks, rows, T, sinks, programs,
    D: tl.constexpr, APART: tl.constexpr, STEP: tl.constexpr, ROWS: tl.constexpr,
    PARTS: tl.constexpr, CHANNELS: tl.constexpr, WAIT: tl.constexpr,
):  # fmt: skip
    """One query of a unit (row, head, block of queries) a program; always in the same order.

    Which programs worked on a unit follows from `packed` and `length [B]`, as in the kernel that
    wrote `part [n, 8, D]` (sums of values) and `part_ml [n, 16]` (maxima of scores in log 2, sums
    of probabilities): what program p found for unit u is at p + u, a query every
    APART of 8 columns. PARTS are read at a time.
    """
    heads = Hkv * blocks
    index = tl.program_id(0)
    r = tl.program_id(1)
    b = index // heads
    unit = index % heads
    my_q = (unit % blocks) * (8 // APART) + r
    column = r * APART
    if my_q >= rows:
        return
    row = tl.arange(0, ROWS)
    n = tl.load(packed + row, mask=row < B, other=0).to(tl.int32)
    tokens = tl.load(length + row, mask=row < B, other=0).to(tl.int32)
    exact = tl.minimum(tokens, sinks) + tl.maximum(tokens - sinks - n, 0)
    exact_steps = tl.maximum((exact + 31) // 64, 1)
    steps = tl.where(row < B, (n + STEP - 1) // STEP + exact_steps, 0)
    share = (tl.sum(steps, 0) * heads + programs - 1) // programs
    own = tl.sum(tl.where(row == b, steps, 0), 0)
    first = tl.sum(tl.where(row < b, steps, 0), 0) * heads + unit * own
    p0 = first // share
    p1 = (first + own - 1) // share + 1

    if p0 >= p1:  # which is never so: but now both are known before the wait, not after it
        return
    if WAIT:
        # Launched before the other kernel ended: only now may its results be read.
        tl.extra.cuda.gdc_wait()
    parts = p0 + tl.arange(0, PARTS)
    ch = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
    m = tl.full((), NOTHING, tl.float32)
    mass = tl.full((), 0.0, tl.float32)
    total = tl.zeros((CHANNELS,), tl.float32)
    if s_aux is not None:
        m = tl.load(s_aux + (unit // blocks) * (rows // T) + my_q // T).to(tl.float32) * LOG2_E
        mass += 1.0
    for p in range(p0, p1, PARTS):
        slot = (p - p0 + parts + index).to(tl.int64)
        here = p - p0 + parts < p1
        part_m = tl.load(part_ml + slot * 16 + column, mask=here, other=NOTHING)
        part_l = tl.load(part_ml + slot * 16 + 8 + column, mask=here, other=0.0)
        values = tl.load(
            part + (slot * 8 + column)[:, None] * D + ch[None, :], mask=here[:, None], other=0.0
        )
        new_m = tl.maximum(m, tl.max(part_m, 0))
        old = tl.exp2(m - new_m)
        new = tl.exp2(part_m - new_m)
        mass = mass * old + tl.sum(part_l * new, 0)
        total = total * old + tl.sum(values * new[:, None], 0)
        m = new_m
    at = ((b * Hkv + unit // blocks) * rows + my_q).to(tl.int64)
    sees = mass > 0
    tl.store(out + at * D + ch, tl.where(sees, total / tl.where(sees, mass, 1.0), 0.0))
    tl.store(lse + at, tl.where(sees, (m + tl.log2(tl.where(sees, mass, 1.0))) / LOG2_E, NOTHING))
