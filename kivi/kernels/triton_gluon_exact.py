"""The Gluon kernel's part over sinks and the exact window."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

from kivi.kernels.triton_gluon_steps import cap
from kivi.kernels.triton_tile_gluon import (
    MMA,
    OPERAND_A,
    OPERAND_B,
    copy_exact,
    exact_rows,
    transpose_blocks,
)


@gluon.jit
def _fetch(target, source, rows, D: gl.constexpr):
    """What lies in these 32 slots, or as many of its channels as `target [n, 32, VG]` takes."""
    NG: gl.constexpr = target.shape[0]
    VG: gl.constexpr = target.shape[2]
    for g in gl.static_range(NG):
        copy_exact(target.index(g), source + g * VG, rows, VG, D)


@gluon.jit
def attend_exact(
    m, mass, values, q, unit_score, seen_to, k_words, v_words, k_rows, v_rows,
    tile0, tile1, tokens, packed, slots, sinks, softcap,
    D: gl.constexpr,
):  # fmt: skip
    """Go on with `m`, `mass [8]` and `values` (some channels each, `[n, 8]`).

    Args:
        m: maximum of the scores so far, in log 2.
        mass: sum of probabilities so far.
        values: sums of values so far.
        q: operands B, `[D, 8]` together; scores are their products times `unit_score`, `[8]` or
            a number.
        unit_score: see q.
        seen_to: `[8]`, the last position that each query sees.
        k_words: shared memory of a tile of keys, `[1, 32, n]` for each of q; `v_words` of values,
            `[m, 32, n / m]`. Where they are several, a piece of both lies in the same place.
        v_words: see k_words.
        k_rows: the (row, head)'s exact slots; `v_rows` likewise.
        v_rows: see k_rows.
        tile0: first tile of 32 exact tokens, `tile1` the end.
        tile1: see tile0.
        tokens: of the row, of which `packed` are packed.
        packed: see tokens.
        slots: sinks and ring.
        sinks: slots of the first tokens.
        softcap: see the kernel.
        D: head dimension.
    """
    dtype: gl.constexpr = q[0].dtype
    PIECES: gl.constexpr = len(q)
    WIDE: gl.constexpr = D // PIECES
    EACH: gl.constexpr = len(values) // PIECES
    t32 = gl.arange(0, 32, layout=gl.SliceLayout(1, MMA))
    ring = slots - sinks
    start = packed + tile0 * 32 - sinks
    start = gl.where(start < 0, start, start % ring)
    rows = exact_rows(tile0 * 32, start, tokens, packed, ring, sinks)
    for c in gl.static_range(PIECES):
        _fetch(k_words[c], k_rows + c * WIDE, rows, D)
        async_copy.commit_group()
    if PIECES == 1:
        _fetch(v_words[0], v_rows, rows, D)
        async_copy.commit_group()
    for tile in range(tile0, tile1):
        index = tile * 32 + t32
        position = gl.where(index < sinks, index, packed + index)
        x = gl.zeros([32, 8], gl.float32, layout=MMA)
        for c in gl.static_range(PIECES):
            async_copy.wait_group(1)
            k_tile = k_words[c].index(0).load(OPERAND_A).to(dtype, bitcast=True)
            if PIECES > 1:
                _fetch(v_words[c], v_rows + c * WIDE, rows, D)
            if c == PIECES - 1:
                start += 32
                start = gl.where(start < ring, start, start - ring)
                rows = exact_rows(tile * 32 + 32, start, tokens, packed, ring, sinks)
            if PIECES == 1 and tile + 1 < tile1:
                _fetch(k_words[c], k_rows, rows, D)
            async_copy.commit_group()
            x = mma_v2(k_tile, q[c], x)
        x = cap(x * unit_score, softcap)
        x = gl.where(position[:, None] <= seen_to[None, :], x, float("-inf"))
        new_m = gl.maximum(m, gl.max(x, 0))
        alpha = gl.exp2(m - new_m)
        m = new_m
        p = gl.exp2(x - m[None, :])
        mass = mass * alpha + gl.sum(p, 0)
        p = gl.convert_layout(transpose_blocks(p.to(dtype)), OPERAND_B, assert_trivial=True)
        scaled = ()
        for c in gl.static_range(PIECES):
            async_copy.wait_group(1)
            for g in gl.static_range(EACH):
                v_tile = v_words[c].index(g).permute((1, 0)).load(OPERAND_A)
                v_tile = v_tile.to(dtype, bitcast=True)
                x = values[c * EACH + g] * alpha[None, :]
                scaled = scaled + (mma_v2(v_tile, p, x),)
            if tile + 1 < tile1:
                if PIECES == 1:
                    _fetch(v_words[c], v_rows, rows, D)
                else:
                    _fetch(k_words[c], k_rows + c * WIDE, rows, D)
            async_copy.commit_group()
        values = scaled
    async_copy.wait_group(0)
    return m, mass, values
