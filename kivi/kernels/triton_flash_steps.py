"""Steps of the extend kernel: the running softmax, over packed tiles and over new tokens."""

from __future__ import annotations

import triton
import triton.language as tl

from kivi.kernels import triton_tile_rows as ops
from kivi.kernels import triton_tiles as tiles
from kivi.kernels.triton_tile_dense import dense_tile, plus_centers
from kivi.kernels.triton_tile_rows import NOTHING
from kivi.spec import PAGE_TOKENS

PAGE = tl.constexpr(PAGE_TOKENS)


@triton.constexpr_function
def tiles_of_page(planes):
    """Tiles of so many planes in a page."""
    return PAGE_TOKENS // (32 * planes)


@triton.jit
def absorb(
    q,
    k,
    v,
    seen,  # [tokens], or [rows, tokens]; None: all
    m,  # running maximum of scores, in units of 1 / unit
    total,
    acc,
    factor,
    cap,
    CAP: tl.constexpr,
    WIDE: tl.constexpr,
):
    """The running softmax with one more tile of tokens."""
    s = ops.dot(q, tl.trans(k), tl.zeros((q.shape[0], k.shape[0]), tl.float32), WIDE)
    unit = factor
    if CAP:
        s, unit = ops.capped(s * factor, cap), 1.0
    if seen is not None:
        s = tl.where(seen, s, NOTHING)
    new = tl.maximum(m, tl.max(s, 1))
    # In units of log 2: one fused multiply-add.
    p = tl.exp2(s * unit - (new * unit)[:, None])
    if seen is not None:
        p = tl.where(seen, p, 0.0)
    alpha = tl.exp2((m - new) * unit)
    total = total * alpha + tl.sum(p, 1)
    acc = ops.dot(ops.cast(p, v.dtype, WIDE), v, acc * alpha[:, None], WIDE)
    return new, total, acc


@triton.jit
def over_pages(
    q,
    m,
    total,
    acc,
    start,  # tiles
    stop,
    key_words,
    key_scale,
    key_zero,
    value_words,
    value_scale,
    value_zero,
    key_center,
    value_center,
    table,  # of the row
    h,
    heads,
    n,  # packed tokens of the row
    sinks,
    position,
    window,
    factor,
    cap,
    D: tl.constexpr,
    DV: tl.constexpr,
    K_BITS: tl.constexpr,
    K_CHANNEL: tl.constexpr,
    K_G: tl.constexpr,
    K_OFFSET: tl.constexpr,
    V_BITS: tl.constexpr,
    V_CHANNEL: tl.constexpr,
    V_G: tl.constexpr,
    V_OFFSET: tl.constexpr,
    K_C: tl.constexpr,
    V_C: tl.constexpr,
    PLANES: tl.constexpr,
    MASKED: tl.constexpr,
    WINDOW: tl.constexpr,
    CAP: tl.constexpr,
    FAST: tl.constexpr,
    WIDE: tl.constexpr,
):
    """`absorb` of packed tiles; those that are full need no mask."""
    DTYPE: tl.constexpr = q.dtype
    TILES: tl.constexpr = tiles_of_page(PLANES)
    K_ROW: tl.constexpr = K_BITS * 32 if K_BITS > 0 else PAGE
    V_ROW: tl.constexpr = V_BITS * 32 if V_BITS > 0 else PAGE
    K_META: tl.constexpr = PAGE // K_G * D if K_CHANNEL else PAGE * (D // K_G)
    V_META: tl.constexpr = PAGE // V_G * DV if V_CHANNEL else PAGE * (DV // V_G)
    page = tl.load(table + start // TILES, mask=start < stop, other=0)
    for i in range(start, stop):
        base = page * heads + h
        page = tl.load(table + (i + 1) // TILES, mask=i + 1 < stop, other=0)
        plane = i % TILES * PLANES
        last = plane + PLANES - 1
        if MASKED:
            # Planes that are not written read the last one that is, and get no weight.
            last = plane + tl.minimum(n // 32 - i * PLANES, PLANES) - 1
        k = dense_tile(
            key_words + base * (K_ROW * D),
            key_scale if key_scale is None else key_scale + base * K_META,
            key_zero if key_zero is None else key_zero + base * K_META,
            plane,
            last,
            D,
            K_BITS,
            K_CHANNEL,
            K_G,
            K_OFFSET,
            PLANES,
            DTYPE,
            FAST,
            WIDE,
        )
        if key_center is not None:
            at = key_center + base * (PAGE // K_C * D)
            k = plus_centers(k, at, plane, last, D, K_C, PLANES, WIDE)
        v = dense_tile(
            value_words + base * (V_ROW * DV),
            value_scale if value_scale is None else value_scale + base * V_META,
            value_zero if value_zero is None else value_zero + base * V_META,
            plane,
            last,
            DV,
            V_BITS,
            V_CHANNEL,
            V_G,
            V_OFFSET,
            PLANES,
            DTYPE,
            FAST,
            WIDE,
        )
        if value_center is not None:
            at = value_center + base * (PAGE // V_C * DV)
            v = plus_centers(v, at, plane, last, DV, V_C, PLANES, WIDE)
        seen = None
        if MASKED:
            index = i * (32 * PLANES) + tl.arange(0, 32 * PLANES)
            seen = (index < n)[None, :]
            if WINDOW:
                seen &= (sinks + index)[None, :] > position[:, None] - window
        m, total, acc = absorb(q, k, v, seen, m, total, acc, factor, cap, CAP, WIDE)
    return m, total, acc


@triton.jit
def over_new(
    q,
    m,
    total,
    acc,
    start,  # tiles
    stop,
    k,  # of the row and head
    v,
    k_token,
    v_token,
    valid,  # of the row
    mask,
    mask_token,
    query_position,
    tokens,
    token,  # of the query rows
    position,
    window,
    factor,
    cap,
    D: tl.constexpr,
    DV: tl.constexpr,
    TOKENS: tl.constexpr,
    MASKED: tl.constexpr,
    WINDOW: tl.constexpr,
    CAP: tl.constexpr,
    WIDE: tl.constexpr,
):
    """`absorb` of tiles of new tokens; those that all queries see need no mask."""
    c_k, c_v = tl.arange(0, tiles.padded(D)), tl.arange(0, tiles.padded(DV))
    for i in range(start, stop):
        j = i * TOKENS + tl.arange(0, TOKENS)
        inside = j < tokens
        if valid is not None:
            inside &= tl.load(valid + j, mask=inside, other=0) != 0
        k_at = k + j.to(tl.int64)[:, None] * k_token + c_k[None, :]
        v_at = v + j.to(tl.int64)[:, None] * v_token + c_v[None, :]
        x = tl.load(k_at, mask=inside[:, None] & (c_k[None, :] < D), other=0.0)
        y = tl.load(v_at, mask=inside[:, None] & (c_v[None, :] < DV), other=0.0)
        seen = None
        if MASKED:
            both = (token < tokens)[:, None] & inside[None, :]
            if mask is not None:
                at = mask + token.to(tl.int64)[:, None] * mask_token + j[None, :]
                seen = tl.load(at, mask=both, other=0) != 0
            else:
                there = tl.load(query_position + j, mask=inside, other=2**31 - 1).to(tl.int32)
                seen = both & (there[None, :] <= position[:, None])
                if WINDOW:
                    seen &= there[None, :] > position[:, None] - window
        m, total, acc = absorb(q, x, y, seen, m, total, acc, factor, cap, CAP, WIDE)
    return m, total, acc
