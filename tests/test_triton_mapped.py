"""Decode attention over mapped and centered tokens against float64, on the portable kernel."""

import math
from dataclasses import replace

import pytest
import torch
from one_thread import one_thread  # noqa: F401
from test_triton_decode import (  # noqa: F401
    BRAIN,
    DEVICE,
    FLOOR,
    FULL,
    GPU,
    HALF,
    _outputs_begin_as_nan,
    randn,
)
from test_triton_extend import kernel  # noqa: F401

from kivi import KVQuantizer, KVSpec, LayerCache, QuantSpec, store
from kivi.attention import get_ops
from kivi.kernels import reference, triton_decode, triton_extend_portable, triton_mapped
from kivi.kernels.reference import exact_positions
from kivi.kernels.triton_decode import decode_attention
from kivi.kernels.triton_extend import extend_attention
from kivi.kernels.triton_formats import is_plain, supports
from kivi.kernels.triton_prompt import store_pages
from kivi.kernels.triton_quantize import quantize_pack
from kivi.kernels.triton_write import write_new
from kivi.packing import unpack
from kivi.transforms import inverse_hadamard

pytestmark = [pytest.mark.filterwarnings("ignore::RuntimeWarning"), *[pytest.mark.gpu] * GPU]
PLUMB = QuantSpec(2, "token", None, "unbiased", transform="hadamard", center=128, smooth="outliers")
ROTATED = QuantSpec(2, "channel", 32, transform="hadamard")
SPECS = {
    "plumb": KVSpec(PLUMB, PLUMB, 32, 4),
    "keys rotated": KVSpec(ROTATED, QuantSpec(4, "token", 16), 32, 0),
    "values rotated": KVSpec(
        QuantSpec(2, "channel", 64), QuantSpec(3, "token", 32, transform="hadamard_32"), 32, 0
    ),
    "centers": KVSpec(
        QuantSpec(4, "token", None, center=32),
        QuantSpec(1, "token", None, "midpoint", center=64),
        32,
        0,
    ),
    "smoothed": KVSpec(
        QuantSpec(8, "token", 16, "midpoint", smooth="max"),
        QuantSpec(2, "channel", 32, "symmetric", clip=0.9, smooth="outliers"),
        32,
        0,
    ),
    "keys exact": KVSpec(None, PLUMB, 32, 0),
}


def dense(pages, spec, table, smooth, d):
    """Packed tokens `[B, Hkv, n * 512, D]` in float64."""
    index = table.flatten()
    if spec is None:
        x = pages.words[index].double()
    else:
        codes = unpack(pages.words[index], spec.bits).double()
        scale, group = pages.scale[index].double(), spec.group(d)
        zero = (2**spec.bits - 1) / 2 if spec.grid in ("midpoint", "unbiased") else None
        if spec.grid == "symmetric":
            zero = 2.0 ** (spec.bits - 1)
        zero = pages.zero[index].double() if zero is None else -zero * scale
        dim = -2 if spec.axis == "channel" else -1
        x = codes * scale.repeat_interleave(group, dim) + zero.repeat_interleave(group, dim)
        if spec.center:
            x = x + pages.center[index].double().repeat_interleave(spec.center, 2)
        if spec.transform:
            eye = torch.eye(d, dtype=torch.float64, device=x.device)
            x = x @ inverse_hadamard(eye, spec.block(d))
    x = x.view(*table.shape, *x.shape[1:]).transpose(1, 2).flatten(2, 3)
    return x if smooth is None else x * smooth.double().unsqueeze(2)


