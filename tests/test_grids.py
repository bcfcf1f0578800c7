"""Grids: error bounds, constant groups, refits, and what overflow, NaN and infinities do."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from one_thread import one_thread  # noqa: F401

from kivi.grids import encode, fit, metadata_dtype, symmetric_offset
from kivi.spec import BITS

GRIDS = ("asymmetric", "symmetric", "least_squares")
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
EVERY = torch.ones(1, dtype=torch.bool)

bits_ = st.sampled_from(BITS)
grids_ = st.sampled_from(GRIDS)
dtypes_ = st.sampled_from(DTYPES)


@st.composite
def groups(draw, least: float = 1e-3, most: float = 1e4):
    """Some groups `[n, G]` of one dtype, of kinds that break quantizers."""
    dtype = draw(dtypes_)
    seed, size = draw(st.integers(0, 2**32)), draw(st.sampled_from([1, 2, 16, 32, 48, 128]))
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4, size, generator=generator)
    kind = draw(
        st.sampled_from(["plain", "offset", "outlier", "levels", "two", "constant", "one off"])
    )
    if kind == "offset":
        x = x * 1e-2 + 5
    elif kind == "outlier":
        x[:, 0] *= 1e3
    elif kind == "levels":  # many ties
        x = (x * 2).round() / 2
    elif kind == "two":
        x = x.sign()
    elif kind == "constant":
        x = x[:, :1].expand_as(x)
    elif kind == "one off":
        x = torch.where(torch.arange(size) == 0, x * 2, 1.0)
    factor = 10 ** draw(st.floats(math.log10(least), math.log10(most / 1e3)))
    return (x * factor).to(dtype), dtype


def quantized(x: torch.Tensor, bits: int, grid: str, dtype: torch.dtype):
    """Codes, scale and zero of groups, and what they stand for, in float64."""
    scale, zero = fit(x.float(), EVERY, bits, grid, metadata_dtype(dtype))
    codes = encode(x.float(), scale, zero, bits)
    return codes, scale, zero, codes.double() * scale.double() + zero.double()


def rounding(x: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, bits: int) -> torch.Tensor:
    """What rounding scale and zero to 16 bit costs at most, a group's far end included."""
    eps = torch.finfo(metadata_dtype(x.dtype)).eps
    tiny = torch.finfo(metadata_dtype(x.dtype)).smallest_normal * eps
    exact_zero = 0.0 if x.dtype != torch.float32 else eps / 2
    ends = (2**bits - 1) * (scale.double() * eps / 2 + tiny / 2)
    return ends + zero.double().abs() * exact_zero + x.double().abs() * 2**-21 + tiny / 2


# ---------------------------------------------------------------- metadata


def test_metadata_is_16_bit():
    assert metadata_dtype(torch.bfloat16) == torch.bfloat16
    assert metadata_dtype(torch.float16) == metadata_dtype(torch.float32) == torch.float16


@given(groups(), bits_, grids_)
def test_scale_and_zero_can_be_stored(data, bits, grid):
    x, dtype = data
    meta = metadata_dtype(dtype)
    _, scale, zero, _ = quantized(x, bits, grid, dtype)
    assert scale.shape == zero.shape == (4, 1) and scale.dtype == torch.float32
    assert torch.equal(scale.to(meta).float(), scale)
    if grid == "symmetric":
        assert torch.equal(zero, -symmetric_offset(bits) * scale)
    else:
        assert torch.equal(zero.to(meta).float(), zero)


@pytest.mark.parametrize("meta", [torch.float16, torch.bfloat16])
def test_zero_is_rounded_as_torch_rounds(meta):
    """The spelled-out rounding is the hardware's for all magnitudes, but it saturates."""
    low = -25 if meta == torch.float16 else -110
    x = torch.randn(20000) * 2.0 ** torch.randint(low, 17, (20000,))
    ties = (torch.arange(1, 2**12) * 2.0 - 1) * 2.0**-11  # halfway between neighbours in 16 bit
    x = torch.cat([x, ties, -ties, torch.tensor([0.0, 65504, 65519.9, 65520, 7e4, -1e9])])
    _, zero = fit(x[:, None], EVERY, 2, "asymmetric", meta)
    largest = torch.finfo(meta).max
    assert torch.equal(zero[:, 0], x.to(meta).float().clamp(-largest, largest))


