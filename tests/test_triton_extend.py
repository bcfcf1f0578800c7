"""The Triton extend_attention against float64: at most twice the reference's error.

Without a GPU the kernel runs in Triton's interpreter. Everything that is not part of a row is NaN.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from one_thread import one_thread  # noqa: F401
from test_triton_decode import (
    BRAIN,
    DEVICE,
    DTYPES,
    FLOOR,
    FORMATS,
    GPU,
    HALF,
    KIVI,
    NOTHING,
    Q,
    _outputs_begin_as_nan,  # noqa: F401
    dense,
    poison,
    randn,
    rows_of,
    specs,
)

from kivi import KVSpec, LayerCache
from kivi.attention import get_ops
from kivi.kernels import reference, triton_extend_portable, triton_formats
from kivi.kernels import triton_extend_hopper as hopper
from kivi.kernels.reference import exact_positions
from kivi.kernels.triton_extend import extend_attention
from kivi.kernels.triton_formats import supports
from kivi.quantize import Pages
from kivi.view import CacheView

pytestmark = [pytest.mark.filterwarnings("ignore::RuntimeWarning"), *[pytest.mark.gpu] * GPU]


class State(NamedTuple):
    """A past, or none, and new tokens."""

    spec: KVSpec
    view: CacheView | None
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    position: torch.Tensor
    valid: torch.Tensor | None


def state(
    spec: KVSpec,
    lengths: list[int],
    t: int,
    ratio: int = 2,
    hkv: int = 1,
    d: int = 32,
    dv: int = 32,
    dtype: torch.dtype = HALF,
    padding: list[int] | None = None,
    past: bool = True,
    outlier: float | None = None,
) -> State:
    """Rows of so many tokens and t new columns, the first `padding` of which are not valid."""
    b, longest = len(lengths), max(lengths)
    new = torch.arange(t, device=DEVICE)
    counts = torch.tensor(lengths, device=DEVICE) * past
    k, v = (
        randn(b, hkv, longest + t, n, dtype=dtype, seed=n + salt) for n, salt in ((d, 1), (dv, 2))
    )
    q = randn(b, hkv * ratio, t, d, dtype=dtype, seed=9)
    if outlier is not None:
        for x in (k, v):
            x[:, :, ::67, 3] = outlier
            x[:, :, 5::101, 7] = -outlier
    view = None
    if past:
        layer = LayerCache(spec, b, hkv, d, dv, dtype=dtype, device=DEVICE, impl="eager")
        kept = torch.arange(longest, device=DEVICE) < counts[:, None]
        layer.append(k[:, :, :longest], v[:, :, :longest], kept)
        view = layer._view()
        poison(view, spec)
    k, v, valid, position = k[:, :, longest:].clone(), v[:, :, longest:].clone(), None, new + 0
    if padding is not None:
        valid = new >= torch.tensor(padding, device=DEVICE)[:, None]
        position = valid.cumsum(1) - 1
        for x in (q, k, v):
            x.masked_fill_(~valid[:, None, :, None], math.nan)
    position = (counts[:, None] + position).clamp_min(0)
    if valid is not None:
        position = torch.where(valid, position, 0)
    return State(spec, view, q, k, v, position, valid)


def exactly(
    at: State,
    scale: float,
    mask: torch.Tensor | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
) -> tuple[torch.Tensor, ...]:
    """Attention in float64: out, log-sum-exp; the largest sum of |terms| of a score, rms of v."""
    b, hq, t, _ = at.q.shape
    valid = torch.ones_like(at.position, dtype=torch.bool) if at.valid is None else at.valid
    q, k, v = (torch.where(valid[:, None, :, None], x.double(), 0.0) for x in (at.q, at.k, at.v))
    position, visible = at.position, valid
    if at.view is not None:
        view, spec = at.view, at.spec
        old, seen = exact_positions(view, spec.sink_length)
        index = torch.arange(view.table.shape[1] * 512, device=DEVICE)
        packed = (spec.sink_length + index).expand(b, -1)
        position = torch.cat([packed, old, position], 1)
        visible = torch.cat([index < view.packed[:, None], seen, visible], 1)
        both = []
        for pages, one, exact, new in (
            (view.key, spec.key, view.exact_key, k),
            (view.value, spec.value, view.exact_value, v),
        ):
            x = torch.cat([dense(pages, one, view.table), exact[:, :, :-1].double(), new], 2)
            both.append(torch.where(visible[:, None, :, None], x, 0.0))
        k, v = both
    rms = v.square().sum().sqrt() / (visible.sum() * v[0, :, 0].numel()).clamp_min(1).sqrt()
    k, v = (x.repeat_interleave(hq // x.shape[1], 1) for x in (k, v))
    scores = q @ k.transpose(-1, -2) * scale
    size = (q.abs() @ k.abs().transpose(-1, -2) * scale).abs().amax()
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    distance = at.position[:, :, None] - position[:, None]
    near = distance >= 0
    if sliding_window is not None:
        near &= distance < sliding_window
    if mask is not None:
        near[:, :, -t:] = mask[:, 0]
    scores = scores.masked_fill(~(near & visible[:, None])[:, None], -math.inf)
    if s_aux is not None:
        aux = s_aux.double()[None, :, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, aux], -1)
        v = torch.cat([v, torch.zeros_like(v[:, :, :1])], 2)
    top = scores.amax(-1, keepdim=True).clamp_min(-1e300)
    weights = torch.exp(scores - top)
    total = weights.sum(-1, keepdim=True)
    out = torch.where(total > 0, weights @ v / total.clamp_min(1e-300), 0.0)
    return out, torch.where(total > 0, top + total.log(), NOTHING)[..., 0], size, rms


def check(
    at: State, scale: float = 0.2, slack: float = 1.0, **options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """The kernel's result, after it was compared."""
    arguments = (at.q, at.k, at.v, at.view, at.spec, at.position, scale, at.valid)
    out, lse = extend_attention(*arguments, **options)
    other, other_lse = reference.extend_attention(*arguments, **options)
    want, want_lse, size, v_rms = exactly(at, scale, **options)
    assert lse is not None and other_lse is not None
    assert out.dtype == at.q.dtype and lse.dtype == torch.float32
    assert out.shape == want.shape and lse.shape == want_lse.shape
    assert out.isfinite().all() and lse.isfinite().all()
    result = out, lse
    if at.valid is not None:
        keep = at.valid[:, None].expand(want_lse.shape)
        out, other, want = out[keep], other[keep], want[keep]
        lse, other_lse, want_lse = lse[keep], other_lse[keep], want_lse[keep]
    top = torch.finfo(at.q.dtype).max
    want, floor = want.clamp(-top, top), slack * FLOOR[at.q.dtype] * float(v_rms)
    rms = [float((x.double() - want).square().mean().sqrt()) for x in (out, other)]
    peak = [float((x.double() - want).abs().max()) for x in (out, other)]
    assert rms[0] <= 2 * rms[1] + floor
    assert peak[0] <= 3 * peak[1] + 4 * floor
    nothing = want_lse == NOTHING
    assert torch.equal(lse == NOTHING, nothing) and (out[nothing] == 0).all()
    error = [(x.double() - want_lse)[~nothing].abs() for x in (lse, other_lse)]
    if error[0].numel():
        assert error[0].max() <= 2 * error[1].max() + 2**-20 * float(size)
    return result