def check(
    spec, lengths, t=1, ratio=2, d=32, dv=32, dtype=HALF, softcap=None, window=None, loud=0.0
):
    """`loud`: about how much higher the scores of token 400 are, whose value is unlike others."""
    b, longest = len(lengths), max(lengths)
    layer = LayerCache(spec, b, 2, d, dv, dtype=dtype, device=DEVICE, impl="eager")
    k, v = (randn(b, 2, longest + t, n, seed=n + salt) for n, salt in ((d, 1), (dv, 2)))
    k = k + 3 * randn(d, seed=5)  # what a key bias adds
    if spec.key and spec.key.axis == "token":
        k[..., 3] *= 20  # a channel that varies much
    q = randn(b, 2 * ratio, t, d, seed=9).to(dtype)
    if loud:
        k[:, :, 400] += loud * d**-0.5 * q.float().view(b, 2, -1, d).sum(2)
        v += 1
        v[:, :, 400] = -1
    k, v = k.to(dtype), v.to(dtype)
    valid = torch.arange(longest, device=DEVICE) < torch.tensor(lengths, device=DEVICE)[:, None]
    layer.append(k[:, :, :longest], v[:, :, :longest], valid)
    step, _ = layer._step(t, None, False)
    store.write_exact(layer._view(), spec, k[:, :, longest:], v[:, :, longest:], step.position)
    view = layer._view()._replace(length=step.length)
    position, visible = exact_positions(view, spec.sink_length)
    hidden = torch.cat([~visible, torch.ones_like(visible[:, :1])], 1)
    for x in (view.exact_key, view.exact_value):
        x.masked_fill_(hidden[:, None, :, None], math.nan)
    for pages in view[:2]:
        for meta in pages[1:]:
            if meta is not None:
                meta[0] = math.nan
    options = (d**-0.5, window, softcap)
    out, lse = decode_attention(q, view, spec, step.position, *options)
    other, _ = reference.decode_attention(q, view, spec, step.position, *options)
    smooth = reference.smooth_factors(view, spec)
    index = torch.arange(view.table.shape[1] * 512, device=DEVICE)
    position = torch.cat([(spec.sink_length + index).expand(b, -1), position], 1)
    visible = torch.cat([index < view.packed[:, None], visible], 1)
    both = []
    for pages, one, exact, factor, n in zip(
        view[:2], (spec.key, spec.value), view[4:6], smooth, (d, dv), strict=True
    ):
        x = torch.cat([dense(pages, one, view.table, factor, n), exact[:, :, :-1].double()], 2)
        x = torch.where(visible[:, None, :, None], x, 0.0)
        both.append(x.repeat_interleave(ratio, 1))
    scores = q.double() @ both[0].transpose(-1, -2) * options[0]
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    distance = step.position[:, :, None] - position[:, None]
    near = (distance >= 0) & visible[:, None]
    if window is not None:
        near &= distance < window
    scores = scores.masked_fill(~near[:, None], -math.inf)
    want, want_lse = scores.softmax(-1) @ both[1], scores.logsumexp(-1)
    error = [float((x.double() - want).norm() / want.norm()) for x in (out, other)]
    # The mapped query is rounded to 16 bit once more: half an eps of a score's terms.
    size = (q.double().abs() @ both[0].abs().transpose(-1, -2)).amax() * options[0]
    eps = max(torch.finfo(dtype).eps, 2.0**-20)
    assert out.isfinite().all() and out.dtype == dtype
    assert error[0] <= 2 * error[1] + FLOOR[dtype]
    assert (lse.double() - want_lse).abs().max() <= eps * max(1.0, float(size))
    return out


