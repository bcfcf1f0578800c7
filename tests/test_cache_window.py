"""A layer with a sliding window keeps what queries can see, in pages that come round."""

import pytest
import torch
from cache_checks import KIVI, addresses, new, randn, references_are_right, same, tokens
from one_thread import one_thread  # noqa: F401
from torch._dynamo.testing import CompileCounterWithBackend

from kivi import KVSpec, LayerCache, QuantSpec

WINDOW = 300
EIGHT_BIT = KVSpec(QuantSpec(8, "channel", 64), None, 5, 1)


def pages(layer: LayerCache) -> int:
    return len(layer._pages.pool.references) - 1


def decode(layer: LayerCache, t: int, seed: int, **options) -> torch.Tensor:
    q = randn(layer.batch_size, 2 * layer.num_kv_heads, t, layer.head_dim, seed=9 + seed)
    return layer.decode(q, *tokens(layer, t, seed), **options)


def twins(spec: KVSpec, max_length: int | None) -> tuple[LayerCache, LayerCache]:
    """A layer that forgets, and one that keeps all and is asked with the same window."""
    return new(spec, max_length=max_length, sliding_window=WINDOW), new(spec, max_length=max_length)


@pytest.mark.parametrize("padding", [90, 0])
@pytest.mark.parametrize(("spec", "max_length"), [(KIVI, None), (EIGHT_BIT, 3300)])
def test_forgetting_changes_nothing(spec: KVSpec, max_length: int | None, padding: int) -> None:
    """Bit for bit, in steps that end anywhere in a page, one of them longer than all the pages."""
    layer, full = twins(spec, max_length)
    k, v = tokens(layer, 700)
    valid = torch.arange(700) >= torch.tensor([[0], [padding]])
    for each in (layer, full):
        each.prefill(k, v, valid if padding else None)
    for seed, t in enumerate((1, 33, 32, 480, 1, 31, 1200, 1, 700, 1)):
        mine = decode(layer, t, seed)
        assert same(mine, decode(full, t, seed, sliding_window=WINDOW))
    held = max(layer.lengths())
    assert layer.lengths() == full.lengths()
    for a, b in zip(layer.dequantize(), full.dequantize(), strict=True):
        assert same(a[:, :, held - WINDOW :], b[:, :, held - WINDOW :])
        assert not a[:, :, spec.sink_length : held - 3 * 512].any()
    assert pages(full) >= 3 * pages(layer) == 12


@pytest.mark.parametrize("max_length", [None, 6000])
def test_bytes_do_not_grow_with_the_context(max_length: int | None) -> None:
    layer, sizes = new(max_length=max_length, sliding_window=WINDOW), []
    for t in (2000, 1, 900, 2500):
        layer.append(*tokens(layer, t))
        table = layer._table.nbytes
        sizes.append(tuple(n - table for n in layer.nbytes()))
    assert {allocated for allocated, _ in sizes} == {sizes[0][0]}
    # Two rows of two pages; the rest is counters and tokens in sinks and exact window.
    pool, exact = layer._pages.pool, layer._exact_key[0, :, 0].nbytes * 2
    for _, used in sizes:
        assert 2 * 35 * exact <= used - 4 * pool.page_nbytes < 2 * (35 + 32) * exact + 100
    full = new(max_length=max_length)
    full.append(*tokens(full, 5401))
    assert full.nbytes().allocated > 3 * layer.nbytes().allocated


def test_a_prompt_packs_only_what_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = []
    layer = new(sliding_window=WINDOW)
    op = layer._ops.quantize_pack

    def count(pages, spec, x, page, first, *rest):
        packed.append(page.numel() * x.shape[-2])
        op(pages, spec, x, page, first, *rest)

    layer._ops = layer._ops._replace(quantize_pack=count)
    layer.append(*tokens(layer, 3000))
    layer.append(*tokens(layer, 3000))
    # Keys and values of two rows, twice: at most two pages each, and runs that go to the bin.
    assert sum(packed) <= 2 * 2 * 2 * 2 * 512


@pytest.mark.parametrize("max_length", [None, 3000])
@pytest.mark.parametrize("length", [1023, 1100, 1183, 1184, 1500, 2047])
def test_crop_of_128_is_always_allowed(length: int, max_length: int | None) -> None:
    layer, full = twins(KIVI, max_length)
    for each in (layer, full):
        each.append(*tokens(each, length - 1))
        each.append(*tokens(each, 1, seed=1))
        each.crop(100)
        each.crop(28)
    assert same(decode(layer, 40, 5), decode(full, 40, 5, sliding_window=WINDOW))


