"""The portable Triton decode_attention against float64: at most twice the reference's error.

Without a GPU the kernels run in Triton's interpreter, which must be asked for before triton is
imported. States come from a real LayerCache; everything that is not part of a row is NaN.
"""

import math
import os
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from one_thread import one_thread  # noqa: F401

GPU = torch.cuda.is_available()
if not GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")
triton = pytest.importorskip("triton")
if not GPU and isinstance(triton.language.max, triton.JITFunction):
    pytest.skip("triton was imported before TRITON_INTERPRET=1", allow_module_level=True)

from triton.runtime.interpreter import InterpreterBuilder  # noqa: E402

from kivi import KVSpec, LayerCache, QuantSpec, store  # noqa: E402
from kivi.grids import symmetric_offset  # noqa: E402
from kivi.kernels import reference, triton_formats, triton_portable  # noqa: E402
from kivi.kernels.reference import CacheView, exact_positions  # noqa: E402
from kivi.kernels.triton_decode import decode_attention  # noqa: E402
from kivi.kernels.triton_formats import supports  # noqa: E402
from kivi.packing import unpack  # noqa: E402
from kivi.quantize import Pages  # noqa: E402

# The interpreter computes with numpy, which warns of NaN and overflow.
pytestmark = [pytest.mark.filterwarnings("ignore::RuntimeWarning"), *[pytest.mark.gpu] * GPU]
DEVICE = "cuda" if GPU else "cpu"
HALF, BRAIN, FULL = DTYPES = (torch.float16, torch.bfloat16, torch.float32)
NOTHING = reference.NOTHING
# What may come on top of twice the reference's error, relative to the values' own size: kernels
# round probabilities to 16 bit, the reference does not.
FLOOR = {HALF: 2.0**-12, BRAIN: 2.0**-9, FULL: 2.0**-21}