def check_extend(
    spec, lengths, t, ratio=2, d=32, dtype=HALF, masked=False, padding=None, **options
):
    """Many new tokens over a packed past; the first `padding` of a row are not valid."""
    b, longest = len(lengths), max(lengths)
    layer = LayerCache(spec, b, 2, d, dtype=dtype, device=DEVICE, impl="eager")
    k, v = (randn(b, 2, longest + t, d, seed=d + salt) for salt in (1, 2))
    k = k + 3 * randn(d, seed=5)
    k[..., 3] *= 20
    k, v = k.to(dtype), v.to(dtype)
    valid = torch.arange(longest, device=DEVICE) < torch.tensor(lengths, device=DEVICE)[:, None]
    layer.append(k[:, :, :longest], v[:, :, :longest], valid)
    view = layer._view()
    position, visible = exact_positions(view, spec.sink_length)
    hidden = torch.cat([~visible, torch.ones_like(visible[:, :1])], 1)
    for x in (view.exact_key, view.exact_value):
        x.masked_fill_(hidden[:, None, :, None], math.nan)
    for pages in view[:2]:
        for meta in pages[1:]:
            if meta is not None:
                meta[0] = math.nan
    k, v = k[:, :, longest:].contiguous(), v[:, :, longest:].contiguous()
    q = randn(b, 2 * ratio, t, d, seed=9).to(dtype)
    real = (
        torch.arange(t, device=DEVICE) >= torch.tensor(padding or [0] * b, device=DEVICE)[:, None]
    )
    new = torch.where(real, view.length[:, None] + real.cumsum(1) - 1, 0)
    for x in (q, k, v):
        x.masked_fill_(~real[:, None, :, None], math.nan)
    mask = torch.tril(torch.ones(1, 1, t, t, dtype=torch.bool, device=DEVICE)) if masked else None
    given = dict(valid=real if padding else None, mask=mask, **options)
    out, lse = extend_attention(q, k, v, view, spec, new, d**-0.5, **given)
    if GPU:
        again = extend_attention(q, k, v, view, spec, new, d**-0.5, **given)
        assert torch.equal(out, again[0]) and torch.equal(lse, again[1])
    other, _ = reference.extend_attention(q, k, v, view, spec, new, d**-0.5, **given)
    smooth = reference.smooth_factors(view, spec)
    index = torch.arange(view.table.shape[1] * 512, device=DEVICE)
    position = torch.cat([(spec.sink_length + index).expand(b, -1), position, new], 1)
    visible = torch.cat([index < view.packed[:, None], visible, real], 1)
    both = []
    for pages, one, exact, factor, x in zip(
        view[:2], (spec.key, spec.value), view[4:6], smooth, (k, v), strict=True
    ):
        past = dense(pages, one, view.table, factor, d)
        x = torch.cat([past, exact[:, :, :-1].double(), x.double()], 2)
        both.append(torch.where(visible[:, None, :, None], x, 0.0).repeat_interleave(ratio, 1))
    q = torch.where(real[:, None, :, None], q.double(), 0.0)
    scores = q @ both[0].transpose(-1, -2) * d**-0.5
    if options.get("softcap"):
        scores = options["softcap"] * torch.tanh(scores / options["softcap"])
    distance = new[:, :, None] - position[:, None]
    near = (distance >= 0) & visible[:, None]
    if options.get("sliding_window"):
        near &= distance < options["sliding_window"]
    scores = scores.masked_fill(~near[:, None], -math.inf)
    if options.get("s_aux") is not None:
        aux = options["s_aux"].double().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, aux], 3)
        both[1] = torch.nn.functional.pad(both[1], (0, 0, 0, 1))
    want, want_lse = scores.softmax(-1) @ both[1], scores.logsumexp(-1)
    want, want_lse, out, other, lse = (
        x[real[:, None].expand(want_lse.shape)] for x in (want, want_lse, out, other, lse)
    )
    error = [float((x.double() - want).norm() / want.norm()) for x in (out, other)]
    size = (q.abs() @ both[0].abs().transpose(-1, -2)).amax() * d**-0.5
    eps = max(torch.finfo(dtype).eps, 2.0**-20)
    assert out.isfinite().all() and out.dtype == dtype
    assert error[0] <= 2 * error[1] + FLOOR[dtype]
    assert (lse.double() - want_lse).abs().max() <= eps * max(1.0, float(size))


@pytest.mark.parametrize("name", SPECS)
def test_prompts_over_a_mapped_past(name: str) -> None:
    check_extend(SPECS[name], [700, 33], 40)


