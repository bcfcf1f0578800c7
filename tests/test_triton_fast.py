"""The Gluon kernel on a GPU: against float64 with exact codes, whatever the number of programs."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from kivi import KVSpec, LayerCache, QuantSpec
from kivi.grids import symmetric_offset
from kivi.kernels import reference
from kivi.packing import unpack
from kivi.quantize import Pages
from kivi.view import CacheView

pytestmark = pytest.mark.gpu
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float16, torch.bfloat16)


def exact_tokens(pages: Pages, spec: QuantSpec, table: Tensor) -> Tensor:
    """Packed tokens `[B, Hkv, n, D]` in float64, not rounded to the cache's dtype."""
    codes, scale = unpack(pages.words, spec.bits).double(), pages.scale.double()
    zero = -symmetric_offset(spec.bits) * scale if pages.zero is None else pages.zero.double()
    dim, group = (-2 if spec.axis == "channel" else -1), spec.group(codes.shape[-1])
    x = codes * scale.repeat_interleave(group, dim) + zero.repeat_interleave(group, dim)
    return x[table].transpose(1, 2).flatten(2, 3)


def expected(
    q: Tensor,
    layer: LayerCache,
    position: Tensor,
    scale: float,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention in float64 and its log-sum-exp."""
    view, spec = layer._view(), layer.spec
    both = []
    for dense, pages, one in zip(layer.dequantize(), view[:2], (spec.key, spec.value), strict=True):
        dense, packed = dense.double(), exact_tokens(pages, one, view.table)
        for row, n in enumerate(layer.packed_lengths()):
            dense[row, :, spec.sink_length : spec.sink_length + n] = packed[row, :, :n]
        both.append(dense.repeat_interleave(q.shape[1] // dense.shape[1], 1))
    k, v = both
    scores = q.double() @ k.transpose(-1, -2) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    token = torch.arange(k.shape[2], device=q.device)
    seen = token <= position[:, :, None]
    seen &= token < torch.tensor(layer.lengths(), device=q.device)[:, None, None]
    scores = scores.masked_fill(~seen[:, None], -math.inf)
    if s_aux is not None:
        aux = s_aux.double().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, aux], -1)
    p = scores.softmax(-1)
    return p[..., : k.shape[2]] @ v, scores.logsumexp(-1)


def filled(
    spec: KVSpec,
    lengths: list[int],
    heads: int,
    d: int,
    dtype: torch.dtype,
    size: float = 1.0,
) -> LayerCache:
    """Ragged rows; channels of different size and offset; NaN wherever no token lies.

    `size`: of values.
    """
    layer = LayerCache(spec, len(lengths), heads, d, dtype=dtype, device=DEVICE, impl="eager")
    t = max(lengths)
    valid = torch.arange(t, device=DEVICE) >= t - torch.tensor(lengths, device=DEVICE)[:, None]
    channel = 1 + 3 * torch.rand(d, device=DEVICE), 2 * torch.randn(d, device=DEVICE)
    k = torch.randn(len(lengths), heads, t, d, device=DEVICE) * channel[0] + channel[1]
    v = size * torch.randn(len(lengths), heads, t, d, device=DEVICE)
    layer.append(k.to(dtype), v.to(dtype), valid)
    view = layer._view()
    for exact in view[4:6]:
        exact[:, :, -1] = math.nan
        for row, n in enumerate(lengths):
            if n < exact.shape[2] - 1:
                exact[row, :, n:] = math.nan
    for pages, one in zip(view[:2], (spec.key, spec.value), strict=True):
        for row, n in enumerate(layer.packed_lengths()):
            if n % 512:
                page = int(view.table[row, n // 512])
                first = n % 512 // (one.group(d) if one.axis == "channel" else 1)
                for meta in pages[1:]:
                    if meta is not None:
                        meta[page, :, first:] = math.nan
    return layer


def run(
    q: Tensor,
    view: CacheView,
    spec: KVSpec,
    position: Tensor,
    scale: float,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    from kivi.kernels import triton_fast

    formats = [(s.bits, s.axis == "channel", s.group(q.shape[3])) for s in (spec.key, spec.value)]
    out = triton_fast.decode(
        q,
        tuple(view.key[:3]),
        tuple(view.value[:3]),
        (*view[2:7], position),
        s_aux,
        triton_fast.kind(tuple(formats), spec.sink_length, None),
        scale,
        None,
        softcap,
    )
    assert out is not None
    return out


def check(
    layer: LayerCache,
    ratio: int,
    t: int,
    softcap: float | None = None,
    aux: bool = False,
    q: Tensor | None = None,
) -> None:
    """Against float64; twice, and the same. `q`: of the layer's dtype, else random."""
    spec, view, d = layer.spec, layer._view(), layer.head_dim
    lengths = torch.tensor(layer.lengths(), device=DEVICE)
    hq = ratio * layer.num_kv_heads
    if q is None:
        q = torch.randn(len(lengths), hq, t, d, device=DEVICE).to(layer.dtype)
    position = (lengths[:, None] - t + torch.arange(t, device=DEVICE)).contiguous()
    s_aux = torch.randn(hq, device=DEVICE).to(layer.dtype) if aux else None
    options = (d**-0.5, softcap, s_aux)
    out, lse = run(q, view, spec, position, *options)
    again = run(q, view, spec, position, *options)
    assert torch.equal(out, again[0]) and torch.equal(lse, again[1])
    want, want_lse = expected(q, layer, position, *options)
    torch_out, torch_lse = reference.decode_attention(
        q, view, spec, position, options[0], None, *options[1:]
    )

    def error(x: Tensor, y: Tensor) -> float:
        return float((x.double() - y).norm() / y.norm())

    # float16 rounds at 2^-11: below that a reference whose keys happen to be exact says nothing.
    floor = torch.finfo(layer.dtype).eps
    assert error(out, want) <= 2 * max(error(torch_out, want), floor)
    assert error(lse, want_lse) <= 2 * max(error(torch_lse, want_lse), floor)


CASES = [
    # bits, groups, head dim, query heads a kv head, new tokens, sinks, lengths, grid, softcap, aux
    ((2, 2), (32, 32), 128, 4, 1, 0, [5000, 1300], "asymmetric", None, False),
    ((2, 2), (128, 128), 128, 4, 1, 0, [5000, 700, 130], "asymmetric", None, False),
    ((4, 4), (32, 32), 128, 4, 1, 4, [3000, 20, 1], "asymmetric", None, True),
    ((4, 2), (32, 32), 128, 1, 4, 3, [3000, 1500], "asymmetric", 20.0, False),
    ((2, 4), (64, 64), 128, 8, 3, 0, [2100, 900], "least_squares", None, True),
    ((8, 8), (32, 32), 128, 4, 1, 0, [2100, 900], "symmetric", None, False),
    ((8, 2), (32, 32), 64, 4, 1, 0, [2100, 900], "asymmetric", None, False),
    ((4, 4), (32, 32), 64, 4, 2, 0, [2100, 900], "symmetric", 30.0, True),
    ((2, 2), (32, 16), 128, 32, 1, 0, [2100], "asymmetric", None, False),
    ((2, 2), (None, None), 64, 4, 1, 0, [2100, 64], "asymmetric", None, False),
    ((2, 2), (32, 64), 64, 4, 8, 0, [700] * 40, "asymmetric", None, False),
    ((1, 1), (64, 32), 128, 4, 1, 0, [2100, 700], "asymmetric", None, False),
    ((2, 2), (32, 32), 256, 4, 1, 40, [2100, 30, 1, 41], "asymmetric", None, True),
    ((4, 4), (128, 128), 256, 2, 4, 0, [2100, 700], "asymmetric", 30.0, False),
    # a slot for each plane of a query
    ((2, 2), (32, 32), 128, 1, 1, 0, [5000, 1300], "asymmetric", None, False),
    ((2, 2), (64, 128), 128, 1, 1, 3, [2100, 20, 1], "symmetric", 20.0, True),
    ((2, 2), (None, 16), 64, 1, 1, 0, [700] * 40, "least_squares", None, True),
    ((4, 4), (32, 32), 128, 2, 1, 0, [2100, 700], "asymmetric", None, False),
    ((4, 4), (64, 64), 64, 1, 2, 0, [2100, 60], "asymmetric", 20.0, True),
    # 256 channels on 8-bit tensor cores: a half of them at a time
    ((2, 2), (128, 128), 256, 3, 1, 0, [5000, 700, 130], "asymmetric", 20.0, False),
    ((4, 4), (32, 32), 256, 4, 1, 4, [3000, 20, 1], "symmetric", None, True),
    ((2, 2), (32, 32), 256, 1, 1, 0, [5000, 1300], "asymmetric", None, False),
    ((4, 4), (64, None), 256, 2, 1, 0, [700] * 40, "least_squares", None, True),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_float64(case, dtype):
    bits, groups, d, ratio, t, sinks, lengths, grid, softcap, aux = case
    torch.manual_seed(0)
    key, value = (
        QuantSpec(n, axis, g, grid)
        for n, axis, g in zip(bits, ("channel", "token"), groups, strict=True)
    )
    layer = filled(KVSpec(key, value, 128, sinks), lengths, 2, d, dtype)
    check(layer, ratio, t, softcap, aux)


def specs_up_to(tokens: int):
    """What the kernel serves, of rows of at most so many tokens, as arguments of `check_spec`."""
    return given(
        seed=st.integers(0, 2**31),
        bits=st.tuples(*[st.sampled_from([2, 4, 8])] * 2),
        key_group=st.sampled_from([32, 64, 128, None]),
        value_group=st.sampled_from([16, 32, 64, 128]),
        d=st.sampled_from([64, 128, 256]),
        dtype=st.sampled_from(DTYPES),
        lengths=st.lists(st.integers(1, tokens), min_size=1, max_size=4),
        ratio=st.sampled_from([1, 3, 4, 7, 8]),
        t=st.integers(1, 4),
        sinks=st.sampled_from([0, 4]),
    )


def check_spec(seed, bits, key_group, value_group, d, dtype, lengths, ratio, t, sinks):
    torch.manual_seed(seed)
    # Up to 8 groups of a token: the portable kernel takes more.
    value = QuantSpec(bits[1], "token", max(16, d // 8, min(value_group, d)))
    spec = KVSpec(QuantSpec(bits[0], "channel", key_group), value, 64, sinks)
    t = min(t, *lengths)
    check(filled(spec, lengths, 2, d, dtype), ratio, t)


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@specs_up_to(3000)
def test_random_specs(**spec):
    check_spec(**spec)


@pytest.mark.parametrize("resident", [1, 2, 5])
def test_independent_of_the_number_of_programs(resident, monkeypatch):
    from kivi.kernels import triton_fast

    torch.manual_seed(0)
    spec = KVSpec(QuantSpec(2, "channel", 32), QuantSpec(2, "token", 32))
    layer = filled(spec, [3000, 700, 20], 2, 128, torch.float16)
    q = torch.randn(3, 8, 1, 128, device=DEVICE).half()
    position = torch.tensor([[2999], [699], [19]], device=DEVICE)
    out, lse = run(q, layer._view(), spec, position, 128**-0.5)
    monkeypatch.setattr(triton_fast, "_gpu", lambda device: (resident, 40960, 9))
    other, other_lse = run(q, layer._view(), spec, position, 128**-0.5)
    torch.testing.assert_close(out, other, atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(lse, other_lse, atol=1e-3, rtol=1e-4)
