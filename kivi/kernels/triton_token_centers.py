"""Centers of mapped tokens, which a whole program finds where triton_token_stage.py does not."""

from __future__ import annotations

import triton
import triton.language as tl

from kivi.grids import MEAN_STEP
from kivi.kernels.triton_grids import round_to
from kivi.kernels.triton_tile_pack import pair, unpair
from kivi.kernels.triton_token import log2

STEP = tl.constexpr(MEAN_STEP)
WARP = tl.constexpr(32)


@triton.jit
def hadamard_of_one(x, BLOCK: tl.constexpr):
    """`transforms.hadamard` of one token [channels]."""
    COUNT: tl.constexpr = x.shape[0]
    ROW: tl.constexpr = min(COUNT, WARP)
    IN_WARP: tl.constexpr = min(BLOCK, ROW)
    # A warp has a row: its lanes need no memory to get at each other's channels.
    x = tl.reshape(x, [COUNT // ROW, ROW])
    lane = tl.arange(0, ROW)[None, :]
    for k in tl.static_range(log2(IN_WARP)):
        sign = tl.where((lane & 2**k) == 0, 1.0, -1.0)
        x = tl.fma(x, sign, tl.gather(x, tl.broadcast_to(lane ^ 2**k, x.shape), 1))
    x = tl.reshape(x, [COUNT])
    channel = tl.arange(0, COUNT)
    for k in tl.static_range(log2(IN_WARP), log2(BLOCK)):
        sign = tl.where((channel & 2**k) == 0, 1.0, -1.0)
        x = tl.fma(x, sign, tl.gather(x, channel ^ 2**k, 0))
    return x * 2.0 ** -(log2(BLOCK) // 2)


@triton.jit
def _means(
    source,  # of the first token
    valid,
    X_TOKEN: tl.constexpr,
    valid_token,
    D: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
    PADDED: tl.constexpr,
    TOKENS: tl.constexpr,
    CHECKED: tl.constexpr,
):
    """`grids.mean`, [channels]; of finite elements only if CHECKED."""
    WIDTH: tl.constexpr = LANES * VECTOR
    # In this order, so that no warp must wait for what another one has of a channel.
    row = tl.arange(0, STEP)[:, None, None]
    i = tl.arange(0, WIDTH)[None, None, :]
    channel = tl.arange(0, PADDED // WIDTH)[None, :, None] * WIDTH + i // VECTOR * VECTOR
    channel += i % VECTOR
    inside = None if PADDED == D else channel < D
    sums = tl.zeros([STEP, PADDED // WIDTH, WIDTH], tl.float32)
    count = tl.zeros([STEP, PADDED // WIDTH, WIDTH], tl.int32)
    for step in tl.range(TOKENS // STEP, loop_unroll_factor=1 if CHECKED else 16):
        mask = inside
        if valid is not None:
            mask = tl.load(valid + (step * STEP + row) * valid_token)
            mask = mask if inside is None else inside & mask
        at = source + (step * STEP + row) * X_TOKEN + channel
        x = tl.load(at, mask=mask, other=None if mask is None else 0)
        x = unpair(pair(x)) if x.dtype == tl.bfloat16 else x.to(tl.float32)
        if CHECKED:
            finite = x * 0.0 == 0.0
            x = tl.where(finite, x, 0.0)
            counts = finite if mask is None else finite & mask
            count += counts.to(tl.int32)
        sums = tl.fma(x, 1.0 / TOKENS, sums)  # a power of two: only the sum is rounded
    for k in tl.static_range(log2(STEP)):
        halves = tl.reshape(sums, [2, STEP // 2 ** (k + 1), PADDED // WIDTH, WIDTH])
        sums = tl.sum(halves, 0)
    sums = tl.reshape(sums, [PADDED // WIDTH, WIDTH])
    if CHECKED:
        counted = tl.maximum(tl.sum(count, 0), 1).to(tl.float32)
        sums *= tl.math.div_rn(TOKENS * 1.0, counted)
    return tl.reshape(sums, [PADDED])


@triton.jit
def put_center(
    at,  # where it goes, [channels]
    x,
    valid,
    smooth,
    valid_token,
    X_TOKEN: tl.constexpr,
    FORMAT: tl.constexpr,
    MAP: tl.constexpr,
    D: tl.constexpr,
    PADDED: tl.constexpr,
    TOKENS: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
    CHECKED: tl.constexpr,
):
    """Store the mapped mean of tokens."""
    own = _means(x, valid, X_TOKEN, valid_token, D, LANES, VECTOR, PADDED, TOKENS, CHECKED)
    channel = tl.arange(0, PADDED)
    known = None if D == PADDED else channel < D
    if smooth is not None:
        own = tl.math.div_rn(own, tl.load(smooth + channel, mask=known))
    own = hadamard_of_one(own, MAP)
    own = tl.where(own * 0.0 == 0.0, own, 0.0)
    own = round_to(own, FORMAT[6], FORMAT[7], FORMAT[8])
    tl.store(at + channel, own.to(at.dtype.element_ty), mask=known)
    tl.debug_barrier()
