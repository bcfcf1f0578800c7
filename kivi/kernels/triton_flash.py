"""The kernel of extend attention: many query rows over packed pages, exact slots and new tokens.

A program takes a block of query rows of one KV head (tokens times the query heads that share it)
and a share of what they see, a tile of tokens at a time: packed pages, then the exact slots, then
the new tokens up to the diagonal. Packed tokens are dequantized tile by tile on their way to the
matrix units; nothing dense is ever written to memory.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kivi.kernels import triton_tile_rows as ops
from kivi.kernels import triton_tiles as tiles
from kivi.kernels.triton_flash_steps import absorb, over_new, over_pages
from kivi.kernels.triton_tile_rows import LN2, LOG2E, NOTHING

# Numbers that change from prompt to prompt: the compiled kernel stays the same.
UNSPECIALIZED = (
    *("factor", "cap", "window", "heads", "columns", "tokens", "ratio", "blocks", "splits"),
    *("sinks", "ring", "total_splits", "first_split"),
)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def extend(
    q,  # [B, Hq, T, D]
    k,  # [B, Hkv, T, D]
    v,  # [B, Hkv, T, DV]
    key_words,  # [pages, Hkv, K_BITS, 32, D], or [pages, Hkv, 512, D] where K_BITS is 0
    key_scale,  # channel: [pages, Hkv, 512 / G, D]; token: [pages, Hkv, 512, D / G]
    key_zero,
    value_words,
    value_scale,
    value_zero,
    key_center,  # [pages, Hkv, 512 / K_C, D], what was taken off the mapped keys; or None
    value_center,
    table,  # [B, columns]
    packed,  # [B]
    exact_key,  # [B, Hkv, sinks + ring + 1, D]
    exact_value,
    length,  # [B]
    query_position,  # [B, T]
    valid,  # [B, T] uint8, or None
    mask,  # [B, 1, T, T] uint8, or None
    s_aux,  # [Hq], or None
    out,  # [rows, DV] where FINAL, else [rows, splits, DV] float32
    lse,  # [rows], natural, where FINAL, else [rows, splits], base 2
    q_row,  # strides
    q_head,
    q_token,
    k_row,
    k_head,
    k_token,
    v_row,
    v_head,
    v_token,
    mask_row,
    mask_token,
    factor,  # of the scores; log2(e), or 2 log2(e) and the softcap divided out; not negative
    cap,  # softcap * log2(e)
    window,
    heads,  # Hkv
    columns,
    tokens,  # T
    ratio,  # query heads of a KV head
    blocks,  # of rows
    splits,
    sinks,
    ring,
    total_splits,  # of this and another launch, and which of them are this one's
    first_split,
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
    K_C: tl.constexpr,  # tokens that share a center
    V_C: tl.constexpr,
    ROWS: tl.constexpr,
    PLANES: tl.constexpr,  # of a tile
    WINDOW: tl.constexpr,
    CAP: tl.constexpr,
    FINAL: tl.constexpr,
    PAGES: tl.constexpr,  # whether packed pages are attended to
    OTHERS: tl.constexpr,  # whether exact slots and new tokens are
    FAST: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Attention of a block of query rows over a share of their tokens."""
    PAST: tl.constexpr = table is not None
    PLAIN: tl.constexpr = valid is None and mask is None and not WINDOW
    TOKENS: tl.constexpr = 32 * PLANES

    program = tl.program_id(0)
    split, program = program % splits, program // splits
    # The last tokens see the most: their blocks begin first.
    block, pair = blocks - 1 - program % blocks, program // blocks
    b, h = pair // heads, pair % heads
    wide_b, wide_h = b.to(tl.int64), h.to(tl.int64)
    t = tl.arange(0, TOKENS)

    # Rows by token, then head: a block spans few tokens.
    r = block * ROWS + tl.arange(0, ROWS)
    token, head = r // ratio, h * ratio + r % ratio
    real = token < tokens
    query_position += wide_b * tokens
    counts = real
    if valid is not None:
        valid += wide_b * tokens
        counts &= tl.load(valid + token, mask=real, other=0) != 0
    position = tl.load(query_position + token, mask=counts, other=2**31 - 1).to(tl.int32)
    at = q + wide_b * q_row + head.to(tl.int64) * q_head + token.to(tl.int64) * q_token
    c = tl.arange(0, tiles.padded(D))
    query = tl.load(at[:, None] + c[None, :], mask=counts[:, None] & (c[None, :] < D), other=0.0)

    # What there is to see: packed tiles, tiles of exact slots, tiles of new tokens.
    first, final = block * ROWS // ratio, tl.minimum((block * ROWS + ROWS - 1) // ratio, tokens - 1)
    begin, n, many, own = 0, 0, 0, 0
    if PAST:
        n = tl.load(packed + b).to(tl.int32)
        if PAGES:
            many = tl.cdiv(n, TOKENS)
        if OTHERS:
            own = tl.cdiv(sinks + ring, TOKENS)
        if WINDOW:
            begin = tl.maximum(tl.min(position, 0) - window + 1 - sinks, 0) // TOKENS
            begin = tl.minimum(begin, many)
    new_begin, new_end = 0, tl.cdiv(final + 1, TOKENS)
    if mask is not None:
        new_end = tl.cdiv(tokens, TOKENS)
        mask += wide_b * mask_row
    if WINDOW and mask is None and valid is None:
        new_begin = tl.maximum(first - window + 1, 0) // TOKENS
    if not OTHERS:
        new_begin, new_end = 0, 0
    share = tl.cdiv(many - begin + own + new_end - new_begin, splits)
    low = split * share
    high = low + share

    m = tl.full((ROWS,), NOTHING, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, tiles.padded(DV)), tl.float32)

    if PAST and PAGES:
        start, stop = begin + low, tl.minimum(begin + high, many)
        if not WINDOW:
            full = tl.minimum(stop, n // TOKENS)
            m, total, acc = over_pages(
                query,
                m,
                total,
                acc,
                start,
                full,
                key_words,
                key_scale,
                key_zero,
                value_words,
                value_scale,
                value_zero,
                key_center,
                value_center,
                table + wide_b * columns,
                h,
                heads,
                n,
                sinks,
                position,
                window,
                factor,
                cap,
                D,
                DV,
                K_BITS,
                K_CHANNEL,
                K_G,
                K_OFFSET,
                V_BITS,
                V_CHANNEL,
                V_G,
                V_OFFSET,
                K_C,
                V_C,
                PLANES,
                False,
                WINDOW,
                CAP,
                FAST,
                WIDE,
            )
            start = tl.maximum(start, full)
        m, total, acc = over_pages(
            query,
            m,
            total,
            acc,
            start,
            stop,
            key_words,
            key_scale,
            key_zero,
            value_words,
            value_scale,
            value_zero,
            key_center,
            value_center,
            table + wide_b * columns,
            h,
            heads,
            n,
            sinks,
            position,
            window,
            factor,
            cap,
            D,
            DV,
            K_BITS,
            K_CHANNEL,
            K_G,
            K_OFFSET,
            V_BITS,
            V_CHANNEL,
            V_G,
            V_OFFSET,
            K_C,
            V_C,
            PLANES,
            True,
            WINDOW,
            CAP,
            FAST,
            WIDE,
        )
    low, high = low - (many - begin), high - (many - begin)

    if PAST and OTHERS:
        # The exact slots: sinks, then the ring.
        newest = tl.load(length + b).to(tl.int32) - 1 - sinks
        base = pair.to(tl.int64) * (sinks + ring + 1)
        for i in range(tl.maximum(low, 0), tl.minimum(high, own)):
            index, slot_seen = ops.exact_token(i * TOKENS + t, newest, n, sinks, ring)
            x = tiles.load_seen(exact_key + base * D, i * TOKENS + t, slot_seen, D, D)
            y = tiles.load_seen(exact_value + base * DV, i * TOKENS + t, slot_seen, DV, DV)
            seen = slot_seen[None, :]
            if WINDOW:
                seen &= index[None, :] > position[:, None] - window
            m, total, acc = absorb(query, x, y, seen, m, total, acc, factor, cap, CAP, WIDE)
    low, high = low - own, high - own

    start = new_begin + tl.maximum(low, 0)
    stop = tl.minimum(new_begin + high, new_end)
    if PLAIN:
        full = tl.minimum(stop, (first + 1) // TOKENS)
        m, total, acc = over_new(
            query,
            m,
            total,
            acc,
            start,
            full,
            k + wide_b * k_row + wide_h * k_head,
            v + wide_b * v_row + wide_h * v_head,
            k_token,
            v_token,
            valid,
            mask,
            mask_token,
            query_position,
            tokens,
            token,
            position,
            window,
            factor,
            cap,
            D,
            DV,
            TOKENS,
            False,
            WINDOW,
            CAP,
            WIDE,
        )
        start = tl.maximum(start, full)
    m, total, acc = over_new(
        query,
        m,
        total,
        acc,
        start,
        stop,
        k + wide_b * k_row + wide_h * k_head,
        v + wide_b * v_row + wide_h * v_head,
        k_token,
        v_token,
        valid,
        mask,
        mask_token,
        query_position,
        tokens,
        token,
        position,
        window,
        factor,
        cap,
        D,
        DV,
        TOKENS,
        True,
        WINDOW,
        CAP,
        WIDE,
    )

    unit = 1.0 if CAP else factor
    total_lse, share_of = ops.normalised(m * unit, total)
    index = (wide_b * heads * ratio + head) * tokens + token
    if FINAL:
        if s_aux is not None:
            aux = tl.load(s_aux + head, mask=real, other=0.0).to(tl.float32) * LOG2E
            total_lse, keep = ops.join(total_lse, aux)
            share_of *= keep
        tl.store(lse + index, tl.where(total_lse > NOTHING, total_lse * LN2, NOTHING), mask=real)
    else:
        index = index * total_splits + first_split + split
        tl.store(lse + index, total_lse, mask=real)
    c = tl.arange(0, tiles.padded(DV))
    x = ops.saturated(acc * share_of[:, None], out.dtype.element_ty, WIDE and FINAL)
    at = out + index[:, None] * DV + c[None, :]
    tl.store(at, x, mask=real[:, None] & (c[None, :] < DV))
