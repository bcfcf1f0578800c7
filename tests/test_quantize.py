"""quantize and dequantize: the KIVI oracle, error bounds, bytes, groups, odd inputs."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from one_thread import one_thread  # noqa: F401
from oracle_kivi import array, between, decode, encode, groups, read_codes, stored_as_published

from kivi import KVQuantizer, PackedTensor, QuantSpec
from kivi.quantize import dequantize, empty_pages, quantize, quantize_pack
from kivi.spec import BITS

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
GRIDS = ("asymmetric", "symmetric", "least_squares")
SPECS = [
    QuantSpec(bits, axis, group, grid)
    for bits in BITS
    for axis, group in (("channel", 16), ("channel", 128), ("channel", None), ("token", 16))
    for grid in GRIDS
] + [QuantSpec(2, "token", None), QuantSpec(3, "token", 64), QuantSpec(4, "channel", 32), None]

specs_ = st.sampled_from(SPECS)
dtypes_ = st.sampled_from(DTYPES)


def randn(*shape: int, dtype: torch.dtype = torch.float16, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    # Channels of different size and offset, as keys have.
    x = x * (1 + 3 * torch.rand(shape[-1], generator=generator))
    return (x + 2 * torch.randn(shape[-1], generator=generator)).to(dtype)


def heads(packed: PackedTensor):
    """For each (row, head): its codes, scales and zeros as stored, read by the oracle."""
    b, h, t, d = packed.shape
    spec, pages = packed.spec, packed.pages
    assert spec is not None and pages.scale is not None
    n = pages.words.shape[0] // b
    offset = 0.5 if spec.bits == 1 else 2.0 ** (spec.bits - 1)
    for row in range(b):
        for head in range(h):
            mine = slice(row * n, (row + 1) * n)
            words = pages.words[mine, head].numpy()
            codes = np.concatenate([read_codes(w, spec.bits) for w in words])[:t]
            scale = array(pages.scale[mine, head].flatten(0, 1))
            zero = (
                -offset * scale
                if pages.zero is None
                else array(pages.zero[mine, head].flatten(0, 1))
            )
            group = spec.group(d)
            used = -(-t // group) if spec.axis == "channel" else t
            yield row, head, codes, scale[:used], zero[:used]


# ---------------------------------------------------------------- the oracle


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("axis", "group"), [("channel", 32), ("token", 32), ("channel", 128)])
def test_kivi_oracle(axis, group, bits, dtype):
    """Scales, zeros, codes and dequantized values are the paper's; an odd T ends in a short group.

    Where float32 arithmetic may fall to either side of a rounding tie, both codes are right.
    """
    scheme = KVQuantizer.get("kivi", bits=bits, group_size=group)
    assert scheme.spec().key == QuantSpec(bits, "channel", group)
    assert scheme.spec().value == QuantSpec(bits, "token", group)
    x = randn(2, 1, 150, 64, dtype=dtype)
    packed = scheme.quantize_key(x) if axis == "channel" else scheme.quantize_value(x)
    back, group = array(scheme.dequantize(packed)), min(group, 64) if axis == "token" else group
    meta = torch.bfloat16 if dtype == torch.bfloat16 else torch.float16
    ties = 0
    for row, head, codes, scale, zero in heads(packed):
        mine = array(x[row, head])
        assert stored_as_published(mine, bits, axis, group, scale, zero, meta)
        expected = encode(mine, bits, axis, group, scale, zero)
        assert ((expected.low <= codes) & (codes <= expected.high)).all()
        ties += int((expected.low != expected.high).sum())
        exact = decode(codes, axis, group, scale, zero)
        slack = 2.0**-23 * (np.abs(exact) + np.abs(exact - codes.mean()))
        assert dtype == torch.float32 or between(back[row, head], exact, slack, dtype)
        assert np.allclose(
            back[row, head], exact, rtol=2**-7 if dtype == torch.bfloat16 else 2**-10
        )
    assert ties <= 0.02 * x.numel()  # else the comparison of codes would say little


@given(specs_, dtypes_, st.sampled_from([1, 31, 64, 130, 512, 600]), st.integers(0, 2**32))
def test_codes_are_computed_with_the_stored_metadata(spec, dtype, tokens, seed):
    if spec is None:
        return
    x = randn(1, 1, tokens, 16, dtype=dtype, seed=seed)
    for row, head, codes, scale, zero in heads(quantize(x, spec)):
        expected = encode(array(x[row, head]), spec.bits, spec.axis, spec.group(16), scale, zero)
        assert ((expected.low <= codes) & (codes <= expected.high)).all()


# ---------------------------------------------------------------- error


@given(specs_, dtypes_, st.integers(1, 70), st.integers(0, 2**32))
def test_error_is_at_most_half_a_step_and_rounding(spec, dtype, tokens, seed):
    x = randn(1, 2, tokens, 16, dtype=dtype, seed=seed)
    packed = quantize(x, spec)
    back = array(dequantize(packed))
    if spec is None:
        assert torch.equal(dequantize(packed), x)
        return
    eps, bounds = 2.0**-7 if dtype == torch.bfloat16 else 2.0**-10, 0.0
    for row, head, _, scale, zero in heads(packed):
        mine = array(x[row, head])
        group = spec.group(16)
        for index, s, z in zip(
            groups(*mine.shape, spec.axis, group), scale.flat, zero.flat, strict=True
        ):
            error = np.abs(mine[index] - back[row, head][index])
            # The far end of the grid moves with the scale's rounding, all of it with the zero's.
            rounding = eps / 2 * ((2**spec.bits - 1) * s + 2 * np.abs(mine[index]) + abs(z))
            bounds += (rounding**2).sum()
            assert spec.grid == "least_squares" or (error <= s / 2 + rounding + 1e-6).all()
    if spec.grid == "least_squares":  # bounded in the mean, by what it starts from
        plain = dequantize(quantize(x, replace(spec, grid="asymmetric")))
        bound = 1.02 * (x - plain).double().norm() + bounds**0.5 + 1e-6
        assert (x - dequantize(packed)).double().norm() <= bound


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_requantizing_what_was_dequantized_is_stable(spec, dtype):
    """A second round changes nothing beyond the 16-bit rounding of values and scales."""
    x = randn(1, 2, 600, 16, dtype=dtype)
    once = dequantize(quantize(x, spec))
    twice = dequantize(quantize(once, spec))
    if spec is None or spec.grid != "least_squares":
        eps = torch.finfo(torch.bfloat16 if dtype == torch.bfloat16 else torch.float16).eps
        top = 0 if spec is None else 2**spec.bits - 1
        assert (twice - once).abs().max() <= 2 * eps * once.abs().max() * (spec is not None)
        if top and top * eps < 0.1:  # far from where rounding could reach another code
            assert torch.equal(quantize(twice, spec).pages.words, quantize(once, spec).pages.words)
    else:  # its codes may leave an end of the range free, which a second fit then uses
        assert (twice - once).double().square().mean() <= (once - x).double().square().mean()


# ---------------------------------------------------------------- bytes


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("pages", [1, 3])
def test_bytes_are_those_that_bits_per_element_says(spec, pages):
    x = randn(2, 3, pages * 512, 64)
    packed = quantize(x, spec)
    bits = 16 if spec is None else spec.bits_per_element(64)
    assert packed.nbytes == bits * x.numel() / 8
    held = [t for t in packed.pages if t is not None]
    assert packed.nbytes == sum(t.untyped_storage().nbytes() for t in held)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("axis", ["channel", "token"])
def test_metadata_is_stored_in_16_bit(dtype, axis):
    pages = quantize(randn(1, 1, 40, 16, dtype=dtype), QuantSpec(2, axis, 16)).pages
    expected = torch.bfloat16 if dtype == torch.bfloat16 else torch.float16
    assert pages.scale.dtype == pages.zero.dtype == expected
    assert pages.words.dtype == torch.int16
    assert (
        quantize(randn(1, 1, 40, 16, dtype=dtype), QuantSpec(2, axis, 16, "symmetric")).pages.zero
        is None
    )


# ---------------------------------------------------------------- shapes


@pytest.mark.parametrize("tokens", [0, 1, 31, 33, 511, 512, 513, 1100])
@pytest.mark.parametrize("spec", [QuantSpec(3, "channel", 32), QuantSpec(3, "token", 16), None])
def test_any_number_of_tokens(tokens, spec):
    x = randn(2, 2, tokens, 16)
    packed = quantize(x, spec)
    back = dequantize(packed)
    assert packed.shape == tuple(back.shape) == tuple(x.shape) and back.dtype == x.dtype
    assert packed.pages.words.shape[0] == 2 * max(1, -(-tokens // 512))
    # A token's groups do not depend on how much comes after its own group.
    whole = tokens // 32 * 32
    assert torch.equal(dequantize(quantize(x[:, :, :whole], spec)), back[:, :, :whole])
    if tokens:
        assert (back - x).abs().max() < 4


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_the_rest_of_a_page_is_zero(spec):
    """Whatever the tokens before it are: equal tensors have equal pages."""
    pages = quantize(randn(1, 1, 5, 16) + 7, spec).pages
    if spec is None:
        assert not pages.words[:, :, 5:].any()
    else:
        assert not read_codes(pages.words[0, 0].numpy(), spec.bits)[5:].any()


@pytest.mark.parametrize("axis", ["channel", "token"])
def test_an_incomplete_group_is_fitted_to_its_own_tokens(axis):
    """Padding to a whole group or page would drag zeros into its range."""
    x = (100 + torch.rand(1, 1, 5, 16)).half()
    spec = QuantSpec(4, axis, 32)
    assert (dequantize(quantize(x, spec)) - x).abs().max() <= 1 / 15


@pytest.mark.parametrize("spec", [s for s in SPECS if s and s.bits == 3] + [None], ids=str)
def test_strides_do_not_matter(spec):
    x = randn(2, 70, 3, 32).transpose(1, 2)[..., ::2]
    assert not x.is_contiguous()
    one, two = quantize(x, spec), quantize(x.contiguous(), spec)
    for a, b in zip(one.pages, two.pages, strict=True):
        assert a is b is None or torch.equal(a, b)
    expanded = x[:, :1].expand(-1, 3, -1, -1)
    assert torch.equal(
        dequantize(quantize(expanded, spec)), dequantize(quantize(expanded.clone(), spec))
    )


# ---------------------------------------------------------------- independence


def same_groups(a: torch.Tensor, b: torch.Tensor, spec: QuantSpec) -> torch.Tensor:
    """For every group of `[B, H, T, D]`: whether both tensors agree in all of it."""
    same = a == b
    if spec.axis == "channel":
        width = spec.group(a.shape[-1])
        return torch.stack([x.all(2) for x in same.split(width, dim=2)], 2)
    return same.unflatten(-1, (-1, spec.group(a.shape[-1]))).all(-1)


@pytest.mark.parametrize("value", [1e4, math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("spec", [s for s in SPECS if s and s.bits in (2, 3)], ids=str)
def test_a_change_stays_in_its_group(spec, value):
    x = randn(2, 2, 300, 32)
    before = dequantize(quantize(x, spec))
    changed = x.clone()
    changed[1, 0, 37, 5] = value
    after = dequantize(quantize(changed, spec))
    other = ~same_groups(before, after, spec)
    if spec.axis == "channel":
        other[1, 0, 37 // spec.group(32), 5] = False
    else:
        other[1, 0, 37, 5 // spec.group(32)] = False
    assert not other.any()
    if not math.isfinite(value):
        # The rest of its own group is as if the element were not there.
        left_out = x.clone()
        neighbour = (37 ^ 1, 5) if spec.axis == "channel" else (37, 4)
        left_out[1, 0, 37, 5] = x[1, 0][neighbour]
        rest = dequantize(quantize(left_out, spec))
        rest[1, 0, 37, 5] = after[1, 0, 37, 5] = 0
        if spec.grid != "least_squares":
            assert torch.equal(rest, after)
        assert after.isfinite().all()


@pytest.mark.parametrize("grid", ["asymmetric", "least_squares"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_saturates(grid, value):
    """To an end of its group's range: still finite, and nobody else's business."""
    for axis in ("channel", "token"):
        x = randn(1, 1, 32, 16)
        x[0, 0, 3, 3] = value
        back = dequantize(quantize(x, QuantSpec(2, axis, 16, grid)))
        group = x[0, 0, :16, 3] if axis == "channel" else x[0, 0, 3]
        group = group[group.isfinite()]
        expected = group.max() if value == math.inf else group.min()
        assert back.isfinite().all()
        assert (back[0, 0, 3, 3] - expected).abs() <= (0.01 if grid == "asymmetric" else 0.5) * 16


@pytest.mark.parametrize("spec", [s for s in SPECS if s], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_finite_values_come_back_finite(spec, dtype):
    """Up to the largest value of the dtype, the far end of a grid rounded up included."""
    x = randn(1, 1, 128, 32, dtype=torch.float32)
    # bfloat16 and float32 values past 2^100 are no keys; float16's limit is near.
    x = x / x.abs().max() * min(torch.finfo(dtype).max, 2.0**100)
    back = dequantize(quantize(x.to(dtype), spec))
    assert back.isfinite().all()


@pytest.mark.parametrize("grid", GRIDS)
def test_an_infinity_beside_large_values_comes_back_finite(grid):
    x = randn(1, 1, 32, 16)
    x = x / x.abs().max() * 5e4
    x[0, 0, 3, 3], x[0, 0, 4, 4] = -math.inf, math.inf
    for axis in ("channel", "token"):
        assert dequantize(quantize(x, QuantSpec(2, axis, 16, grid))).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("spec", [s for s in SPECS if s and s.grid != "symmetric"], ids=str)
def test_constant_groups_are_exact(spec, dtype):
    along = 2 if spec.axis == "channel" else 3
    x = randn(1, 2, 128, 32, dtype=dtype).narrow(along, 0, 1).expand(-1, -1, 128, 32)
    assert torch.equal(dequantize(quantize(x, spec)), x)


def test_float32_beyond_half_precision_saturates():
    x = torch.tensor([[-1e6, -3e4, 0.0, 1e6] * 4]).view(1, 1, 1, 16).expand(-1, -1, 16, -1)
    back = dequantize(quantize(x, QuantSpec(2, "token", 16)))[0, 0, 0, :4]
    assert back.isfinite().all() and (back.diff() >= 0).all() and back[0] == -65504


# ---------------------------------------------------------------- check_finite, refusals


@pytest.mark.parametrize("name", ["k", "v"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_check_finite_refuses_and_names_the_argument(name, value):
    scheme = KVQuantizer.get("kivi")
    quantize_it = scheme.quantize_key if name == "k" else scheme.quantize_value
    x = randn(1, 1, 40, 16)
    quantize_it(x, check_finite=True)
    x[0, 0, 7, 3] = value
    with pytest.raises(ValueError, match=rf"^{name} has 1 NaN or infinite elements of 640"):
        quantize_it(x, check_finite=True)
    quantize_it(x)


@pytest.mark.parametrize(
    ("x", "words"),
    [
        (torch.zeros(1, 32, 16), ["x", "(1, 32, 16)", "[B, Hkv, T, D]"]),
        (torch.zeros(1, 1, 1, 32, 16), ["x", "[B, Hkv, T, D]"]),
        ([[1.0]], ["x", "list", "[B, Hkv, T, D]"]),
        (torch.zeros(1, 1, 32, 0), ["x has shape (1, 1, 32, 0)", "only T may be 0"]),
        (torch.zeros(0, 1, 32, 16), ["x has shape (0, 1, 32, 16)", "only T may be 0"]),
        (torch.zeros(1, 0, 32, 16), ["x has shape (1, 0, 32, 16)", "only T may be 0"]),
        (
            torch.zeros(1, 1, 32, 16, dtype=torch.float64),
            ["x.dtype=torch.float64", "torch.float16"],
        ),
        (torch.zeros(1, 1, 32, 16, dtype=torch.int8), ["x.dtype=torch.int8", "torch.bfloat16"]),
        (torch.zeros(1, 1, 32, 40), ["group_size=32", "head_dim=40"]),
    ],
)
def test_refusals_name_the_argument_and_what_is_allowed(x, words):
    with pytest.raises(ValueError) as error:
        quantize(x, QuantSpec(2, "token", 32))
    for word in words:
        assert word in str(error.value)


def test_quantizing_keeps_no_graph():
    k = torch.randn(1, 1, 32, 16, requires_grad=True)
    packed = quantize(k * 1, QuantSpec(2, "channel"))
    assert not any(t is not None and t.requires_grad for t in packed.pages)


# ---------------------------------------------------------------- pages


@pytest.mark.parametrize("spec", [s for s in SPECS if s is None or s.group(32) <= 64], ids=str)
def test_units_written_one_by_one_are_the_page_written_at_once(spec):
    """And each write changes its own tokens only, whatever lay in the page."""
    x = randn(1, 2, 512, 32)
    whole = quantize(x, spec).pages
    pages = empty_pages(spec, 3, 2, 32, x.dtype)
    for tensor in pages:
        if tensor is not None:
            tensor.view(torch.int16).random_(-(2**15), 2**15 - 1)
    before = [None if t is None else t.clone() for t in pages]
    for first in (64 * torch.randperm(8)).tolist():
        run = x[:, :, first : first + 64]
        quantize_pack(pages, spec, run, torch.tensor([1]), torch.tensor([first]))
    for old, new, expected in zip(before, pages, whole, strict=True):
        if new is not None:
            old, new, expected = (t.view(torch.int16) for t in (old, new, expected))
            assert torch.equal(new[1], expected[0])
            assert torch.equal(new[[0, 2]], old[[0, 2]])


def test_valid_tokens_alone_enter_the_statistics_of_a_run():
    spec = QuantSpec(2, "channel", 32)
    x = randn(2, 1, 32, 16)
    x[0, :, 20:], x[1, :, :5] = math.nan, 1e4
    valid = torch.ones(2, 1, 32, dtype=torch.bool)
    valid[0, :, 20:], valid[1, :, :5] = False, False
    pages = empty_pages(spec, 2, 1, 16, x.dtype)
    quantize_pack(pages, spec, x, torch.tensor([0, 1]), torch.tensor([0, 0]), valid)
    for row in range(2):
        mine = x[row, 0][valid[row, 0]]
        assert torch.equal(pages.zero[row, 0, 0], mine.amin(0))
        assert torch.allclose(pages.scale[row, 0, 0], (mine.amax(0) - mine.amin(0)) / 3, rtol=2e-3)
