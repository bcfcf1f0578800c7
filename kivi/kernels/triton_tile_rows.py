"""Device helpers of the attention kernel: rows of queries, products and their bookkeeping.

And the kernel that merges the shares of a row.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kivi.kernels.triton_tiles import code_power, codes, padded, power

# Log-sum-exp of nothing, as in the reference: finite, so that differences are not NaN.
NOTHING = tl.constexpr(-1e30)
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def top_half(x):
    """The first 8 of 16 rows; on tensor cores these are registers of their own."""
    first, _ = tl.split(tl.permute(tl.reshape(x, (2, 8, x.shape[1])), (1, 2, 0)))
    return first


@triton.jit
def pad16(x):
    """8 rows and 8 rows of zeros, without leaving registers."""
    return tl.reshape(tl.permute(tl.join(x, tl.zeros_like(x)), (2, 0, 1)), (16, x.shape[1]))


@triton.jit
def _widened(x):
    """bfloat16 as float32, denormals included, which Triton's interpreter gets wrong."""
    return (x.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)


@triton.jit
def cast(x, DTYPE: tl.constexpr, WIDE: tl.constexpr):
    """To a dtype, rounded; WIDE: to bfloat16 in the interpreter, which would drop a carry."""
    if WIDE:
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        y = bits.to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        y = x.to(DTYPE)
    return y


@triton.jit
def saturated(x, DTYPE: tl.constexpr, WIDE: tl.constexpr):
    """`cast`; half a step above the largest number, a sum can leave float16's range."""
    if DTYPE.is_fp16():
        x = tl.minimum(tl.maximum(x, -65504.0), 65504.0)
    return cast(x, DTYPE, WIDE)


@triton.jit
def dot(a, b, acc, WIDE: tl.constexpr):
    """`a @ b + acc` in float32."""
    if WIDE:
        a, b = _widened(a), _widened(b)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def times(a, b, FAST: tl.constexpr, WIDE: tl.constexpr):
    """`a * b` in the dtype of a."""
    if WIDE:
        y = cast(_widened(a) * _widened(b), a.dtype, WIDE)
    elif FAST and a.dtype.primitive_bitwidth == 16:
        # Two at a time, which the compiler does not see where rows of zeros come between.
        KIND: tl.constexpr = "f16x2" if a.dtype.is_fp16() else "bf16x2"
        y = tl.inline_asm_elementwise(
            f"{{ .reg .b32 n; mov.b32 n, 0x80008000; fma.rn.{KIND} $0, $1, $2, n; }}",
            "=r,r,r",
            [a, b],
            dtype=a.dtype,
            is_pure=True,
            pack=2,
        )
    else:
        y = a * b
    return y


@triton.jit
def times_power(x, POWER: tl.constexpr, WIDE: tl.constexpr):
    """`x * 2^POWER` in its dtype."""
    if POWER == 0:
        y = x
    elif WIDE:
        y = cast(x.to(tl.float32) * power(POWER), x.dtype, WIDE)
    else:
        y = x * power(POWER)
    return y


@triton.jit
def plus_times(x, y, FACTOR: tl.constexpr, WIDE: tl.constexpr):
    """`x + y * FACTOR` in their dtype, rounded once."""
    if WIDE:
        z = cast(x.to(tl.float32) + y.to(tl.float32) * FACTOR, x.dtype, WIDE)
    else:
        z = tl.fma(y, tl.full(y.shape, FACTOR, y.dtype), x)
    return z


@triton.jit
def as_values(codes, scale, zero, OFFSET: tl.constexpr, PART: tl.constexpr):
    """A part of the codes `[channels, tokens]` of a group as the values that it stands for.

    For float32, which is added up token by token: beside an outlier's sum each small term is cut
    off, and codes, none of which is negative, all in the same direction.
    """
    scale = scale.to(tl.float32)[None, :]
    if PART > 0:
        y = codes * scale
    elif zero is None:
        y = (codes - OFFSET) * scale
    else:
        y = codes * scale + zero.to(tl.float32)[None, :]
    return y