@given(groups(), bits_, grids_)
def test_codes_are_whole_and_in_range(data, bits, grid):
    codes, _, _, _ = quantized(data[0], bits, grid, data[1])
    assert torch.equal(codes, codes.round())
    assert codes.min() >= 0 and codes.max() <= 2**bits - 1


def test_symmetric_levels():
    """One bit has no level at 0; more bits have one, and as many steps on either side of it."""
    x = torch.tensor([[-3.0, -1.0, 0.0, 1.0, 3.0]])
    for bits, levels in ((1, [-3.0, 3.0]), (2, [-3.0, 0.0, 3.0])):
        _, _, _, back = quantized(x, bits, "symmetric", torch.float32)
        assert back.unique().tolist() == levels
    for bits in BITS:
        _, _, _, back = quantized(x, bits, "symmetric", torch.float32)
        assert torch.equal(back[0, 4], -back[0, 0])
        if bits > 1:
            assert back[0, 2] == 0


def test_asymmetric_is_equation_1():
    x = torch.tensor([[-1.0, 0.5, 1.25, 2.0]])
    scale, zero = fit(x, EVERY, 2, "asymmetric", torch.float16)
    assert (scale.item(), zero.item()) == (1.0, -1.0)
    # 1.5 lies halfway and goes down.
    assert encode(x, scale, zero, 2).tolist() == [[0.0, 1.0, 2.0, 3.0]]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_ties_go_down(bits, dtype):
    """As documented, so that every implementation has the same codes."""
    meta = metadata_dtype(dtype)
    scale = (torch.rand(200, 1) * 3).to(meta).float()
    zero = (torch.randint(-20, 20, (200, 1)) * scale).to(meta).float()
    halves = torch.arange(2**bits - 1) + 0.5
    x = zero.double() + halves * scale.double()
    exact = x.float().double() == x  # only what float32 can hold is a tie
    assert exact.float().mean() > 0.9
    assert torch.equal(
        encode(x.float(), scale, zero, bits)[exact], (halves - 0.5).expand_as(x)[exact]
    )


# ---------------------------------------------------------------- error bounds


@given(groups(), bits_, st.sampled_from(["asymmetric", "symmetric"]))
def test_error_is_at_most_half_a_step(data, bits, grid):
    x, dtype = data
    _, scale, zero, back = quantized(x, bits, grid, dtype)
    bound = scale.double() / 2 + rounding(x, scale, zero, bits)
    assert ((x.double() - back).abs() <= bound).all()


@given(groups(), bits_, grids_)
def test_codes_are_the_nearest_ones(data, bits, grid):
    """Given scale and zero, no other code would be closer (ties and float32 rounding aside)."""
    x, dtype = data
    _, scale, zero, back = quantized(x, bits, grid, dtype)
    levels = torch.arange(2**bits).double() * scale.double() + zero.double()
    best = (x.double().unsqueeze(-1) - levels.unsqueeze(1)).abs().amin(-1)
    slack = 2**-21 * (x.double().abs() + zero.abs() + scale * 2**bits)
    assert ((x.double() - back).abs() <= best + slack).all()


@given(groups(), bits_)
def test_least_squares_is_never_worse_than_min_max(data, bits):
    x, dtype = data
    _, _, _, plain = quantized(x, bits, "asymmetric", dtype)
    _, scale, zero, refit = quantized(x, bits, "least_squares", dtype)
    eps = torch.finfo(metadata_dtype(dtype)).eps
    tiny = torch.finfo(metadata_dtype(dtype)).smallest_normal * eps
    # Rounding the refitted scale and zero moves each element by at most this much.
    moved = (zero.double().abs() + (2**bits - 1) * scale.double()) * eps / 2 + tiny * 2**bits
    moved = moved + x.double().abs().amax(-1, keepdim=True) * 2**-18
    error, before = (((x.double() - y) ** 2).sum(-1, keepdim=True).sqrt() for y in (refit, plain))
    assert (error <= before + moved * math.sqrt(x.shape[1])).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_least_squares_gains_on_normal_data(dtype, bits):
    x = torch.randn(500, 32).to(dtype)
    plain, refit = (
        ((x.double() - quantized(x, bits, grid, dtype)[3]) ** 2).mean()
        for grid in ("asymmetric", "least_squares")
    )
    assert refit < 0.95 * plain


