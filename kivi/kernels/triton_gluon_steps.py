"""What a step of the Gluon kernel fetches, and which steps there are."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from kivi.kernels.triton_tile_gluon import (
    MMA,
    OPERAND_B,
    PLAIN,
    copy_groups,
    copy_rows,
    copy_zeros,
    product_error,
    start_copy,
    view_as,
)

LOG2_E = gl.constexpr(1.4426950408889634)
NOTHING = gl.constexpr(-1e30)


@gluon.constexpr_function
def headroom(dtype):
    """Probabilities are kept times 2^this: float16 ones must not vanish, bfloat16 products not."""
    return 10.0 if dtype == gl.float16 else 64.0


@gluon.constexpr_function
def lift(dtype):
    """What queries are brought to: times scales, float16 ones must neither vanish nor overflow."""
    return 0.5 if dtype == gl.float16 else 2.0**64


@gluon.jit
def _add(a, b):
    return a + b


@gluon.jit
def exact_tokens(tokens, packed, sinks):
    """How many of a row's tokens are in exact slots."""
    return gl.minimum(tokens, sinks) + gl.maximum(tokens - sinks - packed, 0)


@gluon.jit
def units(packed, length, B, heads, sinks, STEP: gl.constexpr, ROWS: gl.constexpr):
    """Steps of each row's heads, and the running sum of those of all heads, `[ROWS]`."""
    layout: gl.constexpr = gl.BlockedLayout([max(1, ROWS // 32)], [32], [1], [0])
    row = gl.arange(0, ROWS, layout=layout)
    n = gl.load(packed + row, mask=row < B, other=0).to(gl.int32)
    tokens = gl.load(length + row, mask=row < B, other=0).to(gl.int32)
    # A tile that is left over goes with a pair: a step more is a program more, or a round
    exact_steps = gl.maximum((exact_tokens(tokens, n, sinks) + 31) // 64, 1)
    steps = gl.where(row < B, (n + STEP - 1) // STEP + exact_steps, 0)
    return steps, gl.associative_scan(steps * heads, 0, _add)


@gluon.jit
def fetch_keys(words, source, unit, sub, bits: gl.constexpr, SPT: gl.constexpr, D: gl.constexpr):
    """The word tile of a step, or as many of its channels as `words [32, n]` takes.

    SPT steps share a tile.
    """
    tile = unit * bits + sub // SPT
    copy_rows(words, source + tile * (32 * D), 32, words.shape[1], D)


@gluon.jit
def fetch_values(
    words,
    source,
    unit,
    sub,
    bits: gl.constexpr,
    SPT: gl.constexpr,
    D: gl.constexpr,
):
    """The word tile of a step, or as many of its channels as `words [n, 32, VG]` takes."""
    tile = unit * bits + sub // SPT
    NG: gl.constexpr = words.shape[0]
    VG: gl.constexpr = words.shape[2]
    for g in gl.static_range(NG):
        copy_rows(words.index(g), source + tile * (32 * D) + g * VG, 32, VG, D)


@gluon.jit
def fetch_key_groups(
    scales,
    zeros,
    ks,
    kz,
    unit,
    sub,
    last,
    G: gl.constexpr,
    NP: gl.constexpr,
    D: gl.constexpr,
):
    """Scales and zeros of a step's groups; in place of groups past the last its own are read.

    `scales`, `zeros`: `[groups, n]` of as many channels each as words are fetched at a time.
    """
    count: gl.constexpr = (NP * 32 + G - 1) // G
    first = (unit * (512 // G) + sub * (NP * 32) // G) * D
    last_group = last * 32 // G
    n: gl.constexpr = D // len(scales)
    for c in gl.static_range(len(scales)):
        own = view_as(scales[c], scales[c].dtype, [count, n], PLAIN)
        copy_groups(own, ks + first + c * n, count, n, D, last_group)
        own = view_as(zeros[c], zeros[c].dtype, [count, n], PLAIN)
        copy_groups(own, kz + first + c * n, count, n, D, last_group)


@gluon.jit
def fetch_token_groups(target, source, unit, sub, last, NP: gl.constexpr, NG: gl.constexpr):
    """Scales, or zeros, of a step's tokens, `[NP, 32, NG]`."""
    first = (unit * 512 + sub * (NP * 32)) * NG
    flat = view_as(target, target.dtype, [NP, 32 * NG], PLAIN)
    copy_groups(flat, source + first, NP, 32 * NG, 32 * NG, last)


@gluon.jit
def fetch_zeros(target, source, unit, sub, last, NP: gl.constexpr, NG: gl.constexpr):
    """Zeros of a step's tokens, beside a column of ones if there are several a token."""
    if NG == 1:
        fetch_token_groups(target, source, unit, sub, last, NP, NG)
    else:
        copy_zeros(target, source + (unit * 512 + sub * (NP * 32)) * NG, NP * 32, NG, last)


@gluon.jit
def fetch_centers(
    target,
    source,
    unit,
    sub,
    last,
    CENTER: gl.constexpr,
    NP: gl.constexpr,
    D: gl.constexpr,
):
    """Means of CENTER tokens each (0: there are none) of a step's tokens; as `fetch_key_groups`."""
    if CENTER > 0:
        count: gl.constexpr = (NP * 32 + CENTER - 1) // CENTER
        first = (unit * (512 // CENTER) + sub * (NP * 32) // CENTER) * D
        n: gl.constexpr = D // len(target)
        for c in gl.static_range(len(target)):
            rows = view_as(target[c], target[c].dtype, [count, n], PLAIN)
            copy_groups(rows, source + first + c * n, count, n, D, last * 32 // CENTER)


@gluon.jit
def fetch_channels(target, source, D: gl.constexpr):
    """`[D]` float32 as `[D / 8, 8]`."""
    layout: gl.constexpr = gl.BlockedLayout([1, 1], [4, 8], [1, 1], [1, 0])
    r = gl.arange(0, D // 8, layout=gl.SliceLayout(1, layout))
    c = gl.arange(0, 8, layout=gl.SliceLayout(0, layout))
    start_copy(target, source + r[:, None] * 8 + c[None, :])


@gluon.jit
def plain_query(source, block, rows, APART: gl.constexpr, D: gl.constexpr, WIDE: gl.constexpr):
    """8 queries as operands B `[WIDE, 8]`; with APART = 2 they are 4, and 0 between them."""
    column = gl.arange(0, 8, layout=gl.SliceLayout(0, OPERAND_B))
    r = block * (8 // APART) + column // APART
    real = (r < rows) & (column % APART == 0)
    d = gl.arange(0, WIDE, layout=gl.SliceLayout(1, OPERAND_B))
    q = ()
    for c in gl.static_range(D // WIDE):
        at = source + c * WIDE + r[None, :] * D + d[:, None]
        q = q + (gl.load(at, mask=real[None, :], other=0.0),)
    return q


@gluon.jit
def load_query(
    source, block, rows,
    LIFT: gl.constexpr, APART: gl.constexpr, D: gl.constexpr, WIDE: gl.constexpr,
):  # fmt: skip
    """What `plain_query` says, times LIFT over a power of 2; and that power.

    The largest power of 2 in them goes into the scores, so that q * scale stays in range.
    """
    q = plain_query(source, block, rows, APART, D, WIDE)
    power = gl.max(gl.max(gl.abs(q[0].to(gl.float32)), 0), 0)
    for c in gl.static_range(1, len(q)):
        power = gl.maximum(power, gl.max(gl.max(gl.abs(q[c].to(gl.float32)), 0), 0))
    power = (power.to(gl.int32, bitcast=True) & 0x7F800000).to(gl.float32, bitcast=True)
    power = gl.maximum(power, 1e-30)
    lifted = ()
    for c in gl.static_range(len(q)):
        lifted = lifted + ((q[c].to(gl.float32) * (LIFT / power)).to(q[c].dtype),)
    return lifted, power


@gluon.jit
def scaled_query(q, scales, D: gl.constexpr):
    """`q [D, 8] * scales [D]`, with the rounding of half of the products carried into the others.

    The scores of a whole group shift by the sum of these errors; carried over, it halves in square.
    """
    halves = q.reshape([D // 16, 2, 8, 8])
    q0, q1 = gl.split(gl.permute(halves, (0, 2, 3, 1)))
    s0, s1 = gl.split(gl.permute(scales.reshape([D // 16, 2, 8]), (0, 2, 1)))
    s0 = gl.convert_layout(s0, gl.SliceLayout(2, q0.type.layout), assert_trivial=True)[:, :, None]
    s1 = gl.convert_layout(s1, gl.SliceLayout(2, q0.type.layout), assert_trivial=True)[:, :, None]
    first = q0 * s0
    s0, _a = gl.broadcast(s0, q0)
    s1, _b = gl.broadcast(s1, q1)
    second = gl.fma(q1, s1, product_error(q0, s0, first))
    both = gl.permute(gl.join(first, second), (0, 3, 1, 2)).reshape([D, 8])
    return gl.convert_layout(both, OPERAND_B, assert_trivial=True)


@gluon.jit
def cap(s, softcap):
    """Scores in units of log 2 become softcap * tanh(score / softcap)."""
    if softcap is not None:
        top = softcap * LOG2_E
        s = top - 2 * top / (gl.exp2(s * (2 * LOG2_E / top)) + 1)
    return s


@gluon.jit
def rescale(acc, zacc, lsum, alpha):
    """Running sums times `alpha [8]`."""
    scaled = ()
    for g in gl.static_range(len(acc)):
        scaled = scaled + (acc[g] * alpha[None, :],)
    twice = gl.permute(gl.join(alpha, alpha), (1, 0)).reshape([16])
    zacc = zacc * gl.convert_layout(twice, gl.SliceLayout(1, MMA))[:, None]
    return scaled, zacc, lsum * alpha


@gluon.jit
def column(zacc, column: gl.constexpr):
    """A column of sums `[16 (8 heads), 8]`, by heads as columns of MMA."""
    c = gl.arange(0, 8, layout=gl.SliceLayout(0, MMA))
    x = gl.sum(gl.where(c[None, :] == column, zacc, 0.0), 1)
    x, _ = gl.split(gl.permute(x.reshape([2, 8]), (1, 0)))
    return gl.convert_layout(x, gl.SliceLayout(0, MMA))


@gluon.jit
def join_aux(m, mass, s_aux, head, real):
    """Maximum and mass with each head's virtual key, and what 1 / mass weighs the sums with."""
    weight = gl.full([8], 1.0, gl.float32, layout=gl.SliceLayout(0, MMA))
    if s_aux is not None:
        aux = gl.load(s_aux + head, mask=real, other=0.0).to(gl.float32) * LOG2_E
        top = gl.maximum(m, aux)
        weight = gl.exp2(m - top)
        mass = mass * weight + gl.exp2(aux - top)
        m = top
    return m, mass, gl.where(mass > 0, weight / mass, 0.0)