@triton.jit
def row_of(
    G: tl.constexpr,
    value,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DTYPE: tl.constexpr,
    WIDE: tl.constexpr,
):
    """`[ROWS, COLUMNS]` zeros, but for row G, which holds the value."""
    row = tl.where(tl.arange(0, ROWS) == G, value, 0.0)
    return cast(row[:, None] + tl.zeros((ROWS, COLUMNS), tl.float32), DTYPE, WIDE)


@triton.jit
def rows_dot(q, x, ROWS: tl.constexpr, WIDE: tl.constexpr):
    """`q [max(16, ROWS), D] @ x [tokens, D]^T`, `[ROWS, tokens]` float32."""
    y = dot(q, tl.trans(x), tl.zeros((q.shape[0], x.shape[0]), tl.float32), WIDE)
    if ROWS == 8:
        y = top_half(y)
    return y


@triton.jit
def rows_dot_codes(
    q,
    words,
    PLANE: tl.constexpr,
    BITS: tl.constexpr,
    LINEAR: tl.constexpr,
    ROWS: tl.constexpr,
    FAST: tl.constexpr,
    WIDE: tl.constexpr,
):
    """`rows_dot` with a plane's codes, times `2^code_power` of the first part."""
    y = rows_dot(q, codes(words, PLANE, BITS, 0, LINEAR, FAST, q.dtype), ROWS, WIDE)
    if BITS == 3:
        z = rows_dot(q, codes(words, PLANE, BITS, 1, LINEAR, FAST, q.dtype), ROWS, WIDE)
        LOW: tl.constexpr = code_power(BITS, 0, PLANE, LINEAR, q.dtype)
        HIGH: tl.constexpr = code_power(BITS, 1, PLANE, LINEAR, q.dtype)
        y += z * power(2 + LOW - HIGH)
    return y


@triton.jit
def capped(x, cap):
    """Softcapped scores, `cap * tanh(y)` for `x = y * 2 log2(e)`."""
    return cap - 2 * cap / (tl.exp2(x) + 1)


@triton.jit
def rescaled(acc, alpha, N: tl.constexpr):
    """A tuple of `[channels, rows]`, each row times its alpha."""
    out = ()
    for g in tl.static_range(N):
        out += (acc[g] * alpha[None, :],)
    return out


@triton.jit
def in_values(acc, zero_acc, N: tl.constexpr, POWER: tl.constexpr, FOLD_POWER: tl.constexpr):
    """`rescaled` from units of codes to those of values, with each group's zeros."""
    column = tl.arange(0, zero_acc.shape[0])
    out = ()
    for g in tl.static_range(N):
        zero = tl.sum(tl.where(column[:, None] == g, zero_acc, 0.0), 0)
        out += (acc[g] * power(POWER) * power(FOLD_POWER) + zero[None, :],)
    return out


@triton.jit
def raised(m, other):
    """A running maximum, raised to another, and the factor of what was relative to the old one."""
    new = tl.maximum(m, other)
    return new, tl.exp2(m - new)


@triton.jit
def highest(x, N: tl.constexpr):
    """The elementwise maximum of N tiles."""
    out = x[0]
    for i in tl.static_range(1, N):
        out = tl.maximum(out, x[i])
    return out


@triton.jit
def normalised(m, total):
    """The log-sum-exp (base 2) of a sum relative to m, and one over the sum; of nothing, 0."""
    some = total > 0
    safe = tl.where(some, total, 1.0)
    return tl.where(some, m + tl.log2(safe), NOTHING), tl.where(some, 1 / safe, 0.0)


@triton.jit
def join(lse, aux):
    """With a virtual key of logit aux (base 2): the log-sum-exp, and what share the others keep."""
    top = tl.maximum(lse, aux)
    kept = tl.exp2(lse - top)
    total = kept + tl.exp2(aux - top)
    return top + tl.log2(total), kept / total


