"""Rotation, centre, norm, smoothing and the midpoint grids, against formulas in float64."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from kivi import KVQuantizer, KVSpec, LayerCache, QuantSpec
from kivi.grids import FIXED, fixed_point, mean, norm, round_to
from kivi.kernels import reference
from kivi.quantize import dequantize, quantize
from kivi.transforms import drops_small, hadamard, inverse_hadamard, smooth_factor, without_small


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def matrix(n):
    """Sylvester's Hadamard matrix."""
    h = np.ones((1, 1))
    while len(h) < n:
        h = np.kron([[1, 1], [1, -1]], h)
    return h


@pytest.mark.parametrize("block", [16, 32, 64, 128])
def test_hadamard_is_sylvesters_matrix_on_each_block(block):
    x = randn(3, 128)
    expected = x.double().numpy().reshape(-1, block) @ matrix(block)
    mapped = hadamard(x, block)
    ratio = mapped.double().numpy().reshape(-1, block) / expected
    factor = 2.0 ** -(int(np.log2(block)) // 2)
    assert np.allclose(ratio, factor, rtol=1e-4)
    assert torch.allclose(inverse_hadamard(mapped, block), x, atol=1e-5)
    q = randn(5, 128, seed=1)
    assert torch.allclose(inverse_hadamard(q, block) @ mapped.T, q @ x.T, atol=1e-4)


def test_without_a_block_nothing_is_mapped():
    x = randn(3, 40)
    assert torch.equal(hadamard(x, 1), x) and torch.equal(inverse_hadamard(x, 1), x)


@pytest.mark.parametrize(
    ("transform", "head_dim", "block"),
    [("hadamard", 64, 64), ("hadamard", 96, 32), ("hadamard", 80, 16), ("hadamard_32", 128, 32)],
)
def test_heads_that_are_no_power_of_two_have_blocks(transform, head_dim, block):
    spec = QuantSpec(4, "token", None, transform=transform)
    assert spec.block(head_dim) == block
    x = randn(1, 2, 40, head_dim)
    assert float((dequantize(quantize(x, spec)) - x).norm() / x.norm()) < 0.15


def test_heads_without_blocks_are_refused():
    spec = QuantSpec(2, "channel", transform="hadamard")
    for use in (lambda: quantize(randn(1, 1, 32, 72), spec), lambda: spec.bits_per_element(72)):
        with pytest.raises(ValueError, match="transform='hadamard' does not fit head_dim=72"):
            use()


@pytest.mark.parametrize(
    "arguments",
    [
        dict(transform="fourier"),
        dict(clip=0),
        dict(clip=1.5),
        dict(clip="1"),
        dict(clip=0.5, grid="unbiased"),
        dict(center=128),
        dict(axis="token", center=100),
        dict(axis="token", token_norm=True),
        dict(token_norm=1),
        dict(smooth="some"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(arguments):
    name = next(n for n in arguments if n not in ("axis", "grid"))
    with pytest.raises(ValueError, match=re.escape(f"{name}={arguments[name]!r}")):
        QuantSpec(**dict(bits=2, axis="channel") | arguments)


@pytest.mark.parametrize(
    ("spec", "bits"),
    [
        (QuantSpec(2, "token", None, "unbiased", center=128), 2 + 16 / 64 + 16 / 128),
        (QuantSpec(2, "channel", 32, token_norm=True), 3 + 16 / 64),
        (QuantSpec(2, "channel", 32, transform="hadamard", smooth="max", clip=0.9), 3.0),
        (QuantSpec(4, "token", 32, "midpoint"), 4.5),
    ],
)
def test_what_is_stored_is_what_is_said(spec, bits):
    assert spec.bits_per_element(64) == bits
    packed = quantize(randn(2, 3, 1024, 64), spec)
    assert packed.nbytes * 8 == bits * 2 * 3 * 1024 * 64


# ---------------------------------------------------------------- grids


def test_fixed_point_sums():
    x = torch.tensor([[1.0, -4.0, torch.nan, 2.0, torch.inf, 8.0]])
    valid = torch.tensor([True] * 5 + [False])
    parts, part, peak = fixed_point(x, valid)
    assert peak.item() == 4 and part.item() == 8 / FIXED
    assert parts.tolist() == [[FIXED // 8, -FIXED // 2, 0, FIXED // 4, 0, 0]]
    assert norm(x, valid, torch.float16).item() == pytest.approx(21**0.5, rel=2e-3)
    assert norm(x * 0, valid, torch.float16).item() == 0
    assert fixed_point(x * 0, valid)[0].tolist() == [[0] * 6]
    for size in (3.4e38, 1e30, 1e-30, 2.0**-117):
        parts, part, _ = fixed_point(x / 4 * size, valid)
        assert FIXED / 2 <= -parts[0, 1].item() <= FIXED
        assert part.item() * -parts[0, 1].item() == pytest.approx(size, rel=1 / FIXED)


@pytest.mark.parametrize("tokens", [16, 32, 128])
def test_means_of_what_is_valid_and_finite(tokens):
    x, valid = randn(2, tokens, 8), torch.rand(tokens) < 0.8
    x[0, 3, 4], x[1, 5, 6] = torch.nan, torch.inf
    counts = (valid[:, None] & x.isfinite()).numpy()
    want = np.where(counts, x.numpy(), 0).sum(1, keepdims=True) / counts.sum(1, keepdims=True)
    assert np.allclose(mean(x, valid[:, None]).numpy(), want, atol=1e-6)
    assert not mean(x, valid[:, None] & False).any()


def test_a_constant_group_has_an_exact_mean():
    x = torch.full((128, 1), 0.1).half().float()
    for count in (128, 100, 1):
        got = mean(x, torch.arange(128)[:, None] < count)
        assert round_to(got, torch.float16).item() == x[0, 0].item()


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_midpoint_is_the_nearest_of_levels_around_zero(bits):
    x = randn(1, 1, 32, 32, seed=bits).half()
    back = dequantize(quantize(x, QuantSpec(bits, "token", None, "midpoint"))).double().numpy()
    top = 2**bits - 1
    for token, mine in zip(x[0, 0].double().numpy(), back[0, 0], strict=True):
        levels = np.abs(token).max() * (2 * np.arange(top + 1) / top - 1)
        nearest = np.abs(token[:, None] - levels).min(1)
        assert np.allclose(np.abs(token - mine), nearest, atol=2e-3 * np.abs(token).max())


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("axis", ["token", "channel"])
def test_unbiased_keeps_the_product_with_what_was_quantized(bits, axis):
    x = randn(1, 2, 256, 64, seed=bits) * (1 + 5 * randn(64, seed=1).abs())
    back = dequantize(quantize(x, QuantSpec(bits, axis, 64, "unbiased"))).double()
    x, back = (y.unflatten(2, (-1, 64)).double() for y in (x, back))
    dim = 3 if axis == "channel" else 4
    products, squares = (x * back).sum(dim), (x * x).sum(dim)
    # Up to 3 bits x is rounded to parts of 1/64 to 1/128 of its largest element: of standard
    # deviations that this adds to sums of squares and of products, together at most 4.
    part = 2.0 ** x.abs().amax(dim).log2().floor() / 64 if bits <= 3 else 0 * squares
    slack = 4e-3 + 4 * 3.3 * part / (12 * squares).sqrt()
    assert ((products / squares - 1).abs() < slack).all()
    assert abs(float((products / squares).mean()) - 1) < 1e-3
    shrunk = dequantize(quantize(x.flatten(2, 3).float(), QuantSpec(bits, axis, 64, "midpoint")))
    if bits == 2:  # the check can fail: an ordinary grid does not have this property
        assert not torch.allclose((x * shrunk.unflatten(2, (-1, 64))).sum(dim), squares, rtol=0.1)


@pytest.mark.parametrize(("bits", "least"), [(1, 0.3634), (2, 0.1188), (3, 0.0374), (4, 0.0115)])
def test_unbiased_codes_are_as_good_as_a_gaussians_best_uniform_grid(bits, least):
    """Max, 1960: the least error of uniform levels. Unbiased, an error D becomes D / (1 - D)."""
    x = randn(1, 4, 2048, 128)
    back = dequantize(quantize(x, QuantSpec(bits, "token", None, "unbiased")))
    error = float((back - x).square().mean() / x.square().mean())
    # A scale of its own for each token is a little better than one for the distribution.
    assert 0.85 < error / (least / (1 - least)) < (1.03 if bits < 4 else 1.25)


def test_clip_shrinks_the_range():
    x = randn(1, 1, 32, 64)
    low, high = x.amin(3), x.amax(3)
    back = dequantize(quantize(x, QuantSpec(4, "token", None, clip=0.5)))
    assert torch.allclose(back.amin(3), low / 2, atol=0.01)
    assert torch.allclose(back.amax(3), high / 2, atol=0.01)
    for grid in ("symmetric", "midpoint"):
        back = dequantize(quantize(x, QuantSpec(4, "token", None, grid, clip=0.5)))
        assert float(back.abs().amax()) <= 0.6 * float(x.abs().amax())


def test_sums_are_exact_without_what_is_small():
    """So that tensor cores find what plain torch does; only bfloat16 at few levels needs it."""
    x = (randn(4, 256, 64) * torch.exp(6 * randn(4, 256, 64, seed=1))).bfloat16().float()
    x[0, 0], x[0, 1] = 0.0, 1e-35
    x[1, :, 3], x[2, 5, 7], x[3, 9, 60] = 2.0**100, torch.inf, -torch.inf
    kept = without_small(x)
    finite = torch.where(x.isfinite(), x.abs(), 0.0).amax(-1, keepdim=True)
    assert torch.equal(kept == 0, (x.abs() < finite / 1024) | (x.abs() < 2.0**-100))
    assert torch.equal(kept[kept != 0], x[kept != 0])
    kept, x = (y.nan_to_num(1.0, 1.0, 1.0) for y in (kept, x))
    assert torch.equal(hadamard(kept, 64).double(), hadamard(kept.double(), 64))
    assert not torch.equal(hadamard(x, 64).double(), hadamard(x.double(), 64))
    spec = QuantSpec(2, "token", None, "unbiased", transform="hadamard")
    assert drops_small(spec, torch.bfloat16) and not drops_small(spec, torch.float16)
    for other in (replace(spec, bits=4), replace(spec, transform=None)):
        assert not drops_small(other, torch.bfloat16)


# ---------------------------------------------------------------- centre, norm, smoothing


def test_center_and_rotation_in_float64():
    x = randn(1, 1, 256, 32).double().numpy()[0, 0] + 20 * np.cos(np.arange(32))
    spec = QuantSpec(2, "token", None, "unbiased", transform="hadamard", center=128)
    back = dequantize(quantize(torch.tensor(x)[None, None].float(), spec))[0, 0].double().numpy()
    h = matrix(32)
    for run, mine in zip(np.split(x @ h, 2), np.split(back @ h, 2), strict=True):
        rest, got = run - run.mean(0), mine - run.mean(0)
        # Four levels on each token, symmetric about the mean, and <got, rest> = <rest, rest>.
        levels = np.sort(np.abs(got), 1)
        assert np.allclose(levels[:, -1], 3 * levels[:, 0], rtol=0.15)
        assert np.allclose((got * rest).sum(1), (rest * rest).sum(1), rtol=0.02)


def test_token_norms_take_the_size_of_tokens_out():
    size = torch.exp(3 * randn(256, 1, seed=3))
    x = randn(1, 1, 256, 64)
    plain, spec = QuantSpec(2, "channel"), QuantSpec(2, "channel", token_norm=True)
    errors = [
        float(((dequantize(quantize(x * size, s)) - x * size) / size).norm()) for s in (plain, spec)
    ]
    unit = x / x.norm(dim=-1, keepdim=True)
    expected = dequantize(quantize(unit, plain)) * x.norm(dim=-1, keepdim=True)
    assert errors[1] == pytest.approx(float((expected - x).norm()), rel=0.02)
    assert errors[1] < errors[0] / 3


def test_smooth_factors():
    x = randn(2, 48, 64)
    x[:, :, 3] *= 100
    x[:, 32:, 9] *= 1e4  # only the first 32 tokens count
    every = torch.ones(48, dtype=torch.bool)
    factor = smooth_factor(x, every, "outliers")
    assert (factor[:, [0, 9]] == 1).all()
    spread = x[:, :32].std(1)
    wanted = spread[:, 3] / (4 * spread.median(1).values)
    assert torch.equal(factor[:, 3], wanted.log2().round().exp2())
    assert torch.equal(factor, factor.log2().round().exp2())
    largest = smooth_factor(x, every, "max")
    assert torch.equal(largest, x[:, :32].abs().amax(1).log2().round().exp2())
    assert (smooth_factor(x * 0, every, "max") == 1).all()
    assert smooth_factor(x * torch.nan, every, "outliers").isfinite().all()
    half = torch.arange(48) < 16
    assert torch.equal(smooth_factor(x, half, "max"), x[:, :16].abs().amax(1).log2().round().exp2())


def test_an_outlier_channel_does_not_spread_its_error():
    x = randn(1, 1, 512, 64)
    x[..., 5] *= 100
    others = [c for c in range(64) if c != 5]
    spec = dict(transform="hadamard", center=128)
    plain, smooth = (
        dequantize(quantize(x, QuantSpec(2, "token", None, "unbiased", smooth=s, **spec))) - x
        for s in (None, "outliers")
    )
    assert smooth[..., others].norm() < plain[..., others].norm() / 2


@pytest.mark.parametrize("smooth", ["outliers", "max", "sqrt"])
def test_a_row_keeps_its_factors(smooth):
    """They come from the first tokens that are packed, and go where the row goes."""
    spec = QuantSpec(4, "token", None, smooth=smooth, transform="hadamard")
    layer = LayerCache(KVSpec(spec, spec, 32), 2, 1, 32, dtype=torch.float32)
    k = randn(2, 1, 200, 32)
    k[..., 7] *= 50
    k[1, ..., 8] *= 300
    layer.prefill(k, 2 * k)
    expected = quantize(k, spec).smooth[:, :, 0]
    both = reference.smooth_factors(layer._view(), layer.spec)
    assert torch.equal(both[0], expected)
    assert torch.equal(both[1], quantize(2 * k, spec).smooth[:, :, 0])
    layer.append(1000 * k, k)
    assert torch.equal(reference.smooth_factors(layer._view(), layer.spec)[0], expected)
    fork = layer.fork()
    layer.select([1, 0])
    assert torch.equal(reference.smooth_factors(layer._view(), layer.spec)[0], expected.flip(0))
    layer.reset()
    layer.prefill(1000 * k, k)
    found = reference.smooth_factors(layer._view(), layer.spec)[0]
    assert torch.equal(found, quantize(1000 * k, spec).smooth[:, :, 0])
    assert torch.equal(reference.smooth_factors(fork._view(), fork.spec)[0], expected)


def test_the_kernels_say_what_they_do_not_take():
    """Attention takes all of this, where a center goes with whole heads."""
    ops = pytest.importorskip("kivi.kernels.triton_ops")
    at = ((64, 64), torch.float16, torch.device("cuda"))
    for name, value in dict(
        transform="hadamard", center=32, clip=0.9, smooth="max", grid="unbiased"
    ).items():
        spec = KVSpec(None, QuantSpec(2, "token", None, **{name: value}))
        assert ops.supports(spec, *at) is None and ops.packs(spec, at[0])
    for spec in (
        QuantSpec(2, "channel", transform="hadamard"),
        QuantSpec(2, "token", None, "least_squares", transform="hadamard"),
        QuantSpec(2, "token", None, clip=0.9, center=16),
    ):
        assert not ops.packs(KVSpec(None, spec), at[0])
    assert not ops.packs(KVSpec(None, QuantSpec(2, "token", 20, clip=0.9)), (60, 60))
    for key, value, reason in (
        (None, QuantSpec(2, "token", 32, center=32), "value: the kernels take center=32 for whole"),
        (QuantSpec(2, "token", None, center=16), None, "key: the kernels take center=16 for whole"),
        (QuantSpec(2, "channel", token_norm=True), None, "key: the kernels do not take token_norm"),
    ):
        assert reason in ops.supports(KVSpec(key, value), *at)
    plain = KVSpec(QuantSpec(2, "channel"), QuantSpec(2, "token"))
    assert ops.supports(plain, *at) is None and ops.packs(plain, at[0])


@pytest.mark.compile
def test_a_compiled_step_finds_factors_and_means_on_the_device():
    """One graph from the first token on: factors of the first unit, means of each one."""
    torch._dynamo.reset()
    scheme = KVQuantizer.get("plumb", center=32, residual_length=16, sink_length=2)
    options = dict(batch_size=1, num_kv_heads=1, head_dim=32, dtype=torch.float32)
    layers = [scheme.new_layer(**options, max_length=160) for _ in range(2)]

    @torch.compile(fullgraph=True)
    def step(layer, q, k, v):
        return layer.decode(q, k, v)

    k = randn(100, 1, 1, 1, 32)
    k[..., 5] *= 100
    for i in range(100):
        q = randn(1, 2, 1, 32, seed=i)
        expected = layers[0].decode(q, k[i], k[99 - i])
        assert torch.allclose(step(layers[1], q, k[i], k[99 - i]), expected, atol=1e-4)
    assert layers[0].packed_lengths() == layers[1].packed_lengths() == [64]
    factors = [reference.smooth_factors(layer._view(), layer.spec)[0] for layer in layers]
    assert torch.equal(*factors) and factors[0][0, 0, 5] > 4
    for a, b in zip(layers[0].dequantize(), layers[1].dequantize(), strict=True):
        assert torch.allclose(a, b, atol=1e-4)
