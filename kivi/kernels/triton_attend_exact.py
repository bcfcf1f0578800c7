"""The attention kernel's part over sinks and the exact window."""

from __future__ import annotations

import triton
import triton.language as tl

from kivi.kernels import triton_tile_rows as ops
from kivi.kernels import triton_tiles as tiles


@triton.jit
def over_exact(
    m,  # [ROWS], maximum of the scores so far
    weight,  # [ROWS], sum of probabilities so far
    acc,  # sums of values so far, a tile [channels, ROWS] for each group
    query,  # a tile for each group of channels
    keys,  # the row and head's exact slots, [sinks + ring, D]
    values,
    slots,  # how many of them; 0 to do nothing
    position,  # [ROWS], of the queries
    newest,
    packed,
    sinks,
    ring,
    factor,
    cap,
    window,
    margin,  # what the maximum is kept above the scores
    D: tl.constexpr,
    KG: tl.constexpr,
    DV: tl.constexpr,
    VG: tl.constexpr,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
    WINDOW: tl.constexpr,
    CAP: tl.constexpr,
    WIDE: tl.constexpr,
):
    """`m`, `weight` and `acc` after them."""
    KN: tl.constexpr = D // KG
    VN: tl.constexpr = DV // VG
    t = tl.arange(0, STEP)
    for e in range(0, slots, STEP):
        token, seen = ops.exact_token(e + t, newest, packed, sinks, ring)
        near = seen[None, :] & (token[None, :] <= position[:, None])
        if WINDOW:
            near &= token[None, :] > position[:, None] - window
        x = tl.zeros((ROWS, STEP), tl.float32)
        for g in tl.static_range(KN):
            y = tiles.load_seen(keys + g * KG, e + t, seen, D, KG)
            x += ops.rows_dot(query[g], y, ROWS, WIDE)
        x = x * factor
        if CAP:
            x = ops.capped(x, cap)
        x = tl.where(near, x, float("-inf"))
        m, alpha = ops.raised(m, tl.max(x, 1) + margin)
        p = tl.exp2(x - m[:, None])
        weight = weight * alpha + tl.sum(p, 1)
        p_t = ops.cast(tl.trans(p), query[0].dtype, WIDE)
        acc = ops.rescaled(acc, alpha, VN)
        new_acc = ()
        for g in tl.static_range(VN):
            x = tiles.load_seen(values + g * VG, e + t, seen, DV, VG)
            new_acc += (ops.dot(tl.trans(x), p_t, acc[g], WIDE),)
        acc = new_acc
    return m, weight, acc