@triton.jit
def load_queries(rows, real, N: tl.constexpr, G: tl.constexpr):
    """Query rows (pointers), 0 where they are not real, as a tile for each group of channels."""
    out = ()
    for g in tl.static_range(N):
        c = tl.arange(0, padded(G))
        mask = real[:, None] & (c[None, :] < G)
        out += (tl.load(rows[:, None] + g * G + c[None, :], mask=mask, other=0.0),)
    return out


@triton.jit
def sums(x, N: tl.constexpr, ROWS: tl.constexpr):
    """The sum of each row in N tiles, one by one."""
    out = ()
    for g in tl.static_range(N):
        y = top_half(x[g]) if ROWS == 8 else x[g]
        out += (tl.sum(y.to(tl.float32), 1),)
    return out


@triton.jit
def zeros_of(N: tl.constexpr, CHANNELS: tl.constexpr, ROWS: tl.constexpr):
    """N accumulators `[CHANNELS, ROWS]`."""
    out = ()
    for _ in tl.static_range(N):
        out += (tl.zeros((CHANNELS, ROWS), tl.float32),)
    return out


@triton.jit
def times_power_all(x, N: tl.constexpr, POWER: tl.constexpr, WIDE: tl.constexpr):
    """`times_power` of N tiles."""
    out = ()
    for g in tl.static_range(N):
        out += (times_power(x[g], POWER, WIDE),)
    return out


@triton.jit
def exact_token(slot, newest, packed, sinks, ring):
    """Which token lies in an exact slot and whether it is part of the row.

    `newest` counts from the first token after the sinks, as the `packed` ones do.
    """
    token = sinks + newest - (newest + sinks - slot + ring) % ring
    token = tl.where(slot < sinks, slot, token)
    oldest = tl.where(newest >= 0, sinks + packed, 2**31 - 1)  # in the ring
    seen = (slot < sinks + ring) & (token >= oldest)
    return token, tl.where(slot < sinks, slot - sinks <= newest, seen)


@triton.jit(do_not_specialize=("heads", "tokens", "splits"))
def combine(
    parts,  # [rows, splits, DV] float32
    part_lse,  # [rows, splits], base 2
    s_aux,  # [Hq], or None
    out,  # [rows, DV]
    lse,  # [rows]
    heads,  # Hq
    tokens,  # T
    splits,
    DV: tl.constexpr,
    STEP: tl.constexpr,  # splits at a time
    WIDE: tl.constexpr,
):
    """Merge the shares of each query row, always in the same order."""
    row = tl.program_id(0).to(tl.int64)
    tops = tl.full((STEP,), NOTHING, tl.float32)
    for start in range(0, splits, STEP):
        i = start + tl.arange(0, STEP)
        x = tl.load(part_lse + row * splits + i, mask=i < splits, other=NOTHING)
        tops = tl.maximum(tops, x)
    top = tl.max(tops, 0)
    c = tl.arange(0, padded(DV))
    acc = tl.zeros((padded(DV),), tl.float32)
    total = 0.0
    for start in range(0, splits, STEP):
        i = start + tl.arange(0, STEP)
        x = tl.load(part_lse + row * splits + i, mask=i < splits, other=NOTHING)
        w = tl.where(x > NOTHING, tl.exp2(x - top), 0.0)
        total += tl.sum(w, 0)
        mask = (i[:, None] < splits) & (c[None, :] < DV)
        x = tl.load(parts + (row * splits + i)[:, None] * DV + c[None, :], mask=mask, other=0.0)
        acc += tl.sum(x * w[:, None], 0)
    top, keep = normalised(top, total)
    if s_aux is not None:
        head = row // tokens % heads
        top, kept = join(top, tl.load(s_aux + head).to(tl.float32) * LOG2E)
        keep *= kept
    x = saturated(acc * keep, out.dtype.element_ty, WIDE)
    tl.store(out + row * DV + c, x, mask=c < DV)
    tl.store(lse + row, tl.where(top > NOTHING, top * LN2, NOTHING))