def test_options_of_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    plumb = SPECS["plumb"]
    check_extend(plumb, [300, 170], 20, dtype=BRAIN)
    check_extend(plumb, [300], 3, dtype=FULL, softcap=20.0)
    check_extend(plumb, [700], 35, sliding_window=100)
    check_extend(plumb, [300], 20, masked=True, s_aux=randn(4, seed=3))
    check_extend(plumb, [300, 3], 20, padding=[2, 19])
    monkeypatch.setattr(triton_extend_portable, "division", lambda *_: 3)
    check_extend(plumb, [1, 700], 40)


@pytest.mark.parametrize("name", SPECS)
def test_formats(name: str) -> None:
    assert not (is_plain(SPECS[name].key) and is_plain(SPECS[name].value))
    check(SPECS[name], [700, 33], d=32, dv=64 if name != "keys exact" else 32)


@pytest.mark.parametrize("dtype", [BRAIN, FULL])
def test_dtypes(dtype: torch.dtype) -> None:
    check(SPECS["plumb"], [300, 170], dtype=dtype)


def test_options() -> None:
    check(SPECS["plumb"], [700], t=3, softcap=20.0)
    check(SPECS["plumb"], [700], window=300)


def test_a_row_without_packed_tokens() -> None:
    check(SPECS["plumb"], [1, 400])