def test_crop_of_what_is_forgotten() -> None:
    layer = new(sliding_window=WINDOW)
    layer.append(*tokens(layer, 2000))
    before = layer.dequantize()
    with pytest.raises(ValueError, match=r"tokens=1500 .* sliding_window=300 has forgotten"):
        layer.crop(1500)
    assert all(same(a, b) for a, b in zip(layer.dequantize(), before, strict=True))
    layer.crop(128)
    with pytest.raises(ValueError, match="forgotten"):  # what a crop uncovers stays forgotten
        layer.crop(700)
    layer.reset()
    layer.append(*tokens(layer, 2000))
    assert all(same(a, b) for a, b in zip(layer.dequantize(), before, strict=True))


@pytest.mark.parametrize("max_length", [None, 4000])
def test_shared_pages_come_round(max_length: int | None) -> None:
    """Rows and forks that share pages go their own ways when these are written again."""
    layer, full = twins(KIVI, max_length)
    for each in (layer, full):
        each.append(*tokens(each, 1700))
        each.select([1, 0, 1])
    pairs = [(layer, full), (layer.fork(), full.fork())]
    if max_length is None:
        shared = pages(layer)
        assert shared <= 4 + 4  # full pages of two rows, and pages that are still written
    for seed, t in enumerate((1, 96, 1, 600, 1, 900)):
        for i, (mine, theirs) in enumerate(pairs):
            expected = decode(theirs, t, seed + 10 * i, sliding_window=WINDOW)
            assert same(decode(mine, t, seed + 10 * i), expected)
    assert references_are_right(layer, pairs[1][0])
    assert pages(layer) <= 16  # six rows of two pages, and a quarter more


def test_queries_with_other_windows() -> None:
    layer, full = twins(KIVI, None)
    for each in (layer, full):
        each.append(*tokens(each, 900))
    mine = decode(layer, 1, 3, sliding_window=40)
    assert same(mine, decode(full, 1, 3, sliding_window=40))
    before = layer.lengths()
    with pytest.raises(ValueError, match=r"sliding_window=301 .* keeps 300"):
        decode(layer, 1, 3, sliding_window=301)
    assert layer.lengths() == before
    with pytest.raises(ValueError, match="sliding_window=0"):
        new(sliding_window=0)


@pytest.mark.compile
def test_compiled_steps_go_round() -> None:
    """One graph writes into a page again and again, without the host."""
    spec = KVSpec(QuantSpec(4, "channel", 32), QuantSpec(4, "token", 16), 0, 0)
    layer, eager = (new(spec, max_length=4000, sliding_window=40) for _ in range(2))
    for each in (layer, eager):
        each.append(*tokens(each, 1520))
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(LayerCache.decode, backend=counter, fullgraph=True)
    where = addresses(layer)
    for seed in range(70):
        q = randn(2, 2, 1, 16, seed=9 + seed)
        k, v = tokens(layer, 1, seed)
        torch.testing.assert_close(compiled(layer, q, k, v), eager.decode(q, k, v))
    assert counter.frame_count == 1
    assert addresses(layer) == where
    assert layer.packed_lengths() == [1568, 1568]  # a third page became a fourth, the first again
    for a, b in zip(layer.dequantize(), eager.dequantize(), strict=True):
        assert same(a, b)
    assert pages(layer) == 4


@pytest.mark.parametrize("max_length", [None, 4000])
def test_a_window_that_hides_nothing_is_not_asked_for(max_length: int | None) -> None:
    """Kernels without a window are faster, and some have none."""
    asked = []
    layer = new(max_length=max_length, sliding_window=WINDOW)
    op = layer._ops.decode_attention

    def decode_attention(q, view, spec, position, scale, sliding_window, *rest):
        asked.append(sliding_window)
        return op(q, view, spec, position, scale, sliding_window, *rest)

    layer._ops = layer._ops._replace(decode_attention=decode_attention)
    layer.append(*tokens(layer, WINDOW - 2))
    for seed in range(3):
        decode(layer, 1, seed)
    assert asked == [None, None, WINDOW]