@pytest.mark.parametrize("bits", BITS)
def test_least_squares_is_the_least_squares_fit_to_the_codes(bits):
    """Against the normal equations in float64."""
    x = torch.randn(50, 32)
    scale, zero = fit(x, EVERY, bits, "asymmetric", torch.float16)
    codes = encode(x, scale, zero, bits).double()
    ones = torch.stack([codes, torch.ones_like(codes)], -1)
    solution = torch.linalg.lstsq(ones, x.double().unsqueeze(-1)).solution[:, :, 0]
    scale, zero = fit(x, EVERY, bits, "least_squares", torch.float16)
    assert torch.allclose(scale[:, 0].double(), solution[:, 0], rtol=2**-10, atol=2**-20)
    assert torch.allclose(zero[:, 0].double(), solution[:, 1], rtol=2**-10, atol=2**-12)


@pytest.mark.parametrize("bits", BITS)
def test_past_what_16_bit_can_hold_there_is_nothing_to_refit(bits):
    x = torch.randn(20, 32) * 1e5
    plain, refit = (fit(x, EVERY, bits, g, torch.float16) for g in ("asymmetric", "least_squares"))
    assert torch.equal(plain[0], refit[0]) and torch.equal(plain[1], refit[1])


# ---------------------------------------------------------------- constant groups


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("grid", ["asymmetric", "least_squares"])
def test_every_16_bit_constant_is_exact(dtype, bits, grid):
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    # Below float32's normal range (2^-126) a bfloat16 has no bits left; see kivi.grids.
    x = x[x.isfinite() & ((x.abs() >= 2.0**-119) | (x == 0) | (dtype == torch.float16))]
    x = x[:, None].expand(-1, 2)
    codes, scale, _, back = quantized(x, bits, grid, dtype)
    assert torch.equal(back.to(dtype), x)
    assert scale.abs().max() == 0 and codes.abs().max() == 0


@given(st.floats(-(2.0**14), 2.0**14, width=32), bits_, grids_, st.sampled_from([1, 16, 512]))
def test_float32_constants_are_as_exact_as_16_bit_can_be(value, bits, grid, size):
    x = torch.full((1, size), value)
    _, _, _, back = quantized(x, bits, grid, torch.float32)
    tiny = 2.0**-24 * 2 ** (bits - 1)
    assert (back - x.double()).abs().max() <= abs(value) * 2**-11 + tiny
    assert (back == back[0, 0]).all()


@pytest.mark.parametrize("bits", BITS)
def test_symmetric_constants(bits):
    x = torch.tensor([[0.0] * 16, [2.5] * 16, [-2.5] * 16], dtype=torch.float16)
    _, _, _, back = quantized(x, bits, "symmetric", torch.float16)
    assert (back[0] == 0).all()
    assert torch.allclose(back, x.double(), rtol=2**-10)


# ---------------------------------------------------------------- range


@given(st.lists(st.floats(width=16, allow_nan=False, allow_infinity=False), min_size=2, max_size=8))
def test_any_half_precision_group(values):
    """Denormals, zeros of both signs and values at the limit, as long as a scale can span them."""
    x = torch.tensor([values], dtype=torch.float16)
    for bits in BITS:
        codes, scale, zero, back = quantized(x, bits, "asymmetric", torch.float16)
        assert back.isfinite().all()
        if (x.double().max() - x.double().min()) / (2**bits - 1) <= 65504:
            bound = scale.double() / 2 + rounding(x, scale, zero, bits)
            assert ((x.double() - back).abs() <= bound).all()
        order = x.float().argsort(-1)
        assert (codes.gather(1, order).diff() >= 0).all()


@given(
    st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=2, max_size=8),
    bits_,
    grids_,
    dtypes_,
)
def test_huge_values_saturate_and_stay_in_order(values, bits, grid, dtype):
    x = torch.tensor([values]).to(dtype)
    x = x[:, x[0].isfinite()]
    if x.shape[1] == 0:
        return
    codes, scale, zero, _ = quantized(x, bits, grid, dtype)
    assert scale.isfinite().all() and zero.isfinite().all() and (scale >= 0).all()
    order = x.float().argsort(-1)
    assert (codes.gather(1, order).diff() >= 0).all()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("grid", ["asymmetric", "least_squares"])
