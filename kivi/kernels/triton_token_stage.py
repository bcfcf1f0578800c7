"""Tokens of 128 bfloat16 channels on their way through shared memory, on a GPU of NVIDIA's.

A ring of slots with a plane of 32 tokens each: `[piece, token, lane]` of 16 bytes, in the order of
triton_token.py with 4 lanes and 8 neighbours. A thread copies what it takes itself, so that nobody
waits for others, but for means. The compiler of Triton knows nothing of this memory.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kivi.grids import MEAN_STEP
from kivi.kernels.triton_grids import round_to
from kivi.kernels.triton_tile_pack import high_half, join_halves, low_half
from kivi.kernels.triton_token import butterfly, log2
from kivi.kernels.triton_token_memory import four
from kivi.spec import TILE_ROWS

ROWS = tl.constexpr(TILE_ROWS)
LANES = tl.constexpr(4)
PIECES = tl.constexpr(4)
PIECE = tl.constexpr(TILE_ROWS * 64)  # bytes
SLOT = tl.constexpr(TILE_ROWS * 256)
# The four planes that share a mean, and one: the others follow as these are taken.
SLOTS = tl.constexpr(5)
STEP = tl.constexpr(MEAN_STEP)


@triton.constexpr_function
def _declaration(size):
    return "{ .shared .align 16 .b8 staged[" + str(size) + "]; mov.u32 $0, staged; }"


@triton.constexpr_function
def _waiting(count):
    return "cp.async.wait_group " + str(count) + "; mov.b32 $0, $1;"


@triton.jit
def ring(nothing):
    """The address of the first slot; after the last one there is room for means and centers."""
    asm: tl.constexpr = _declaration(SLOT * SLOTS + 512 + 4 * 256)
    return tl.inline_asm_elementwise(asm, "=r,r", [nothing], tl.int32, False, 1)


@triton.jit
def following(slot, first):
    """The slot after this one."""
    return tl.where(slot == first + SLOT * (SLOTS - 1), first, slot + SLOT)


@triton.jit
def _mine():
    row, lane = tl.arange(0, ROWS)[:, None], tl.arange(0, LANES)[None, :]
    return (row * LANES + lane) * 16


@triton.jit
def copy(slot, x, X_TOKEN: tl.constexpr, there):
    """Have a plane's tokens read into a slot, if they are `there`."""
    row, lane = tl.arange(0, ROWS)[:, None], tl.arange(0, LANES)[None, :]
    source = (x + row * X_TOKEN + lane * 8).to(tl.int64)
    asm: tl.constexpr = """{ .reg .pred p; setp.ne.u32 p, $3, 0;
        @p cp.async.cg.shared.global [$1], [$2], 16; mov.b32 $0, 0; }"""
    to = slot + _mine()
    counts = there.to(tl.int32)
    for piece in tl.static_range(PIECES):
        arguments = [to + piece * PIECE, source + piece * 64, counts]
        tl.inline_asm_elementwise(asm, "=r,r,l,r", arguments, tl.int32, False, 1)
    commit: tl.constexpr = "cp.async.commit_group; mov.b32 $0, $1;"
    tl.inline_asm_elementwise(commit, "=r,r", [slot], tl.int32, False, 1)


@triton.jit
def wait(slot, COUNT: tl.constexpr):
    """The slot, as soon as no more than COUNT planes are on their way to this thread."""
    return tl.inline_asm_elementwise(_waiting(COUNT), "=r,r", [slot], tl.int32, False, 1)


@triton.jit
def _four(address):
    asm: tl.constexpr = "ld.shared.v4.b32 {$0, $1, $2, $3}, [$4];"
    types: tl.constexpr = (tl.int32, tl.int32, tl.int32, tl.int32)
    return tl.inline_asm_elementwise(asm, "=r,=r,=r,=r,r", [address], types, False, 1)


@triton.jit
def take(slot):
    """A plane's tokens, as pairs."""
    out = ()
    for piece in tl.static_range(PIECES):
        out = out + _four(slot + _mine() + piece * PIECE)
    return out


@triton.constexpr_function
def _shuffle(apart):
    return f"shfl.sync.bfly.b32 $0, $1, {apart}, 31, -1;"


@triton.jit
def _from_other(x, APART: tl.constexpr):
    return tl.inline_asm_elementwise(_shuffle(APART), "=f,f", [x], tl.float32, False, 1)


@triton.jit
def _sum_of_half(xs, HALF: tl.constexpr):
    """One half of a tuple, plus that of the thread HALF tokens apart, which has the other one."""
    upper = (tl.arange(0, ROWS)[:, None] & HALF) != 0
    out = ()
    for k in tl.static_range(HALF):
        mine = tl.where(upper, xs[k + HALF], xs[k])
        other = tl.where(upper, xs[k], xs[k + HALF])
        out = out + (mine + _from_other(other, LANES * HALF),)
    return out


