"""LayerCache: what it holds, that splits of tokens and rows do not matter, and its bytes."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from cache_checks import (
    SPECS,
    addresses,
    every_spec,
    filled,
    held_tensors,
    new,
    randn,
    same,
    same_cache,
    tokens,
    used_pages,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from one_thread import one_thread  # noqa: F401
from oracle_kivi import array, attention, published, quantized_tokens

from kivi import KVQuantizer, KVSpec, QuantSpec
from kivi.quantize import dequantize, quantize

# ---------------------------------------------------------------- what it holds


@every_spec
@pytest.mark.parametrize("t", [0, 1, 2, 40, 67, 68, 100, 546, 547, 1200])
def test_prefill_keeps_sinks_and_window_exact_and_quantizes_the_rest(spec, t):
    layer = new(spec, hkv=2, d=32, dv=16)
    k, v = tokens(layer, t)
    layer.prefill(k, v)
    sinks, packed = (
        spec.sink_length,
        quantized_tokens(t, spec.residual_length, spec.unit, spec.sink_length),
    )
    assert layer.lengths() == [t, t] and layer.packed_lengths() == [packed, packed]
    for x, back, one in zip((k, v), layer.dequantize(), (spec.key, spec.value), strict=True):
        body = dequantize(quantize(x[:, :, sinks : sinks + packed], one))
        expected = torch.cat([x[:, :, :sinks], body, x[:, :, sinks + packed :]], 2)
        assert same(back, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("bits", "group"), [(2, 32), (4, 64), (3, 128)])
def test_kivi_oracle(bits, group, dtype):
    """Prefill, then decode: the paper's cache in numpy, and attention over it.

    Where a scale or a code falls on a rounding tie, either outcome is right; such ties are few.
    """
    residual, d, n = 64, 32, 331
    scheme = KVQuantizer.get("kivi", bits=bits, group_size=group, residual_length=residual)
    layer = scheme.new_layer(batch_size=1, num_kv_heads=2, head_dim=d, dtype=dtype)
    k, v = tokens(layer, n, seed=1)
    layer.prefill(k, v)
    packed = quantized_tokens(n, residual, group)
    assert packed and layer.packed_lengths() == [packed]
    meta = torch.bfloat16 if dtype == torch.bfloat16 else torch.float16
    back, eps = [array(x) for x in layer.dequantize()], torch.finfo(dtype).eps
    for head in range(2):
        for x, axis, dense in zip((k, v), ("channel", "token"), back, strict=True):
            exact, got = array(x[0, head]), dense[0, head]
            assert np.array_equal(got[packed:], exact[packed:])
            size = group if axis == "channel" else min(group, d)
            outcomes, step = published(exact[:packed], bits, axis, size, meta)
            wrong = np.abs(got[:packed] - outcomes) > eps * (np.abs(outcomes) + 2**-10)
            assert not wrong.all(0).any()
            assert (outcomes != outcomes[0]).any(0).mean() < 0.02
            rounding = torch.finfo(meta).eps * (2**bits * step + np.abs(exact[:packed]))
            assert (np.abs(got[:packed] - exact[:packed]) <= step / 2 + rounding).all()
    q, new_tokens = randn(1, 4, 1, d, dtype=dtype, seed=9), tokens(layer, 1, seed=2)
    out = layer.decode(q, *new_tokens)
    both = [np.concatenate([x[0], array(y[0])], 1) for x, y in zip(back, new_tokens, strict=True)]
    expected = attention(array(q[0]), *both, np.ones((1, n + 1), bool), d**-0.5)
    assert np.abs(array(out[0]) - expected).max() <= eps * np.abs(expected).max() + 1e-5


@every_spec
def test_the_window_keeps_at_least_r_tokens_and_less_than_a_unit_more(spec):
    layer, sinks = new(spec, batch=1), spec.sink_length
    n = 0
    for t in [1, 1, 5, 32, 31, 1, 33, 64, 200, 1, 1, 7, 600, 3]:
        k, v = tokens(layer, t, seed=n)
        layer.append(k, v)
        n += t
        window = n - min(n, sinks) - layer.packed_lengths()[0]
        assert layer.lengths() == [n]
        assert min(max(0, n - sinks), spec.residual_length) <= window
        assert window < spec.residual_length + spec.unit
        exact = min(t, window)
        for x, back in zip((k, v), layer.dequantize(), strict=True):
            assert same(back[:, :, n - exact :], x[:, :, t - exact :])


def test_sinks_stay_exact_for_ever():
    spec = KVSpec(QuantSpec(1, "channel"), QuantSpec(1, "token"), 0, 5)
    layer = new(spec)
    k, v = tokens(layer, 700)
    for t in range(0, 700, 100):
        layer.append(k[:, :, t : t + 100], v[:, :, t : t + 100])
    for x, back in zip((k, v), layer.dequantize(), strict=True):
        assert same(back[:, :, :5], x[:, :, :5]) and not torch.equal(back[:, :, 5], x[:, :, 5])
    assert layer.packed_lengths() == [672, 672]


def test_dequantize_is_left_aligned_and_zero_past_a_rows_end():
    layer = new()
    k, v = tokens(layer, 100)
    layer.append(k, v, torch.arange(100) < torch.tensor([[100], [37]]))
    dense_k, dense_v = layer.dequantize()
    assert dense_k.shape == (2, 1, 100, 16) and same(dense_k[1, :, :37], k[1, :, :37])
    assert (dense_k[1, :, 37:] == 0).all() and (dense_v[1, :, 37:] == 0).all()


def test_an_empty_layer():
    for layer in (new(), new(max_length=100)):
        assert layer.lengths() == layer.packed_lengths() == [0, 0]
        assert [x.shape for x in layer.dequantize()] == [(2, 1, 0, 16)] * 2
        layer.crop(0)
        k, v = tokens(layer, 0)
        layer.prefill(k, v)
        layer.append(k, v)
        assert layer.decode(randn(2, 4, 0, 16), k, v).shape == (2, 4, 0, 16)
        assert layer.lengths() == [0, 0]


# ---------------------------------------------------------------- splits


@every_spec
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize(
    "chunks", [[1] * 80, [32] * 20, [33] * 20, [7, 100, 1, 400, 64], [515, 512], [64, 1100]]
)
def test_prefill_equals_any_sequence_of_appends(spec, dtype, chunks):
    """Bit for bit in the packed bytes and everywhere else."""
    total = sum(chunks) + 47
    whole, parts = (new(spec, hkv=2, d=32, dv=16, dtype=dtype) for _ in range(2))
    k, v = tokens(whole, total)
    whole.prefill(k, v)
    parts.prefill(k[:, :, :47], v[:, :, :47])
    done = 47
    for t in chunks:
        parts.append(k[:, :, done : done + t], v[:, :, done : done + t])
        done += t
    assert same_cache(parts, whole)


@pytest.mark.parametrize("max_length", [None, 1100])
def test_decode_stores_what_append_stores(max_length):
    one, two = (new(max_length=max_length, dtype=torch.float16) for _ in range(2))
    k, v = tokens(one, 1000)
    done = 0
    for t in [300, 1, 1, 5, 31, 32, 33, 100, 1, 400]:
        part = k[:, :, done : done + t], v[:, :, done : done + t]
        one.append(*part)
        two.decode(randn(2, 2, t, 16, dtype=torch.float16), *part)
        done += t
    assert same_cache(one, two)


@every_spec
def test_rows_are_independent(spec):
    """Splitting a batch changes nothing, ragged lengths or not."""
    chunks = [(50, [50, 3, 0]), (20, [20, 20, 1]), (300, [120, 300, 7]), (1, [1, 0, 1])]
    together = new(spec, batch=3, hkv=2, d=32, dtype=torch.float16)
    alone = [new(spec, batch=1, hkv=2, d=32, dtype=torch.float16) for _ in range(3)]
    for i, (t, counts) in enumerate(chunks):
        k, v = tokens(together, t, seed=i)
        q = randn(3, 4, t, 32, dtype=torch.float16, seed=100 + i)
        valid = torch.arange(t) >= t - torch.tensor(counts)[:, None]
        out = together.decode(q, k, v, valid=valid)
        for row, layer in enumerate(alone):
            single = layer.decode(
                *(x[row : row + 1] for x in (q, k, v)), valid=valid[row : row + 1]
            )
            keep = valid[row]
            # Matrix products of another batch size may add in another order.
            assert torch.allclose(out[row][:, keep], single[0][:, keep], rtol=2e-3, atol=1e-4)
    packed = used_pages(together)
    for row, layer in enumerate(alone):
        assert layer.lengths() == together.lengths()[row : row + 1]
        assert all(same(x, y) for x, y in zip(packed[row], used_pages(layer)[0], strict=True))
        for x, y in zip(together.dequantize(), layer.dequantize(), strict=True):
            assert same(x[row, :, : layer.lengths()[0]], y[0])


@every_spec
def test_padding_leaves_no_trace(spec):
    """Left, right or scattered padding, full of NaN: as if its columns did not exist."""
    n = 230
    plain = new(spec, batch=1, d=32)
    k, v = tokens(plain, n)
    plain.prefill(k, v)
    for where in ("left", "right", "holes"):
        columns = {
            "left": torch.arange(n) + 70,
            "right": torch.arange(n),
            "holes": torch.arange(n) + (torch.arange(n) * 70 // n),
        }[where]
        wide = [torch.full((1, 1, 300, 32), math.nan) for _ in range(2)]
        for target, source in zip(wide, (k, v), strict=True):
            target[:, :, columns] = source
        valid = torch.zeros(1, 300, dtype=torch.bool)
        valid[:, columns] = True
        for chunk in (300, 100, 32, 9):
            padded = new(spec, batch=1, d=32)
            for start in range(0, 300, chunk):
                part = slice(start, start + chunk)
                padded.append(wide[0][:, :, part], wide[1][:, :, part], valid[:, part])
            assert same_cache(padded, plain)


@every_spec
@pytest.mark.parametrize("chunks", [[100, 3, 64], [33, 700, 1, 512, 31, 480], [1200, 40, 1100]])
def test_valid_everywhere_is_no_mask(spec, chunks):
    """The host knows which tokens leave, or it does not."""
    one, two = (new(spec, d=32, dtype=torch.float16) for _ in range(2))
    for i, t in enumerate(chunks):
        k, v = tokens(one, t, seed=i)
        one.append(k, v)
        two.append(k, v, torch.ones(2, t, dtype=torch.bool))
    assert same_cache(one, two)


@every_spec
@pytest.mark.parametrize("chunk", [700, 350])
def test_exact_tokens_that_fill_a_page_do_not_count(spec, chunk):
    spec = replace(spec, residual_length=50)
    layer, twin = new(spec, d=32), new(spec, d=32)
    k, v = tokens(layer, 700)
    broken = [x.index_fill(2, torch.arange(660, 700), torch.nan) for x in (k, v)]
    for start in range(0, 700, chunk):
        layer.append(*(x[:, :, start : start + chunk] for x in broken))
    layer.crop(40)
    twin.append(k[:, :, :660], v[:, :, :660])
    twin.append(k[:, :, 660:], v[:, :, 660:])
    twin.crop(40)
    assert same_cache(layer, twin)
    q, (k, v) = randn(2, 2, 45, 32), tokens(layer, 45, seed=1)
    for t in (1, 44):
        part = [x[:, :, :t] for x in (q, k, v)]
        assert same(layer.decode(*part), twin.decode(*part))


@every_spec
def test_static_and_growing_caches_are_the_same(spec):
    grows, static = new(spec, d=32), new(spec, d=32, max_length=1300)
    for i, t in enumerate([600, 1, 31, 500, 2]):
        k, v = tokens(grows, t, seed=i)
        q = randn(2, 2, t, 32, seed=i)
        # Columns of pages that are not used yet make the sums round otherwise, nothing else.
        assert torch.allclose(grows.decode(q, k, v), static.decode(q, k, v), atol=1e-5)
    assert same_cache(grows, static)


# ---------------------------------------------------------------- bytes and addresses


@every_spec
@pytest.mark.parametrize("max_length", [None, 2000])
def test_allocated_bytes_are_all_that_is_held(spec, max_length):
    layer = new(spec, hkv=2, d=32, dv=16, dtype=torch.float16, max_length=max_length)

    def check():
        found, said = sum(held_tensors(layer).values()), layer.nbytes()
        assert said.allocated == found
        assert 0 < said.used <= said.allocated

    check()
    for i, t in enumerate([40, 700, 1, 33, 600]):
        layer.append(*tokens(layer, t, seed=i))
        check()
    layer.crop(300)
    check()
    layer.select([1, 1, 0])
    check()
    layer.select([0])
    check()
    child = layer.fork()
    check()
    del child
    layer.reset()
    check()


def test_used_bytes_follow_the_tokens():
    spec = KVSpec(QuantSpec(2, "channel"), QuantSpec(2, "token"), 0)
    layer = filled(1024, spec, batch=1, d=64, dtype=torch.float16)
    counters = sum(t.nbytes for t in (layer._table, layer._length, layer._packed))
    assert layer.nbytes().used == 3 * (2 * 1024 * 64) // 8 + counters
    layer.append(*tokens(layer, 5))
    assert layer.nbytes().used == 3 * (2 * 1024 * 64) // 8 + 5 * 2 * 64 * 2 + counters
    layer.reset()
    assert layer.nbytes().used <= counters


def test_a_growing_cache_allocates_what_it_needs():
    """Not for the whole length at once, and not again for tokens that fit."""
    layer = new(batch=1)
    sizes = []
    for i in range(12):
        layer.append(*tokens(layer, 256, seed=i))
        sizes.append(layer.nbytes().allocated)
    page = layer._pages.pool.page_nbytes
    assert sizes == sorted(sizes) and len(set(sizes)) > 4
    pages = layer._pages.pool.nbytes // page
    needed = -(-layer.packed_lengths()[0] // 512)
    assert needed + 1 <= pages <= needed * 1.25 + 2


@every_spec
def test_a_static_cache_keeps_its_addresses(spec):
    layer = new(spec, max_length=1500, d=32)
    before, held = addresses(layer), layer.nbytes().allocated
    for i, t in enumerate([600, 1, 32, 33, 500]):
        layer.append(*tokens(layer, t, seed=i))
        layer.decode(randn(2, 2, 1, 32), *tokens(layer, 1))
    layer.crop(20)
    layer.crop(700)
    layer.select([1, 0])
    layer.select([1, 1])
    layer.append(*tokens(layer, 700))
    layer.select([0, 0])
    layer.crop(600)
    layer.append(*tokens(layer, 300))
    layer.reset()
    layer.prefill(*tokens(layer, 1500))
    assert addresses(layer) == before and layer.nbytes().allocated == held


def test_a_static_cache_moves_for_nothing_but_a_fork_and_more_rows():
    """After a fork everything has its place again: nothing that either does moves the pool."""
    layer = filled(1200, max_length=1500)
    child = layer.fork()
    before = addresses(layer), addresses(child)
    layer.reset()
    layer.prefill(*tokens(layer, 1500))
    child.crop(1000)
    child.append(*tokens(child, 1300))
    assert (addresses(layer), addresses(child)) == before


@given(st.integers(1, 3000), st.sampled_from(list(SPECS)))
@settings(max_examples=20)
def test_a_static_cache_takes_exactly_max_length(max_length, name):
    layer = new(SPECS[name], batch=1, max_length=max_length)
    layer.prefill(*tokens(layer, max_length))
    assert layer.lengths() == [max_length]
    with pytest.raises(ValueError, match=f"max_length={max_length}"):
        layer.append(*tokens(layer, 1))