def test_an_outlier_costs_what_its_own_size_says(bits, grid):
    """A huge outlier makes the step huge (nobody can help that) but bounds the error by it."""
    x = torch.randn(1, 32).to(torch.float16)
    x[0, 7] = 3e4
    _, scale, _, back = quantized(x, bits, grid, torch.float16)
    assert abs(back[0, 7] - 3e4) <= 3e4 * 2**-10 + scale.item() / 2
    assert (
        (back - x.double()).abs() <= scale.double() * (0.5 if grid == "asymmetric" else 1)
    ).all()


@pytest.mark.parametrize("bits", BITS)
def test_subnormal_groups(bits):
    x = torch.arange(16, dtype=torch.float32)[None] * 2.0**-24
    _, scale, _, back = quantized(x.half(), bits, "asymmetric", torch.float16)
    assert scale >= 2.0**-24
    assert ((back - x).abs() <= scale / 2 + (2**bits - 1) * 2.0**-25).all()


# ---------------------------------------------------------------- what is not finite or not valid


@given(groups(), bits_, grids_, st.data())
def test_nan_and_infinities_do_not_change_the_group(data, bits, grid, draw):
    """Scale, zero and the others' codes are as if the bad elements were not there."""
    x, dtype = data
    bad = torch.tensor(draw.draw(st.lists(st.booleans(), min_size=x.shape[1], max_size=x.shape[1])))
    if bad.all():
        bad[0] = False
    value = draw.draw(st.sampled_from([math.nan, math.inf, -math.inf]))
    meta = metadata_dtype(dtype)
    dirty = torch.where(bad, value, x.float())
    scale, zero = fit(dirty, EVERY, bits, grid, meta)
    alone = fit(x[:, ~bad].float(), EVERY, bits, grid, meta)
    if grid == "least_squares":  # sums of another length round otherwise
        top = (2**bits - 1) * alone[0] + alone[1].abs()
        assert ((scale - alone[0]).abs() * (2**bits - 1) <= top * 2**-6 + 1e-4 * top).all()
    else:
        assert torch.equal(scale, alone[0]) and torch.equal(zero, alone[1])
    codes = encode(dirty, scale, zero, bits)
    assert torch.equal(codes[:, ~bad], encode(x[:, ~bad].float(), scale, zero, bits))
    at = codes[:, bad]
    end = torch.where(scale > 0, float(2**bits - 1 if value == math.inf else 0), 0.0)
    assert torch.equal(at, end.expand_as(at))


@pytest.mark.parametrize("grid", GRIDS)
def test_a_group_of_nothing_but_nan_is_zero(grid):
    x = torch.full((1, 16), math.nan)
    _, scale, _, back = quantized(x, 2, grid, torch.float16)
    assert (back == 0).all() and scale == 0


@given(groups(), bits_, grids_, st.integers(0, 2**16))
def test_only_valid_elements_count(data, bits, grid, seed):
    x, dtype = data
    generator = torch.Generator().manual_seed(seed)
    valid = torch.rand(x.shape[1], generator=generator) < 0.5
    valid[0] = True
    garbage = torch.randn(x.shape, generator=generator) * 1e3
    one, two = (
        fit(torch.where(valid, x.float(), other), valid, bits, grid, metadata_dtype(dtype))
        for other in (garbage, torch.full_like(garbage, math.nan))
    )
    assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1])
    if grid != "least_squares":
        alone = fit(x[:, valid].float(), EVERY, bits, grid, metadata_dtype(dtype))
        assert torch.equal(one[0], alone[0]) and torch.equal(one[1], alone[1])


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("bits", BITS)
def test_groups_are_independent(grid, bits):
    x = torch.randn(6, 5, 32)
    scale, zero = fit(x, EVERY, bits, grid, torch.float16)
    changed = x.clone()
    changed[2, 3] *= 100
    again = fit(changed, EVERY, bits, grid, torch.float16)
    for old, new in ((scale, again[0]), (zero, again[1])):
        same = old == new
        assert not same[2, 3].all()
        same[2, 3] = True
        assert same.all()