@triton.jit
def _sums(slot, first, PLANES: tl.constexpr):
    """`grids.mean` of the tokens of planes from a slot on, four channels for each thread of a warp.

    Waits for all threads.
    """
    tl.debug_barrier()
    row, lane = tl.arange(0, ROWS)[:, None], tl.arange(0, LANES)[None, :]
    COUNT: tl.constexpr = PLANES * ROWS
    # A warp has a piece, and its threads the tokens of a step.
    mine = row // STEP * PIECE + row % STEP * 64 + lane * 16
    zero = tl.zeros([ROWS, LANES], tl.float32)
    sums = (zero, zero, zero, zero, zero, zero, zero, zero)
    for _ in tl.static_range(PLANES):
        for step in tl.static_range(ROWS // STEP):
            pairs = _four(slot + mine + step * (STEP * 64))
            out = ()
            for k in tl.static_range(4):
                low = tl.fma(low_half(pairs[k]), 1.0 / COUNT, sums[2 * k])
                high = tl.fma(high_half(pairs[k]), 1.0 / COUNT, sums[2 * k + 1])
                out = out + (low, high)
            sums = out
        slot = following(slot, first)
    # Halves of the channels go to the thread whose step's bit says so: one is left for each.
    for k in tl.static_range(log2(STEP)):
        sums = _sum_of_half(sums, STEP // 2 ** (k + 1))
    room = first + SLOT * SLOTS
    to = room + row // STEP * 128 + lane * 32 + row % STEP * 4
    asm: tl.constexpr = "st.shared.f32 [$1], $2; mov.b32 $0, 0;"
    tl.inline_asm_elementwise(asm, "=r,r,f", [to, sums[0]], tl.int32, False, 1)
    tl.debug_barrier()
    return _four(room + _lane() * 16)


@triton.jit
def _lane():
    """Of a warp's 32 threads."""
    row, lane = tl.arange(0, ROWS)[:, None], tl.arange(0, LANES)[None, :]
    return row % STEP * LANES + lane


@triton.jit
def inverses(smooth):
    """Reciprocals of the four factors that belong to a thread's means: powers of two."""
    # A load of Triton's would give its layout to all that follows, which shuffles know nothing of.
    words = four(smooth + _lane() * 4, 0)
    out = ()
    for k in tl.static_range(4):
        out = out + ((0x7F000000 - words[k]).to(tl.float32, bitcast=True),)
    return out


@triton.jit
def centers(
    slot, first, at, factors, PLANES: tl.constexpr, MAP: tl.constexpr, FORMAT: tl.constexpr
):
    """Map and store the mean of planes' tokens, [channels] from `at` on; and as tokens have it."""
    words = _sums(slot, first, PLANES)
    xs = ()
    for k in tl.static_range(4):
        x = words[k].to(tl.float32, bitcast=True)
        xs = xs + (x * factors[k] if len(factors) > 0 else x,)
    # A warp has them all, four neighbours in a thread.
    STEPS: tl.constexpr = log2(MAP)
    for k in tl.static_range(min(STEPS, 2)):
        xs = butterfly(xs, 2**k)
    for k in tl.static_range(2, STEPS):
        sign = tl.where((_lane() & 2 ** (k - 2)) == 0, 1.0, -1.0)
        out = ()
        for i in tl.static_range(4):
            other = _from_other(xs[i], 2 ** (k - 2))
            out = out + (tl.fma(xs[i], sign, other),)
        xs = out
    pairs = ()
    for k in tl.static_range(2):
        low, high = _rounded(xs[2 * k], MAP, FORMAT), _rounded(xs[2 * k + 1], MAP, FORMAT)
        pairs = pairs + (join_halves(low, high),)
    row = tl.arange(0, ROWS)[:, None]
    room = first + SLOT * SLOTS + 512 + row // STEP * 256
    asm_out: tl.constexpr = """{ .reg .pred p; setp.lt.s32 p, $5, 8;
        st.shared.v2.b32 [$1], {$2, $3}; @p st.global.v2.b32 [$4], {$2, $3};
        bar.warp.sync -1; mov.b32 $0, 0; }"""
    to = (at + _lane() * 4).to(tl.int64)
    arguments = [room + _lane() * 8, pairs[0], pairs[1], to, row]
    tl.inline_asm_elementwise(asm_out, "=r,r,r,r,l,r", arguments, tl.int32, False, 1)
    lane = tl.arange(0, LANES)[None, :]
    out = ()
    for piece in tl.static_range(PIECES):
        words = _four(room + lane * 16 + piece * 64)
        for k in tl.static_range(4):
            out = out + (low_half(words[k]), high_half(words[k]))
    return out


@triton.jit
def _rounded(x, MAP: tl.constexpr, FORMAT: tl.constexpr):
    """What is stored, the bits of a float32."""
    x = x * 2.0 ** -(log2(MAP) // 2)
    x = tl.where(x * 0.0 == 0.0, x, 0.0)
    return round_to(x, FORMAT[6], FORMAT[7], FORMAT[8]).to(tl.int32, bitcast=True)