# ---------------------------------------------------------------- formats and shapes


@pytest.mark.parametrize(("spec", "d", "dv", "dtype"), FORMATS, ids=range(len(FORMATS)))
def test_formats(spec: KVSpec, d: int, dv: int, dtype: torch.dtype) -> None:
    at = state(spec, rows_of(spec), 3, d=d, dv=dv, dtype=dtype)
    assert at.view is not None and at.view.packed.min() == 0
    assert at.view.packed.max() > (0 if spec.unit == 512 else 512)
    check(at, 2 * d**-0.5)


@settings(max_examples=6, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(
    specs,
    specs,
    st.tuples(st.integers(0, 40), st.integers(0, 5)),
    st.tuples(st.sampled_from([16, 24, 32]), st.sampled_from([16, 32])),
    st.tuples(st.integers(1, 300), st.integers(1, 70), st.sampled_from([1, 3])),
    st.sampled_from(DTYPES[:2]),
    st.sampled_from([None, 1, 40, 200]),
    st.none() | st.integers(0, 70),
)
def test_any_format(key, value, window, dims, sizes, dtype, sliding_window, padding) -> None:
    spec, (d, dv), (length, t, ratio) = KVSpec(key, value, *window), dims, sizes
    if supports(key, value, d, dv, dtype) is not None:
        return
    pad = None if padding is None else [min(padding, t - 1)]
    at = state(spec, [length], t, ratio, d=d, dv=dv, dtype=dtype, padding=pad)
    check(at, sliding_window=sliding_window)


@pytest.mark.parametrize(
    ("ratio", "t", "hkv", "past"),
    [(1, 200, 2, True), (3, 90, 1, True), (71, 4, 1, True), (4, 140, 1, False), (8, 1, 1, True)],
)
def test_rows_of_any_number(ratio: int, t: int, hkv: int, past: bool) -> None:
    at = state(KIVI, [150, 70], t, ratio, hkv, past=past)
    # Without a past PyTorch's kernel would do it all, were there no softcap.
    check(at, softcap=None if past else 50.0)


S_AUX = torch.tensor([0.5, -2.0, 8.0, 0.0], device=DEVICE)
OPTIONS = [
    {"sliding_window": 1},
    {"sliding_window": 45},
    {"sliding_window": 300, "softcap": 4.0},
    {"softcap": 2.0},
    {"s_aux": S_AUX},
    {"mask": True},
    {"mask": True, "sliding_window": 90, "softcap": 3.0, "s_aux": S_AUX.half()},
]


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        *(("past", options) for options in OPTIONS),
        *((kind, o) for kind in ("none", "padded", "split") for o in (OPTIONS[1], OPTIONS[-1])),
        ("padded", OPTIONS[4]),
        ("split", OPTIONS[4]),
    ],
    ids=str,
)
def test_options(kind: str, options: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    splits = 3 if kind == "split" else 1
    monkeypatch.setattr(triton_extend_portable, "division", lambda *_: splits)
    padding = [0, 30] if kind == "padded" else None
    t = 36 if kind == "split" else 70
    at = state(KIVI, [420, 40], t, 2, 2, padding=padding, past=kind != "none")
    if "mask" in options:
        # A tree: some new tokens do not see those before them. One row sees nothing new.
        mask = (randn(1, 1, t, t, seed=5) > 0) | torch.eye(t, dtype=torch.bool, device=DEVICE)
        mask[0, 0, 33] = False
        options = options | {"mask": mask.tril()}
    check(at, 0.4, **options)


def test_any_division_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    at, results = state(KIVI, [600, 3], 9, 3), []
    for splits in (1, 2, 7, 30):
        monkeypatch.setattr(triton_extend_portable, "division", lambda *_, splits=splits: splits)
        results.append(check(at))
        again = extend_attention(*at[2:5], at.view, at.spec, at.position, 0.2)
        assert all(torch.equal(a, b) for a, b in zip(results[-1], again, strict=True))
    for out, lse in results[1:]:
        assert (out - results[0][0]).abs().max() < 2e-3
        assert (lse - results[0][1]).abs().max() < 1e-4


@pytest.mark.parametrize("tiles", [8, 80, 800])
@pytest.mark.parametrize("programs", [1, 30, 300, 5000])
def test_division_is_sensible(programs: int, tiles: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_extend_portable, "_multiprocessors", lambda _: 132)
    splits = triton_extend_portable.division(programs, tiles, 1, torch.device("cpu"))
    assert 1 <= splits <= max(1, tiles // 4)
    if programs == 5000 or tiles == 8:
        assert splits <= 2
    if programs == 1 and tiles == 800:
        assert splits >= 16


@pytest.mark.parametrize("aux", [False, True])
def test_a_row_that_holds_nothing(aux: bool) -> None:
    at = state(KIVI, [60, 60], 40, padding=[0, 39])
    mask = torch.zeros(2, 1, 40, 40, dtype=torch.bool, device=DEVICE)
    mask[0] = True
    assert at.view is not None
    one = torch.tensor([1, 0], device=DEVICE)
    at = at._replace(view=at.view._replace(length=at.view.length * one))
    s_aux = torch.tensor([1.0, -3.0], device=DEVICE) if aux else None
    out, lse = check(at, mask=mask.tril(), s_aux=s_aux)
    assert (out[1, :, -1] == 0).all()
    expected = s_aux if s_aux is not None else torch.full_like(lse[1, :, -1], NOTHING)
    assert torch.allclose(lse[1, :, -1], expected)


@pytest.mark.parametrize("scale", [-0.3, 0.0])
def test_scales_that_are_not_positive(scale: float) -> None:
    check(state(KIVI, [130, 40], 33), scale)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [Q(2, "token", 16), Q(4, "channel", 32), None])
def test_huge_outliers(value: Any, dtype: torch.dtype) -> None:
    """Up to the end of float16's range, in keys and values."""
    at = state(KVSpec(Q(2, "channel", 32), value, 32, 0), [200], 40, dtype=dtype, outlier=65504.0)
    check(at._replace(q=at.q / 100), 0.01, slack=16)


def test_tensors_with_any_strides() -> None:
    at = state(KIVI, [90, 200], 35, 2, 2)
    out, lse = check(at)
    for copy in (
        lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
        lambda x: torch.stack([x] * 2, -1)[..., 1],
    ):
        q, k, v = (copy(x) for x in at[2:5])
        assert not q.is_contiguous()
        again = extend_attention(q, k, v, at.view, at.spec, at.position, 0.2)
        assert torch.equal(again[0], out) and torch.equal(again[1], lse)


def test_a_plain_prompt_is_left_to_pytorch() -> None:
    at = state(KIVI, [0], 40, 3, past=False)
    arguments = (at.q, at.k, at.v, None, at.spec, at.position, 0.2)
    out, lse = extend_attention(*arguments)
    assert lse is None and torch.equal(out, reference.extend_attention(*arguments)[0])


# ---------------------------------------------------------------- the operator


def flat(at: State) -> tuple:
    key, value = (triton_formats.flat(s, 32) for s in (at.spec.key, at.spec.value))
    past = (
        (None,) * 11 if at.view is None else (*at.view.key[:3], *at.view.value[:3], *at.view[2:7])
    )
    tensors = (*at[2:5], *past, at.position, at.valid, None, None)
    return (*tensors, *key, *value, at.spec.sink_length, 0.2, None, None)


@pytest.mark.parametrize("past", [False, True])
def test_operator_is_registered_soundly(past: bool) -> None:
    torch.library.opcheck(
        torch.ops.kivi.extend_attention.default,
        flat(state(KIVI, [60], 5, padding=[1], past=past)),
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
    )


@pytest.mark.compile
def test_compiles_into_one_graph() -> None:
    at = state(KIVI, [60], 5)

    def twice(q: torch.Tensor) -> torch.Tensor:
        return extend_attention(q * 1, *at[3:5], at.view, at.spec, at.position, 0.2)[0] * 2

    compiled = torch.compile(twice, fullgraph=True, backend="inductor" if GPU else "aot_eager")
    assert torch.equal(compiled(at.q), twice(at.q))


def test_the_cache_takes_it() -> None:
    ops = get_ops("triton", KIVI, (32, 32), HALF, torch.device(DEVICE))
    assert ops.extend_attention is extend_attention


# ---------------------------------------------------------------- where there is a GPU


@pytest.mark.gpu
@settings(max_examples=15)
@given(
    st.tuples(*[st.sampled_from([1, 2, 3, 4, 8])] * 2),
    st.sampled_from([16, 32, 64, 128, None]),
    st.sampled_from([16, 32, 64, 128]),
    st.sampled_from(["asymmetric", "symmetric", "least_squares"]),
    st.sampled_from([64, 80, 96, 128, 256]),
    st.sampled_from(DTYPES),
    st.lists(st.integers(1, 5000), min_size=1, max_size=3),
    st.integers(33, 700),
    st.sampled_from([1, 3, 4, 8]),
    st.sampled_from([None, 100, 1500]),
    st.booleans(),
)
def test_random_specs(
    bits, key_group, value_group, grid, d, dtype, lengths, t, ratio, sliding_window, padded
) -> None:
    value_group = value_group if d % value_group == 0 else 16
    value = Q(bits[1], "token", value_group, grid)
    spec = KVSpec(Q(bits[0], "channel", key_group, grid), value, 64, 4)
    padding = [min(29 * i, t - 1) for i in range(len(lengths))] if padded else None
    at = state(spec, lengths, t, ratio, 2, d, d, dtype, padding)
    check(at, d**-0.5, sliding_window=sliding_window)


@pytest.fixture(params=["hopper", "portable"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Both kernels that can serve the common formats; the one of Hopper only there."""
    used = []
    if request.param == "portable":
        monkeypatch.setattr(hopper, "serves", lambda *_: False)
    elif torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("needs an H100 or H200")
    else:
        launch = hopper.launch
        monkeypatch.setattr(hopper, "launch", lambda *a: (used.append(1), launch(*a)))
    yield request.param
    assert bool(used) == (request.param == "hopper")


@pytest.mark.gpu
@pytest.mark.parametrize(("group", "dtype"), [(32, HALF), (128, HALF), (32, BRAIN)])
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("d", [64, 128])
def test_long_rows(kernel: str, d: int, bits: int, group: int, dtype: torch.dtype) -> None:
    spec = KVSpec(Q(bits, "channel", group), Q(bits, "token", group), 128, 4)
    check(state(spec, [5000, 17, 9000], 600, 4, 2, d, d, dtype), d**-0.5)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"ratio": 1, "t": 33},
        {"ratio": 7, "t": 130},
        {"softcap": 5.0, "s_aux": True},
        {"padding": [0, 131, 299]},
        {"splits": 5, "s_aux": True},
        {"splits": 40},
        {"sliding_window": 700},
        {"sliding_window": 90, "padding": [0, 131, 299], "splits": 2},
        {"grid": "symmetric"},
        {"grid": "symmetric", "bits": 8, "dtype": BRAIN},
        {"key_group": None, "value_group": 16},
        {"sinks": 0, "window": 0},
        {"outlier": 65504.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("d", [64, 128])
def test_common_formats(
    kernel: str, d: int, options: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    o = options.get
    if "splits" in options:
        monkeypatch.setattr(triton_extend_portable, "division", lambda *_: options["splits"])
    bits, grid, ratio = o("bits", 2), o("grid", "asymmetric"), o("ratio", 4)
    key = Q(bits, "channel", o("key_group", 32), grid)
    spec = KVSpec(
        key, Q(bits, "token", o("value_group", 32), grid), o("window", 100), o("sinks", 3)
    )
    padding, outlier = o("padding"), o("outlier")
    dtype, t = o("dtype", HALF), o("t", 300)
    at = state(spec, [2000, 1, 700], t, ratio, 2, d, d, dtype, padding, outlier=outlier)
    aux = randn(2 * ratio, seed=4) if "s_aux" in options else None
    if outlier:
        at = at._replace(q=at.q / 100)
    scale = 0.01 if outlier else d**-0.5
    slack = 16.0 if outlier else 1.0
    limits = {"sliding_window": o("sliding_window"), "softcap": o("softcap"), "s_aux": aux}
    out, lse = check(at, scale, slack, **limits)
    arguments = (at.q, at.k, at.v, at.view, at.spec, at.position, scale, at.valid)
    again = extend_attention(*arguments, **limits)
    assert torch.equal(again[0], out) and torch.equal(again[1], lse)


@pytest.mark.gpu
def test_more_elements_than_32_bits_count(kernel: str) -> None:
    spec = KVSpec(Q(8, "channel", 32), Q(8, "token", 32), 64, 0)
    at = state(spec, [1500], 200, 4, 2, 128, 128)
    assert at.view is not None
    out, _ = check(at, 0.1)
    count = 2**31 // at.view.key.words[0].numel()
    pools = []
    for pages in at.view[:2]:
        tensors = [None if x is None else x.new_zeros(count + len(x), *x.shape[1:]) for x in pages]
        for new, x in zip(tensors, pages, strict=True):
            if new is not None and x is not None:
                new[count:] = x
        pools.append(Pages(*tensors))
    view = at.view._replace(key=pools[0], value=pools[1], table=at.view.table + count)
    again = extend_attention(at.q, at.k, at.v, view, spec, at.position, 0.1)
    assert torch.equal(again[0], out)


@pytest.mark.gpu
def test_graphs_replay_and_nothing_waits_for_the_device() -> None:
    at = state(KIVI, [700, 90], 100, 4, 2, 64, 64)
    out, _ = check(at)
    arguments = (*at[2:5], at.view, at.spec, at.position, 0.2)
    torch.cuda.set_sync_debug_mode("error")
    try:
        extend_attention(*arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        again, _ = extend_attention(*arguments)
    graph.replay()
    assert torch.equal(again, out)


@pytest.mark.gpu
def test_prompt_lengths_share_a_kernel() -> None:
    """The compiled kernels are the same for prompts of any length past that of one block."""
    extend_attention_at = [state(KIVI, [n], t, 4, 2, 64, 64) for n, t in ((700, 200), (1500, 417))]
    count = []
    for at in extend_attention_at:
        check(at)
        count.append(sum(len(c[0]) for c in triton_extend_portable.extend.device_caches.values()))
    assert count[0] == count[1]
