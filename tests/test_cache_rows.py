"""crop, select, fork and reset: what goes, what is shared, and who may write it."""

import gc

import pytest
import torch
from cache_checks import (
    KIVI,
    check_decode,
    every_spec,
    filled,
    new,
    randn,
    references_are_right,
    same,
    same_cache,
    tokens,
)
from one_thread import one_thread  # noqa: F401

from kivi import KVSpec
from kivi.quantize import dequantize, quantize

# ---------------------------------------------------------------- crop


@every_spec
@pytest.mark.parametrize("n", [30, 120, 700])
def test_crop_keeps_the_first_tokens(spec, n):
    for drop in {0, 1, 5, 29, n // 2, n - 7, n - 1, n}:
        if drop > n:
            continue
        layer = filled(n, spec, d=32, dtype=torch.float16)
        before = layer.dequantize()
        layer.crop(drop)
        assert layer.lengths() == [n - drop] * 2
        for x, y in zip(before, layer.dequantize(), strict=True):
            assert same(x[:, :, : n - drop], y)
        packed = layer.packed_lengths()[0]
        assert packed % spec.unit == 0 and packed <= max(0, n - drop - spec.sink_length)


def test_a_crop_inside_a_unit_moves_the_rest_of_it_into_the_window():
    layer = filled(3 + 96 + 32)  # sinks, three units, R
    assert layer.packed_lengths() == [96, 96]
    dense = layer.dequantize()
    layer.crop(32 + 20)  # 12 tokens of the third unit are left
    assert layer.packed_lengths() == [64, 64]
    k, v = tokens(layer, 32 + 32 - 12, seed=7)
    layer.append(k, v)  # the unit is whole again and leaves
    assert layer.packed_lengths() == [96, 96]
    for x, old, fresh, one in zip(
        layer.dequantize(), dense, (k, v), (KIVI.key, KIVI.value), strict=True
    ):
        unit = torch.cat([old[:, :, 67:79], fresh[:, :, :20]], 2)
        expected = torch.cat([old[:, :, :67], dequantize(quantize(unit, one)), fresh[:, :, 20:]], 2)
        assert same(x, expected)


@every_spec
@pytest.mark.parametrize("again", [1, 32, 150])
def test_crop_of_exact_tokens_then_append_is_append(spec, again):
    """As in speculative decoding: a rejected draft leaves no trace."""
    n = spec.sink_length + spec.residual_length + 3 * spec.unit
    draft = max(1, min(spec.residual_length, 20)) if spec.residual_length else 0
    layer, plain = (filled(n, spec, d=32) for _ in range(2))
    layer.append(*tokens(layer, draft, seed=3)) if draft else None
    layer.crop(draft)
    k, v = tokens(layer, again, seed=4)
    layer.append(k, v)
    plain.append(k, v)
    assert same_cache(layer, plain)


def test_crop_in_ragged_rows():
    layer = new(KIVI, batch=3)
    n = torch.tensor([[700], [100], [40]])
    layer.prefill(*tokens(layer, 700), torch.arange(700) < n)
    before = layer.dequantize()
    layer.crop(40)
    assert layer.lengths() == [660, 60, 0]
    for x, y in zip(before, layer.dequantize(), strict=True):
        assert same(x[0, :, :660], y[0]) and same(x[1, :, :60], y[1, :, :60])
    check_decode(layer, 3)
    check_decode(layer, 50, seed=51)


# ---------------------------------------------------------------- rows


@every_spec
@pytest.mark.parametrize("max_length", [None, 1400])
@pytest.mark.parametrize("indices", [[1, 0], [0, 0], [1, 1], [1], [0, 1, 0, 1], [0, 0, 1]])
def test_select(spec, max_length, indices):
    layer = new(spec, d=32, max_length=max_length)
    k, v = tokens(layer, 800)
    layer.prefill(k, v, torch.arange(800) < torch.tensor([[800], [650]]))
    before = layer.dequantize()
    layer.select(torch.tensor(indices))
    assert layer.batch_size == len(indices) and references_are_right(layer)
    assert layer.lengths() == [[800, 650][i] for i in indices]
    for x, y in zip(before, layer.dequantize(), strict=True):
        for row, i in enumerate(indices):
            n = layer.lengths()[row]
            assert same(x[i, :, :n], y[row, :, :n])
    check_decode(layer, 1)
    for step in range(3):  # rows part ways, over a page's end
        layer.append(*tokens(layer, 149, seed=60 + step))
        check_decode(layer, 1, seed=60 + step)
    assert references_are_right(layer)


def test_beams_share_full_pages():
    layer = filled(2 * 512 + 200, KVSpec(KIVI.key, KIVI.value, 32, 0), batch=1, max_length=None)
    one = layer.nbytes()
    page = layer._pages.pool.page_nbytes
    layer.select([0] * 4)
    assert [row[:2] for row in layer._pages.rows] == [layer._pages.rows[0][:2]] * 4
    assert len({row[2] for row in layer._pages.rows}) == 4
    exact = layer.nbytes().used - one.used - 3 * page
    # Only the last page and the window were repeated, and some counters.
    window = 1224 - layer.packed_lengths()[0]
    assert 0 <= exact - 3 * window * 2 * 16 * 4 <= 3 * 8 * 10
    assert layer.nbytes().allocated - one.allocated <= 4 * page + 3 * (one.allocated - 4 * page)


@pytest.mark.parametrize("max_length", [None, 1400])
def test_copy_on_write_isolates_rows(max_length):
    """Rows that continue one row write their own tokens and nobody else's."""
    layer = filled(700, batch=1, max_length=max_length, dtype=torch.float16)
    alone = [filled(700, batch=1, dtype=torch.float16) for _ in range(3)]
    layer.select([0, 0, 0])
    for step, t in enumerate([1, 33, 200, 300]):
        k, v = tokens(layer, t, seed=70 + step)
        layer.append(k, v)
        for row, single in enumerate(alone):
            single.append(k[row : row + 1], v[row : row + 1])
    for row, single in enumerate(alone):
        for x, y in zip(layer.dequantize(), single.dequantize(), strict=True):
            assert same(x[row], y[0])


@pytest.mark.parametrize("max_length", [None, 1400])
def test_crop_of_shared_pages_isolates_rows(max_length):
    """A crop into pages that beams or forks share makes them the row's own before they change."""
    layer = filled(1100, batch=1, max_length=max_length)
    layer.select([0, 0])
    child = layer.fork()
    dense = child.dequantize()
    layer.crop(800)
    check_decode(layer, 1)
    check_decode(layer, 400, seed=55)
    assert all(same(x, y) for x, y in zip(child.dequantize(), dense, strict=True))
    child.crop(700)
    for x, y in zip(child.dequantize(), dense, strict=True):
        assert same(x, y[:, :, :400])
    check_decode(child, 300)
    assert references_are_right(layer, child)


@every_spec
@pytest.mark.parametrize("max_length", [None, 1500])
def test_a_fork_and_its_origin_never_touch_each_other(spec, max_length):
    layer = filled(700, spec, d=32, max_length=max_length)
    twin = filled(700, spec, d=32, max_length=max_length)
    child = layer.fork()
    assert same_cache(child, layer) and references_are_right(layer, child)
    for step, t in enumerate([1, 40, 300]):
        mine, theirs = tokens(layer, t, seed=80 + step), tokens(layer, t, seed=90 + step)
        layer.append(*mine)
        assert not torch.equal(layer.dequantize()[0][:, :, -t:], child.dequantize()[0][:, :, -t:])
        child.append(*theirs)
        twin.append(*mine)
        assert same_cache(layer, twin)
    again = filled(700, spec, d=32)
    for step, t in enumerate([1, 40, 300]):
        again.append(*tokens(again, t, seed=90 + step))
    assert same_cache(child, again)
    dense = child.dequantize()
    layer.reset()
    assert all(same(x, y) for x, y in zip(child.dequantize(), dense, strict=True))
    assert references_are_right(layer, child)


def test_a_fork_shares_full_pages_and_frees_its_own():
    layer = filled(3 + 32 + 1024 + 64, batch=1)
    pool, rows = layer._pages.pool, layer._pages.rows
    assert len(rows[0]) == 3
    before = list(pool.references)
    child = layer.fork()
    assert child._pages.pool is pool and child._pages.rows[0][:2] == rows[0][:2]
    assert child._pages.rows[0][2] != rows[0][2]
    grand = child.fork()
    assert [pool.references[p] for p in rows[0]] == [3, 3, 1]
    del child
    gc.collect()
    assert [pool.references[p] for p in rows[0]] == [2, 2, 1]
    assert references_are_right(layer, grand)
    del grand
    gc.collect()
    assert pool.references[: len(before)] == before and sum(pool.references) == sum(before)
    held = layer.nbytes().allocated
    child = layer.fork()  # what was freed is used again
    assert layer.nbytes().allocated == held
    del layer
    gc.collect()
    assert sum(pool.references) == 1 + 3
    check_decode(child, 1)


def test_forks_of_forks_see_one_history():
    layer = filled(600, batch=2)
    forks = [layer]
    for i in range(3):
        child = forks[-1].fork()
        child.append(*tokens(child, 200, seed=20 + i))
        forks.append(child)
    for i, fork in enumerate(forks):
        plain = filled(600, batch=2)
        for j in range(i):
            plain.append(*tokens(plain, 200, seed=20 + j))
        assert same_cache(fork, plain)
    assert references_are_right(*forks)


@pytest.mark.parametrize("max_length", [None, 800])
def test_reset_and_reuse(max_length):
    layer = filled(700, max_length=max_length)
    layer.decode(randn(2, 1, 1, 16), *tokens(layer, 1))
    held = layer.nbytes()
    layer.reset()
    assert layer.lengths() == layer.packed_lengths() == [0, 0]
    assert [x.shape[2] for x in layer.dequantize()] == [0, 0]
    assert layer.nbytes().allocated <= held.allocated and references_are_right(layer)
    again, fresh = tokens(layer, 650, seed=9), filled(650, seed=9, max_length=max_length)
    layer.prefill(*again)
    assert layer.packed_lengths() == fresh.packed_lengths()
    assert all(same(x, y) for x, y in zip(layer.dequantize(), fresh.dequantize(), strict=True))
    check_decode(layer, 5)
