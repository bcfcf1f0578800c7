"""The reference operators against float64, on views built by hand with NaN wherever nothing is."""

import math
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from one_thread import one_thread  # noqa: F401
from oracle_kivi import allowed_keys, array, attention

from kivi import KVSpec, QuantSpec
from kivi.attention import get_ops
from kivi.kernels import reference
from kivi.kernels.reference import (
    NOTHING,
    decode_attention,
    exact_positions,
    extend_attention,
    gather_pages,
    merge,
    partial_attention,
)
from kivi.quantize import Pages, dequantize, empty_pages, quantize
from kivi.view import CacheView

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
SLACK = 32


def randn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def close(out: torch.Tensor, expected: np.ndarray) -> None:
    """Float32 arithmetic, and one rounding of the output to its dtype."""
    assert out.isfinite().all()
    eps = torch.finfo(out.dtype).eps if out.dtype != torch.float32 else 2**-16
    error = np.abs(array(out) - expected)
    assert (error <= eps * np.abs(expected) + 2**-16).all(), error.max()


# ---------------------------------------------------------------- a view, from its description


class Built(NamedTuple):
    view: CacheView
    key: list[torch.Tensor]
    """Dense keys `[Hkv, n, D]` of each row, as the cache holds them; `value` likewise."""
    value: list[torch.Tensor]