def randn(*shape: int, dtype: torch.dtype = FULL, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(DEVICE, dtype)


# ---------------------------------------------------------------- states


class State(NamedTuple):
    """A layer just before T new tokens are stored: what `LayerCache.decode` attends over."""

    spec: KVSpec
    view: CacheView
    position: torch.Tensor


def state(
    spec: KVSpec,
    lengths: list[int],
    t: int = 1,
    hkv: int = 1,
    d: int = 32,
    dv: int = 32,
    dtype: torch.dtype = HALF,
    seed: int = 0,
    factor: float = 1.0,
    outlier: float | None = None,
) -> State:
    """Rows of so many tokens and t new ones; NaN wherever nothing is."""
    b, longest = len(lengths), max(lengths)
    layer = LayerCache(spec, b, hkv, d, dv, dtype=dtype, device=DEVICE, impl="eager")
    k, v = (
        randn(b, hkv, longest + t, n, dtype=dtype, seed=seed + n + salt) * factor
        for n, salt in ((d, 1), (dv, 2))
    )
    if outlier is not None:
        for x in (k, v):
            x[:, :, ::67, 3] = outlier
            x[:, :, 5::101, 7] = -outlier
    if longest:
        valid = torch.arange(longest, device=DEVICE) < torch.tensor(lengths, device=DEVICE)[:, None]
        layer.append(k[:, :, :longest], v[:, :, :longest], valid)
    step, _ = layer._step(t, None, False)
    store.write_exact(layer._view(), spec, k[:, :, longest:], v[:, :, longest:], step.position)
    view = layer._view()._replace(length=step.length)
    poison(view, spec)
    return State(spec, view, step.position)


def poison(view: CacheView, spec: KVSpec) -> None:
    """NaN, and words that mean nothing, into all that is not part of a row."""
    _, visible = exact_positions(view, spec.sink_length)
    hidden = torch.cat([~visible, torch.ones_like(visible[:, :1])], 1)
    for exact in (view.exact_key, view.exact_value):
        exact.masked_fill_(hidden[:, None, :, None], math.nan)
    token = torch.arange(512, device=DEVICE)
    written = torch.zeros(view.key.words.shape[0], 512, dtype=torch.bool, device=DEVICE)
    for row, count in enumerate(view.packed.tolist()):
        for column, page in enumerate(view.table[row].tolist()):
            if column * 512 < count:
                written[page] = token + column * 512 < count
    for pages, one in ((view.key, spec.key), (view.value, spec.value)):
        if one is None:
            pages.words.masked_fill_(~written[:, None, :, None], math.nan)
            continue
        pages.words[~written.any(1)] = 0x5A5A
        kept = written if one.axis == "token" else written[:, :: one.group(0)]
        for meta in (pages.scale, pages.zero):
            if meta is not None:
                meta.masked_fill_(~kept[:, None, :, None], math.nan)


# ---------------------------------------------------------------- float64


def dense(pages: Pages, spec: QuantSpec | None, table: torch.Tensor) -> torch.Tensor:
    """The tokens of a table's pages, `[B, Hkv, n * 512, D]` float64."""
    index = table.flatten()
    if spec is None:
        x = pages.words[index].double()
    else:
        codes = unpack(pages.words[index], spec.bits).double()
        assert pages.scale is not None
        scale = pages.scale[index].double()
        zero = -symmetric_offset(spec.bits) * scale
        if pages.zero is not None:
            zero = pages.zero[index].double()
        group, dim = spec.group(codes.shape[-1]), -2 if spec.axis == "channel" else -1
        x = codes * scale.repeat_interleave(group, dim) + zero.repeat_interleave(group, dim)
    return x.view(*table.shape, *x.shape[1:]).transpose(1, 2).flatten(2, 3)


def exactly(
    at: State,
    q: torch.Tensor,
    scale: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
) -> tuple[torch.Tensor, ...]:
    """Attention in float64: out, log-sum-exp; the largest sum of |terms| of a score, rms of v."""
    view, spec, sinks = at.view, at.spec, at.spec.sink_length
    position, visible = exact_positions(view, sinks)
    index = torch.arange(view.table.shape[1] * 512, device=DEVICE)
    position = torch.cat([(sinks + index).expand(len(position), -1), position], 1)
    visible = torch.cat([index < view.packed[:, None], visible], 1)
    both = []
    for pages, one, exact in (
        (view.key, spec.key, view.exact_key),
        (view.value, spec.value, view.exact_value),
    ):
        x = torch.cat([dense(pages, one, view.table), exact[:, :, :-1].double()], 2)
        x = torch.where(visible[:, None, :, None], x, 0.0)
        both.append(x.repeat_interleave(q.shape[1] // x.shape[1], 1))
    k, v = both
    scores = q.double() @ k.transpose(-1, -2) * scale
    size = (q.double().abs() @ k.abs().transpose(-1, -2) * scale).amax()
    rms = v.square().sum().sqrt() / (visible.sum() * v[0, :, 0].numel()).clamp_min(1).sqrt()
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    distance = at.position.clamp_min(0)[:, :, None] - position[:, None]
    near = (distance >= 0) & visible[:, None]
    if sliding_window is not None:
        near &= distance < sliding_window
    scores = scores.masked_fill(~near[:, None], -math.inf)
    if s_aux is not None:
        aux = s_aux.double()[None, :, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, aux], -1)
        v = torch.cat([v, torch.zeros_like(v[:, :, :1])], 2)
    top = scores.amax(-1, keepdim=True).clamp_min(-1e300)
    weights = torch.exp(scores - top)
    total = weights.sum(-1, keepdim=True)
    out = torch.where(total > 0, weights @ v / total.clamp_min(1e-300), 0.0)
    lse = torch.where(total > 0, top + total.log(), NOTHING)[..., 0]
    return out, lse, size, rms


def check(
    at: State, q: torch.Tensor, scale: float = 0.2, slack: float = 1.0, **options: object
) -> tuple[torch.Tensor, torch.Tensor]:
    """The kernel's result, after it was compared."""
    arguments = (q, at.view, at.spec, at.position.clamp_min(0), scale)
    out, lse = decode_attention(*arguments, **options)
    other, other_lse = reference.decode_attention(*arguments, **options)
    want, want_lse, size, v_rms = exactly(at, q, scale, **options)
    assert out.dtype == q.dtype and lse.dtype == torch.float32
    assert out.shape == want.shape and lse.shape == want_lse.shape
    assert out.isfinite().all() and lse.isfinite().all()
    top = torch.finfo(q.dtype).max
    want, floor = want.clamp(-top, top), slack * FLOOR[q.dtype] * float(v_rms)
    rms = [float((x.double() - want).square().mean().sqrt()) for x in (out, other)]
    peak = [float((x.double() - want).abs().max()) for x in (out, other)]
    assert rms[0] <= 2 * rms[1] + floor
    assert peak[0] <= 3 * peak[1] + 4 * floor
    nothing = want_lse == NOTHING
    assert torch.equal(lse == NOTHING, nothing) and (out[nothing] == 0).all()
    error = [(x.double() - want_lse)[~nothing].abs() for x in (lse, other_lse)]
    if error[0].numel():
        eps = max(torch.finfo(q.dtype).eps, 2**-20)
        assert error[0].max() <= 2 * error[1].max() + eps * float(size)
    return out, lse


@pytest.fixture(autouse=True)
def _outputs_begin_as_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    empty = torch.empty

    def filled(*args: object, **options: object) -> torch.Tensor:
        x = empty(*args, **options)
        # One that requires a gradient is not an output of ours.
        return x.fill_(math.nan) if x.is_floating_point() and not x.requires_grad else x

    monkeypatch.setattr(torch, "empty", filled)


# ---------------------------------------------------------------- formats


Q = QuantSpec
KIVI = KVSpec(Q(2, "channel", 32), Q(2, "token", 32), 32, 3)
FORMATS = [
    (KIVI, 32, 64, HALF),
    (KIVI, 64, 32, BRAIN),
    (KIVI, 32, 32, FULL),
    (KVSpec(None, None, 16, 2), 24, 40, HALF),
    (KVSpec(None, None, 0, 0), 16, 16, BRAIN),
    (KVSpec(Q(3, "token", 16), Q(1, "channel", 64), 0, 0), 32, 16, HALF),
    (KVSpec(Q(8, "channel", None, "symmetric"), Q(4, "token", None), 8, 1), 16, 48, HALF),
    (KVSpec(None, Q(2, "channel", 128, "least_squares"), 40, 2), 16, 32, BRAIN),
    (KVSpec(Q(1, "channel", 16), Q(8, "token", 16, "symmetric"), 40, 0), 16, 32, BRAIN),
    (KVSpec(Q(4, "token", None, "symmetric"), Q(3, "token", 20), 33, 2), 40, 80, HALF),
    (KVSpec(Q(3, "channel", 128), Q(3, "channel", 16, "symmetric"), 0, 2), 48, 16, HALF),
    (KVSpec(Q(4, "channel", 64), Q(2, "token", 64, "least_squares"), 64, 0), 96, 64, HALF),
    (KVSpec(Q(2, "token", 24), None, 5, 5), 96, 16, BRAIN),
    (KVSpec(Q(8, "token", 16), Q(1, "token", 16), 0, 1), 32, 32, HALF),
    (KVSpec(Q(1, "token", 32, "symmetric"), Q(4, "channel", 32), 16, 0), 32, 32, FULL),
    (KVSpec(Q(2, "channel", 128), Q(2, "token", 128), 16, 0), 256, 256, HALF),
]


def rows_of(spec: KVSpec) -> list[int]:
    """A row without packed tokens, and one with some in a second page."""
    kept, unit = spec.sink_length + spec.residual_length, spec.unit
    return [max(1, kept - 1), 512 // unit * unit + unit + kept + 5]


@pytest.mark.parametrize(("spec", "d", "dv", "dtype"), FORMATS, ids=range(len(FORMATS)))
def test_formats(spec: KVSpec, d: int, dv: int, dtype: torch.dtype) -> None:
    assert supports(spec.key, spec.value, d, dv, dtype) is None
    at = state(spec, rows_of(spec), 2, d=d, dv=dv, dtype=dtype)
    assert at.view.packed.max() > (0 if spec.unit == 512 else 512) >= at.view.packed.min() == 0
    check(at, randn(2, 2, 2, d, dtype=dtype, seed=9), 2 * d**-0.5)


@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_codes_can_be_converted_instead(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    at = state(KVSpec(Q(2, "channel", 64), Q(3, "token", 16), 8, 0), [150, 90], dtype=dtype)
    q = randn(2, 2, 1, 32, dtype=dtype, seed=9)
    denormal, _ = check(at, q)
    monkeypatch.setattr(triton_portable, "DENORMAL", False)
    monkeypatch.setattr(triton_portable, "FAST", False)
    converted, _ = check(at, q)
    assert torch.allclose(converted, denormal, atol=0.05)


axes = st.sampled_from([("channel", 16), ("channel", 32), ("channel", 64), ("channel", 128)]) | (
    st.sampled_from([("token", 16), ("token", 32), ("token", None)])
)
specs = st.none() | st.builds(
    lambda bits, axis, grid: Q(bits, *axis, grid),
    st.sampled_from([1, 2, 3, 4, 8]),
    axes,
    st.sampled_from(["asymmetric", "symmetric", "least_squares"]),
)


@settings(max_examples=6, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(
    specs,
    specs,
    st.tuples(st.integers(0, 40), st.integers(0, 5)),
    st.tuples(st.sampled_from([16, 24, 32]), st.sampled_from([16, 32])),
    st.tuples(st.integers(0, 300), st.integers(1, 3), st.sampled_from([1, 3])),
    st.sampled_from(DTYPES[:2]),
    st.sampled_from([None, 1, 40, 200]),
)
def test_any_format(key, value, window, dims, sizes, dtype, sliding_window) -> None:
    spec, (d, dv), (length, t, ratio) = KVSpec(key, value, *window), dims, sizes
    if supports(key, value, d, dv, dtype) is not None:
        return
    at = state(spec, [length], t, d=d, dv=dv, dtype=dtype)
    check(at, randn(1, ratio, t, d, dtype=dtype, seed=3), sliding_window=sliding_window)


# ---------------------------------------------------------------- queries and options


@pytest.mark.parametrize(
    ("ratio", "t", "hkv"), [(1, 1, 2), (3, 5, 1), (4, 1, 2), (8, 2, 1), (71, 1, 1), (4, 32, 1)]
)
def test_queries_that_share_a_head(ratio: int, t: int, hkv: int) -> None:
    at = state(KIVI, [150, 70], t, hkv=hkv)
    check(at, randn(2, hkv * ratio, t, 32, dtype=HALF, seed=9))


S_AUX = torch.tensor([0.5, -2.0, 8.0, 0.0], device=DEVICE)
OPTIONS = [
    {"sliding_window": 1},
    {"sliding_window": 45},
    {"sliding_window": 300},
    {"softcap": 2.0},
    {"s_aux": S_AUX},
    {"sliding_window": 150, "softcap": 3.0, "s_aux": S_AUX.half()},
]


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "+".join(o))
def test_options(options: dict, splits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_portable, "_division", lambda *_: splits)
    at = state(KIVI, [700, 40], 3, hkv=2)
    check(at, randn(2, 4, 3, 32, dtype=HALF, seed=9) * 2, **options)


def test_any_division_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    at = state(KIVI, [600, 3])
    q, results = randn(2, 3, 1, 32, dtype=HALF, seed=9), []
    for splits in (1, 2, 9):
        monkeypatch.setattr(triton_portable, "_division", lambda *_, splits=splits: splits)
        results.append(check(at, q))
        again = decode_attention(q, at.view, at.spec, at.position, 0.2)
        assert all(torch.equal(a, b) for a, b in zip(results[-1], again, strict=True))
    for out, lse in results[1:]:
        assert (out - results[0][0]).abs().max() < 2e-3
        assert (lse - results[0][1]).abs().max() < 1e-4


@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("aux", [False, True])
def test_a_row_that_holds_nothing(aux: bool, splits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_portable, "_division", lambda *_: splits)
    at = state(KIVI, [0, 60])
    length = at.view.length * torch.tensor([0, 1], device=DEVICE)
    at = at._replace(view=at.view._replace(length=length))
    at.view.exact_key[0], at.view.exact_value[0] = math.nan, math.nan
    s_aux = torch.tensor([1.0, -3.0], device=DEVICE) if aux else None
    out, lse = check(at, randn(2, 2, 1, 32, dtype=HALF, seed=9), s_aux=s_aux)
    assert (out[0] == 0).all()
    assert torch.allclose(lse[0, :, 0], s_aux if aux else torch.full_like(lse[0, :, 0], NOTHING))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [Q(2, "token", 16), Q(2, "channel", 32), None])
def test_huge_outliers(value: QuantSpec | None, dtype: torch.dtype) -> None:
    """Up to the end of float16's range, in keys, values and queries.

    In an outlier's group what rounding costs counts from the group's range, as does its step.
    """
    spec = KVSpec(Q(2, "channel", 32), value, 32, 0)
    at = state(spec, [200], dtype=dtype, outlier=65504.0)
    q = randn(1, 4, 1, 32, dtype=dtype, seed=9) / 100
    check(at, q, 0.01, slack=16)
    q[0, 0, 0, 3] = 100.0
    check(at, q, 1e-6, slack=16)


@pytest.mark.skipif(GPU, reason="which does so by itself")
@pytest.mark.parametrize(
    "value", [Q(2, "token", 16), Q(3, "token", 16), Q(2, "token", 16, "symmetric")]
)
def test_huge_outliers_where_terms_are_added_one_by_one(
    value: QuantSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a GPU multiplies float32: an fma a term, the first of them onto the accumulator."""

    def create_dot(_: Any, a: Any, b: Any, acc: Any, *precision: object) -> Any:
        total = acc.data
        for column, row in zip(a.data.T.astype(float), b.data.astype(float), strict=True):
            total = (total + column[:, None] * row).astype(acc.data.dtype)
        return type(acc)(total, acc.dtype.scalar)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)
    test_huge_outliers(value, FULL)


@pytest.mark.parametrize("dtype", DTYPES)
def test_small_numbers_keep_their_digits(dtype: torch.dtype) -> None:
    at = state(KIVI, [300], dtype=dtype, factor=2.0**-7)
    check(at, randn(1, 2, 1, 32, dtype=dtype, seed=9), 16.0)


def test_queries_with_any_strides() -> None:
    at = state(KIVI, [90, 200], 2, hkv=2)
    q = randn(2, 2, 4, 32, dtype=HALF, seed=9)
    out, lse = check(at, q.transpose(1, 2).contiguous())
    for other in (q.transpose(1, 2), torch.stack([q.transpose(1, 2)] * 2, -1)[..., 1]):
        assert not other.is_contiguous()
        again = decode_attention(other, at.view, at.spec, at.position, 0.2)
        assert torch.equal(again[0], out) and torch.equal(again[1], lse)


# ---------------------------------------------------------------- the operator


def flat(at: State, q: torch.Tensor) -> tuple:
    key, value = (triton_formats.flat(s, 32) for s in (at.spec.key, at.spec.value))
    view = at.view
    tensors = (q, *view.key[:3], *view.value[:3], *view[2:7], at.position, None)
    return (*tensors, *key, *value, at.spec.sink_length, 0.2, None, None)


def test_operator_is_registered_soundly() -> None:
    at = state(KIVI, [60])
    torch.library.opcheck(
        torch.ops.kivi.decode_attention.default,
        flat(at, randn(1, 2, 1, 32, dtype=HALF)),
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
    )


@pytest.mark.compile
def test_compiles_into_one_graph() -> None:
    at = state(KIVI, [60], 2)
    q = randn(1, 2, 2, 32, dtype=HALF)

    def twice(q: torch.Tensor) -> torch.Tensor:
        return decode_attention(q * 1, at.view, at.spec, at.position, 0.2)[0] * 2

    compiled = torch.compile(twice, fullgraph=True, backend="inductor" if GPU else "aot_eager")
    assert torch.equal(compiled(q), twice(q))


def test_supports() -> None:
    assert supports(None, None, 128, 128, HALF) is None
    assert "float64" in str(supports(None, None, 128, 128, torch.float64))
    assert "value" in str(supports(None, None, 128, 1024, HALF))
    assert "does not divide" in str(supports(Q(2, "token", 48), None, 64, 64, HALF))


# ---------------------------------------------------------------- where there is a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", [32, 128])
@pytest.mark.parametrize("bits", [2, 4])
def test_long_rows(bits: int, group: int, dtype: torch.dtype) -> None:
    spec = KVSpec(Q(bits, "channel", group), Q(bits, "token", group), 128, 4)
    at = state(spec, [5000, 17, 9000], hkv=2, d=128, dv=128, dtype=dtype)
    check(at, randn(3, 8, 1, 128, dtype=dtype, seed=9), 128**-0.5)


@pytest.mark.gpu
def test_graphs_replay_and_nothing_waits_for_the_device() -> None:
    at = state(KIVI, [700, 90], hkv=2, d=64, dv=64)
    q = randn(2, 8, 1, 64, dtype=HALF, seed=9)
    out, _ = check(at, q)
    torch.cuda.set_sync_debug_mode("error")
    try:
        decode_attention(q, at.view, at.spec, at.position, 0.2)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        again, _ = decode_attention(q, at.view, at.spec, at.position, 0.2)
    graph.replay()
    assert torch.equal(again, out)