def test_operator_is_registered_soundly(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    op = torch.ops.kivi.mapped_attention
    with monkeypatch.context() as patch:
        patch.setattr(triton_decode, "direct", lambda *_, **__: False)
        patch.setattr(torch.ops.kivi, "mapped_attention", lambda *a: calls.append(a) or op(*a))
        check(SPECS["plumb"], [200])
    torch.library.opcheck(
        op.default,
        calls[0],
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
    )


def test_operator_of_prompts_is_registered_soundly(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    op = torch.ops.kivi.mapped_extend
    with monkeypatch.context() as patch:
        patch.setattr(torch.ops.kivi, "mapped_extend", lambda *a: calls.append(a) or op(*a))
        check_extend(SPECS["plumb"], [200], 3)
    torch.library.opcheck(
        op.default,
        calls[0],
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
    )


def test_what_is_served_by_what() -> None:
    plumb = KVQuantizer.get("plumb").spec()
    assert supports(plumb.key, plumb.value, 128, 128, HALF) is None
    assert "token_norm" in str(
        supports(KVQuantizer.get("oscar_omni").spec().key, None, 64, 64, HALF)
    )
    small = QuantSpec(2, "token", 32, center=16)
    assert "center=16" in str(supports(small, None, 64, 64, HALF))
    device = torch.device(DEVICE)
    ops = get_ops("triton", plumb, (64, 64), HALF, device)
    assert ops == (quantize_pack, decode_attention, extend_attention, write_new, store_pages)
    rotated = KVSpec(ROTATED, ROTATED)
    with pytest.raises(ValueError, match="impl='triton' cannot serve"):
        get_ops("triton", rotated, (64, 64), HALF, device)
    if GPU:
        assert get_ops("auto", plumb, (64, 64), HALF, device) == ops
        mixed = get_ops("auto", rotated, (64, 64), HALF, device)
        assert mixed == ops._replace(quantize_pack=reference.quantize_pack)


def same(bits, **options):
    one = QuantSpec(bits, "token", None, **options)
    return KVSpec(one, one, 32, 4)


GLUON = {
    "plumb": (KVSpec(PLUMB, PLUMB, 32, 4), {}),
    "4 bits": (same(4, grid="unbiased", transform="hadamard", center=64, smooth="outliers"), {}),
    "64 channels": (KVSpec(PLUMB, PLUMB, 32, 0), {"d": 64, "ratio": 4}),
    "one query, bfloat16": (KVSpec(PLUMB, PLUMB, 32, 0), {"ratio": 1, "dtype": BRAIN}),
    "one query, short centers": (
        same(2, grid="midpoint", transform="hadamard", center=32, smooth="max"),
        {"ratio": 1},
    ),
    "two queries, 4 bits": (
        same(4, grid="symmetric", center=32),
        {"ratio": 2, "d": 64, "softcap": 20.0},
    ),
    "blocks of 32": (same(2, grid="midpoint", transform="hadamard_32", center=32), {}),
    "not centered": (same(2, grid="symmetric", transform="hadamard"), {"softcap": 20.0}),
    "not rotated": (same(4, grid="midpoint", center=128, smooth="max"), {"d": 64}),
    "several tokens": (KVSpec(PLUMB, PLUMB, 32, 4), {"t": 3, "ratio": 4}),
    "256 channels": (KVSpec(PLUMB, PLUMB, 32, 40), {"d": 256}),
    "256 channels, one query, bfloat16": (
        same(2, grid="unbiased", transform="hadamard_32", center=32, smooth="max"),
        {"d": 256, "ratio": 1, "dtype": BRAIN},
    ),
    "256 channels, 4 bits": (
        same(4, grid="symmetric", transform="hadamard"),
        {"d": 256, "ratio": 3, "softcap": 20.0},
    ),
}


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="the Gluon kernel needs a GPU")
@pytest.mark.parametrize("name", GLUON)
def test_gluon(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_mapped, "portable", None)  # it is not called
    spec, options = GLUON[name]
    options = {"d": 128, "ratio": 4, **options}
    check(spec, [2100, 700, 60, 3], dv=options["d"], **options)
    check(spec, [700] * 40, dv=options["d"], **options)


HOPPER = {
    "plumb": (KVSpec(PLUMB, PLUMB, 128, 4), {}),
    "plumb, 1 bit values, bfloat16": (
        KVSpec(PLUMB, replace(PLUMB, bits=1), 128, 4),
        {"ratio": 1, "dtype": BRAIN},
    ),
    "4 bits": (same(4, grid="unbiased", transform="hadamard", center=64, smooth="outliers"), {}),
    "3 and 1 bits": (KVSpec(replace(PLUMB, bits=3), replace(PLUMB, bits=1), 128, 4), {}),
    "3 bits, bfloat16": (
        KVSpec(replace(PLUMB, bits=3), QuantSpec(3, "token", 32)),
        {"dtype": BRAIN},
    ),
    "4 and 8 bits, bfloat16": (
        KVSpec(replace(PLUMB, bits=4), replace(PLUMB, bits=8, grid="midpoint"), 32, 4),
        {"dtype": BRAIN, "ratio": 7},
    ),
    "blocks of 32": (same(2, grid="midpoint", transform="hadamard_32", center=32), {}),
    "keys rotated": (SPECS["keys rotated"], {}),
    "values smoothed": (
        KVSpec(QuantSpec(2, "token", 16), QuantSpec(2, "token", None, "midpoint", smooth="max")),
        {},
    ),
    "softcap and sinks": (SPECS["plumb"], {"softcap": 20.0, "s_aux": True}),
    "padding": (SPECS["plumb"], {"padding": [0, 131, 299]}),
    "window": (SPECS["plumb"], {"sliding_window": 700}),
    "splits": (SPECS["plumb"], {"splits": 5, "s_aux": True}),
    "more splits than tiles": (SPECS["plumb"], {"splits": 80, "dtype": BRAIN}),
}


@pytest.mark.gpu
@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize("name", HOPPER)
def test_long_prompts(d: int, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spec, options = HOPPER[name]
    options = {"ratio": 4, "d": d, **options}
    if "splits" in options:
        splits = options.pop("splits")
        monkeypatch.setattr(triton_extend_portable, "division", lambda *_: splits)
    if options.pop("s_aux", False):
        options["s_aux"] = randn(2 * options["ratio"], seed=3)
    check_extend(spec, [5000, 17, 2000], 300, **options)