def build(
    spec: KVSpec,
    lengths: list[int],
    packed: list[int],
    hkv: int = 1,
    d: int = 32,
    dv: int = 32,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Built:
    """Rows of the given lengths and packed lengths, in pages in random order.

    Token p is sink slot p if p < S; packed token p - S if p < S + packed; else it lies in ring slot
    (p - S) mod W. Every other place, the bin page and the last slot included, is NaN.
    """
    sinks, ring = spec.sink_length, spec.residual_length + spec.unit + SLACK
    b, columns = len(lengths), max(1, *(-(-n // 512) for n in packed))
    generator = torch.Generator().manual_seed(seed)
    order = (1 + torch.randperm(b * columns, generator=generator)).view(b, columns)
    table = torch.where(torch.arange(columns) * 512 < torch.tensor(packed)[:, None], order, 0)
    pools, exacts, dense = [], [], []
    for one, size, salt in ((spec.key, d, 1), (spec.value, dv, 2)):
        pages = empty_pages(one, b * columns + 1, hkv, size, dtype)
        if one is None:
            pages.words.fill_(math.nan)
        else:
            pages.words.random_(-(2**15), 2**15 - 1, generator=generator)
            for meta in (pages.scale, pages.zero):
                if meta is not None:
                    meta.fill_(math.nan)
        exact = torch.full((b, hkv, sinks + ring + 1, size), math.nan, dtype=dtype)
        rows = []
        for row, (length, count) in enumerate(zip(lengths, packed, strict=True)):
            x = randn(hkv, length, size, dtype=dtype, seed=seed + 10 * row + salt)
            if count:
                mine = quantize(x[None, :, sinks : sinks + count], one)
                x = x.clone()
                x[:, sinks : sinks + count] = dequantize(mine)[0]
                for page, source in zip(table[row].tolist(), range(-(-count // 512)), strict=False):
                    for target, new in zip(pages, mine.pages, strict=True):
                        if target is not None:
                            target[page] = new[source]
            for p in [*range(min(length, sinks)), *range(sinks + count, length)]:
                exact[row, :, p if p < sinks else sinks + (p - sinks) % ring] = x[:, p]
            rows.append(x)
        pools.append(pages)
        exacts.append(exact)
        dense.append(rows)
    view = CacheView(*pools, table, torch.tensor(packed), *exacts, torch.tensor(lengths))
    return Built(view, *dense)


KIVI = KVSpec(QuantSpec(2, "channel", 32), QuantSpec(2, "token", 32), 32, 4)
SPECS = [
    KIVI,
    KVSpec(None, None, 16, 3),
    KVSpec(QuantSpec(3, "token", 16), QuantSpec(1, "channel", 64), 0, 0),
    KVSpec(QuantSpec(8, "channel", None, "symmetric"), QuantSpec(4, "token", None), 8, 1),
    KVSpec(None, QuantSpec(2, "channel", 128, "least_squares"), 40, 2),
]


def rows_of(spec: KVSpec) -> tuple[list[int], list[int]]:
    """Lengths and packed lengths of rows in different states, all of them possible."""
    unit, keep = spec.unit, spec.sink_length + spec.residual_length
    packed = [0, unit, 512 + (512 if unit == 512 else 2 * unit), 0]
    return [p + keep + extra for p, extra in zip(packed, [3, unit - 1, 7, 1], strict=True)], packed


# ---------------------------------------------------------------- exact slots


@given(
    st.integers(0, 5),
    st.sampled_from([0, 7, 32]),
    st.lists(st.tuples(st.integers(0, 300), st.integers(0, 9)), min_size=1, max_size=4),
)
def test_exact_positions_are_the_inverse_of_the_slots(sinks, residual, rows):
    ring = residual + 32 + SLACK
    lengths = [n for n, _ in rows]
    # Packed as far as the window allows, or less, but never so little that the ring overflows.
    packed = [max(0, n - sinks - residual - less) // 32 * 32 for n, less in rows]
    exact = torch.zeros(len(rows), 1, sinks + ring + 1, 1)
    view = CacheView(None, None, None, torch.tensor(packed), exact, exact, torch.tensor(lengths))
    position, visible = exact_positions(view, sinks)
    for row, (length, count) in enumerate(zip(lengths, packed, strict=True)):
        held = {p: p if p < sinks else sinks + (p - sinks) % ring for p in range(length)}
        held = {p: s for p, s in held.items() if p < sinks or p >= sinks + count}
        found = {int(position[row, s]): int(s) for s in visible[row].nonzero().flatten()}
        assert found == held


def test_gather_pages_follows_the_table():
    pages = quantize(randn(1, 2, 3 * 512, 16), QuantSpec(4, "channel", 32)).pages
    whole = gather_pages(
        pages, QuantSpec(4, "channel", 32), torch.tensor([[0, 1, 2]]), torch.float32
    )
    table = torch.tensor([[2, 0], [1, 1]])
    dense = gather_pages(pages, QuantSpec(4, "channel", 32), table, torch.float32)
    assert dense.shape == (2, 2, 1024, 16)
    for row in range(2):
        for column in range(2):
            source = table[row, column] * 512
            part = dense[row, :, column * 512 : column * 512 + 512]
            assert torch.equal(part, whole[0, :, source : source + 512])


# ---------------------------------------------------------------- decode and extend


@pytest.mark.parametrize("ratio", [1, 2, 7])
@pytest.mark.parametrize("spec", SPECS, ids=range(len(SPECS)))
@pytest.mark.parametrize("t", [1, 5])
def test_decode_attention(spec, ratio, t):
    lengths, packed = rows_of(spec)
    built = build(spec, lengths, packed, hkv=2, d=32, dv=64)
    q = randn(len(lengths), 2 * ratio, t, 32, seed=5)
    position = torch.tensor(lengths)[:, None] - t + torch.arange(t)
    out, lse = decode_attention(q, built.view, spec, position.clamp_min(0), 0.3)
    assert out.dtype == q.dtype and lse.dtype == torch.float32 and lse.shape == out.shape[:3]
    for row, n in enumerate(lengths):
        allowed = np.arange(n)[None] <= position[row].clamp_min(0).numpy()[:, None]
        args = [array(x) for x in (q[row], built.key[row], built.value[row])]
        close(out[row], attention(*args, allowed, 0.3))


OPTIONS = [
    dict(sliding_window=1),
    dict(sliding_window=20),
    dict(sliding_window=400),
    dict(softcap=2.0),
    dict(s_aux=torch.tensor([0.5, -2.0, 8.0, 0.0])),
    dict(sliding_window=50, softcap=3.0, s_aux=torch.tensor([1.0, -1.0, 0.0, 2.0])),
]


def oracle_options(options: dict) -> dict:
    s_aux = options.get("s_aux")
    return dict(softcap=options.get("softcap"), s_aux=None if s_aux is None else array(s_aux))


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "+".join(o))
@pytest.mark.parametrize("spec", SPECS[:3], ids=range(3))
def test_decode_attention_options(spec, options):
    lengths, packed = rows_of(spec)
    built = build(spec, lengths, packed, hkv=2)
    q = randn(len(lengths), 4, 3, 32, seed=5) * 2
    position = torch.tensor(lengths)[:, None] - 3 + torch.arange(3)
    position = position.clamp_min(0)
    out, _ = decode_attention(q, built.view, spec, position, 0.3, **options)
    for row, n in enumerate(lengths):
        distance = position[row].numpy()[:, None] - np.arange(n)[None]
        allowed = (distance >= 0) & (distance < options.get("sliding_window", 10**9))
        args = [array(x) for x in (q[row], built.key[row], built.value[row])]
        close(out[row], attention(*args, allowed, 0.3, **oracle_options(options)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_decode_attention_in_any_dtype(dtype):
    lengths, packed = rows_of(KIVI)
    built = build(KIVI, lengths, packed, hkv=2, dtype=dtype)
    q = randn(len(lengths), 4, 1, 32, dtype=dtype, seed=5)
    out, _ = decode_attention(q, built.view, KIVI, torch.tensor(lengths)[:, None] - 1, 0.2)
    assert out.dtype == dtype
    for row, n in enumerate(lengths):
        args = [array(x) for x in (q[row], built.key[row], built.value[row])]
        close(out[row], attention(*args, np.ones((1, n), bool), 0.2))


@pytest.mark.parametrize("small", [False, True])
@pytest.mark.parametrize("options", [{}, *OPTIONS], ids=lambda o: "+".join(o))
@pytest.mark.parametrize("kind", ["plain", "valid", "mask", "mask and valid", "one mask"])
@pytest.mark.parametrize("past", [True, False])
def test_extend_attention(options, kind, past, small, monkeypatch):
    if small:  # more blocks of pages and of query rows than one
        monkeypatch.setattr(reference, "BLOCK_PAGES", 1)
        monkeypatch.setattr(reference, "BLOCK_SCORES", 900)
    t, spec = 37, KIVI
    lengths, packed = rows_of(spec)
    built = build(spec, lengths, packed, hkv=2, dv=16)
    b = len(lengths)
    before = lengths if past else [0] * b
    q, k, v = randn(b, 4, t, 32, seed=1), randn(b, 2, t, 32, seed=2), randn(b, 2, t, 16, seed=3)
    valid = torch.rand(b, t, generator=torch.Generator().manual_seed(4)) < 0.7
    valid[1], valid[3] = torch.arange(t) >= 5, torch.arange(t) < 20
    mask = torch.rand(1 if kind == "one mask" else b, 1, t, t) < 0.5
    mask = mask | torch.eye(t, dtype=torch.bool)
    valid = valid if "valid" in kind else None
    mask = mask if "mask" in kind else None
    seen = torch.ones(b, t, dtype=torch.bool) if valid is None else valid
    position = (torch.tensor(before)[:, None] + seen.cumsum(1) - seen.long()).clamp_min(0)
    view = built.view if past else None
    out, _ = extend_attention(q, k, v, view, spec, position, 0.3, valid, mask, **options)
    for row in range(b):
        old = [x[row] if past else x[row][:, :0] for x in (built.key, built.value)]
        both = [torch.cat(x, 1) for x in zip(old, (k[row], v[row]), strict=True)]
        own = None if mask is None else mask[row % len(mask), 0].numpy()
        allowed = allowed_keys(before[row], seen[row].numpy(), options.get("sliding_window"), own)
        args = [array(x) for x in (q[row], *both)]
        expected = attention(*args, allowed, 0.3, **oracle_options(options))
        close(out[row][:, seen[row]], expected[:, seen[row].numpy()])


@pytest.mark.parametrize("past", [True, False])
@pytest.mark.parametrize("t", [3, 40])
def test_extend_attention_never_reads_padding(past, t):
    """NaN in the padding of k and v is not a number that a weight of 0 takes away."""
    lengths, packed = rows_of(KIVI)
    built = build(KIVI, lengths, packed)
    b = len(lengths)
    q, k, v = (randn(b, 1, t, 32, seed=i) for i in range(3))
    valid = (torch.arange(t) % 3 != 0).expand(b, t).clone()
    valid[1] = torch.arange(t) < t - 2
    dirty = [torch.where(valid[:, None, :, None], x, math.nan) for x in (k, v)]
    position = (
        torch.tensor(lengths if past else [0] * b)[:, None] + valid.cumsum(1) - 1
    ).clamp_min(0)
    view = built.view if past else None
    clean, _ = extend_attention(q, k, v, view, KIVI, position, 0.3, valid)
    out, _ = extend_attention(q, *dirty, view, KIVI, position, 0.3, valid)
    keep = valid[:, None].expand_as(out[..., 0])
    assert torch.equal(out[keep], clean[keep])


def test_a_long_past_in_blocks_is_the_past_at_once(monkeypatch):
    """More pages than a block: blocks merge to the same attention."""
    spec = KVSpec(QuantSpec(1, "channel", 128), QuantSpec(1, "token", 16), 0, 2)
    built = build(spec, [5 * 512 + 9, 130], [5 * 512, 128], d=16, dv=16)
    q, position = randn(2, 2, 1, 16), torch.tensor([[5 * 512 + 8], [129]])
    one, lse = decode_attention(q, built.view, spec, position, 0.3, sliding_window=1200)
    for block in (1, 2, 4):
        monkeypatch.setattr(reference, "BLOCK_PAGES", block)
        many, other = decode_attention(q, built.view, spec, position, 0.3, sliding_window=1200)
        assert torch.allclose(many, one, atol=1e-6) and torch.allclose(lse, other, atol=1e-5)


# ---------------------------------------------------------------- partial attention and merge


def test_a_query_that_sees_nothing():
    q, k, v = (randn(1, 1, 2, 16, seed=i) for i in range(3))
    allow = torch.tensor([[True, False], [False, False]]).view(1, 1, 2, 2)
    out, lse = partial_attention(q, k, v, allow, 1.0)
    assert torch.equal(out[0, 0, 0], v[0, 0, 0]) and (out[0, 0, 1] == 0).all()
    assert lse[0, 0, 1] == NOTHING and lse[0, 0, 0] > -100
    merged, total = merge([(out, lse), (out * 0, lse * 0 + NOTHING)])
    assert torch.equal(merged, out) and merged.isfinite().all() and total.isfinite().all()


def test_log_sum_exp():
    q, k, v = (randn(2, h, n, 16, seed=n) for h, n in ((4, 3), (2, 50), (2, 50)))
    _, lse = partial_attention(q, k, v, torch.ones(1, 1, 1, 1, dtype=torch.bool), 0.7)
    shared = k.double().repeat_interleave(2, 1)
    expected = (q.double() @ shared.transpose(-1, -2) * 0.7).logsumexp(-1)
    assert torch.allclose(lse.double(), expected, atol=1e-5)


@given(
    keys=st.integers(1, 60),
    parts=st.integers(1, 6),
    seed=st.integers(0, 2**32),
    softcap=st.sampled_from([None, 1.5]),
    sinks=st.booleans(),
    factor=st.sampled_from([1.0, 30.0]),
)
def test_merge_does_not_depend_on_the_partition(keys, parts, seed, softcap, sinks, factor):
    """However keys are divided, empty parts included, and in whatever order parts come."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(2, 4, 3, 16, generator=generator) * factor
    k, v = (torch.randn(2, 2, keys, 16, generator=generator) for _ in range(2))
    allow = torch.rand(2, 1, 3, keys, generator=generator) < 0.8
    allow[..., 0] = True
    s_aux = torch.randn(4, generator=generator) * 3 if sinks else None
    whole = merge([partial_attention(q, k, v, allow, 0.5, softcap)], s_aux)
    owner = torch.randint(parts, (keys,), generator=generator)
    pieces = [partial_attention(q, k, v, allow & (owner == i), 0.5, softcap) for i in range(parts)]
    divided = merge(pieces, s_aux)
    assert torch.allclose(divided[0], whole[0], atol=1e-5)
    assert torch.allclose(divided[1], whole[1], atol=1e-4)
    # Merging is associative as long as s_aux enters once.
    nested = merge([merge(pieces[:1]), *pieces[1:]], s_aux)
    assert torch.allclose(nested[0], whole[0], atol=1e-5)
    for row in range(2):
        args = [array(x[row]) for x in (q, k, v)]
        expected = attention(
            *args, allow[row, 0].numpy(), 0.5, softcap, None if s_aux is None else array(s_aux)
        )
        assert np.abs(array(divided[0][row]) - expected).max() < 1e-4


def test_s_aux_takes_its_share():
    q, k, v = torch.zeros(1, 2, 1, 16), torch.zeros(1, 1, 3, 16), torch.ones(1, 1, 3, 16)
    part = partial_attention(q, k, v, torch.ones(1, 1, 1, 3, dtype=torch.bool), 1.0)
    out, _ = merge([part], torch.tensor([0.0, math.log(3.0)]))
    assert torch.allclose(out[0, :, 0, 0], torch.tensor([0.75, 0.5]))


# ---------------------------------------------------------------- the choice of an implementation


def test_auto_and_eager_are_the_reference():
    for impl in ("auto", "eager"):
        ops = get_ops(impl, KIVI)
        assert ops.quantize_pack is reference.quantize_pack
        assert ops.extend_attention is reference.extend_attention


def test_unknown_implementations_are_refused():
    with pytest.raises(ValueError, match="impl='cuda' is not allowed; choose from 'auto', 'eager'"):
        get_ops("cuda", KIVI)


def test_an_explicit_request_is_served_or_refused():
    try:
        ops = get_ops("triton", KIVI)
    except ValueError as error:
        assert "impl='triton'" in str(error) and "'eager'" in str(error)
    else:
        assert ops.decode_attention is not reference.decode_attention


def test_pages_count_their_bytes():
    pages = Pages(torch.zeros(2, 3, dtype=torch.int16), torch.zeros(5, dtype=torch.float16), None)
    assert pages.nbytes == 12 + 10
