"""The registry, and the properties of every scheme in it."""

import dataclasses
import math
import re
from dataclasses import dataclass

import pytest
import torch
from one_thread import one_thread  # noqa: F401

from kivi import KVQuantizer, KVSpec, LayerCache, PackedTensor, QuantSpec, quantizer
from kivi.testing import PROPERTIES, Case, attention, check_scheme

NAMES = KVQuantizer.available()


# ---------------------------------------------------------------- every scheme

VARIANTS = [
    dict(),
    dict(bits=4, group_size=64),
    dict(bits=1, sink_length=3, residual_length=0),
    dict(bits=3, group_size=16, residual_length=40),
    dict(key_bits=8, value_bits=2, grid="least_squares", group_size=128),
    dict(bits=2, group_size=None),
]


def variants(name: str) -> list[KVQuantizer]:
    """A scheme with its defaults and with what else it takes of VARIANTS."""
    known = KVQuantizer.options(name)
    schemes = [
        KVQuantizer.get(name, **{k: v for k, v in variant.items() if k in known})
        for variant in VARIANTS
    ]
    return list(dict.fromkeys(schemes))


@pytest.mark.parametrize("check", PROPERTIES, ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", NAMES)
def test_property(name, check):
    for scheme in variants(name):
        check(scheme, Case())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", NAMES)
def test_all_properties_in_other_dtypes(name, dtype):
    check_scheme(KVQuantizer.get(name), head_dim=32, dtype=dtype)


# ---------------------------------------------------------------- the properties can fail


class Registered:
    """Registers schemes for a test and forgets them."""

    def __enter__(self):
        self.before = dict(quantizer._SCHEMES)

    def __exit__(self, *_):
        quantizer._SCHEMES.clear()
        quantizer._SCHEMES.update(self.before)


@pytest.fixture
def registry():
    KVQuantizer.available()
    with Registered():
        yield


def broken(case: str) -> KVQuantizer:
    """A scheme that breaks one promise."""

    @dataclass(frozen=case != "not frozen", eq=case != "no eq", repr=case != "repr", kw_only=True)
    class Broken(KVQuantizer, name="broken"):
        bits: int = 2
        residual_length: int = 32

        def spec(self, layer_idx=None):
            bits = 4 if case == "forgets bits" else self.bits
            return KVSpec(
                QuantSpec(bits, "channel"), QuantSpec(bits, "token"), self.residual_length
            )

        def bits_per_element(self, head_dim=128):
            return float(self.bits) if case == "bits" else super().bits_per_element(head_dim)

        def quantize_key(self, k, **options):
            if case == "nan":
                k = torch.where(k.isfinite().all(), k, torch.nan)
            if case == "rows":
                k = k / k.abs().max()
            if case == "cache":
                k = k * 1.01
            return super().quantize_key(k, **options)

        def dequantize(self, packed):
            x = super().dequantize(packed)
            if case == "drift":
                return x * 1.3
            if case == "dtype":
                return x.float()
            return x * 100 if case == "far" else x

    if case == "not frozen":
        Broken.__hash__ = lambda self: 0
    return Broken(bits=4) if case == "forgets bits" else Broken()


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("not frozen", "bits can be changed"),
        ("no eq", "equal options, other scheme"),
        ("repr", "repr lacks bits"),
        ("bits", "says 2.0 bits per element, stores 3.0"),
        ("nan", "nan spreads"),
        ("rows", "alone is quantized differently|spreads"),
        ("cache", "the cache holds something else"),
        ("drift", "error"),
        ("dtype", "dtype or shape changed"),
        ("far", "mean error"),
    ],
)
def test_a_broken_scheme_is_found(case, message, registry):
    with pytest.raises(AssertionError, match=message):
        check_scheme(broken(case))


@pytest.mark.parametrize(
    ("method", "broken_method", "message"),
    [
        ("crop", lambda old: lambda layer, n: old(layer, max(0, n - 1)), "crop leaves"),
        ("fork", lambda old: lambda layer: layer, "fork|crop"),
        ("select", lambda old: lambda layer, rows: old(layer, rows[::-1]), "select"),
        ("reset", lambda old: lambda layer: None, "reset leaves"),
    ],
)
def test_a_broken_cache_is_found(method, broken_method, message, monkeypatch):
    monkeypatch.setattr(LayerCache, method, broken_method(getattr(LayerCache, method)))
    with pytest.raises(AssertionError, match=message):
        check_scheme(KVQuantizer.get("kivi"))


def test_the_properties_attention_is_attention():
    q, k, v = torch.randn(1, 4, 3, 8), torch.randn(1, 2, 10, 8), torch.randn(1, 2, 10, 8)
    out = attention(q, k, v, 7, 0.4)
    for query in range(3):
        for head in range(4):
            weight = (
                k[0, head // 2, : 8 + query].double() @ q[0, head, query].double() * 0.4
            ).exp()
            expected = weight @ v[0, head // 2, : 8 + query].double() / weight.sum()
            assert torch.allclose(out[0, head, query], expected)


# ---------------------------------------------------------------- the registry


def test_available():
    baselines = {"full_precision", "per_token", "per_channel", "crossed", "flexgen", "int8"}
    assert {"kivi", "kivi_symmetric"} | baselines <= set(NAMES)
    assert list(NAMES) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_options_are_what_get_takes(name):
    options = KVQuantizer.options(name)
    scheme = KVQuantizer.get(name)
    assert {f.name: getattr(scheme, f.name) for f in dataclasses.fields(scheme)} == options
    assert KVQuantizer.get(name, **options) == scheme and scheme.name == name
    assert isinstance(scheme.paper, str)


def test_unknown_schemes_list_close_matches():
    with pytest.raises(ValueError, match="unknown scheme: 'kivy'") as error:
        KVQuantizer.get("kivy")
    assert "did you mean 'kivi'" in str(error.value)
    assert all(name in str(error.value) for name in NAMES)
    with pytest.raises(ValueError, match="'zzz'") as error:
        KVQuantizer.get("zzz")
    assert "did you mean" not in str(error.value)
    assert all(name in str(error.value) for name in NAMES)
    with pytest.raises(ValueError, match="unknown scheme: 'zzz'; Allowed: "):
        KVQuantizer.options("zzz")
    with pytest.raises(ValueError, match="unknown scheme: None; Allowed: "):
        KVQuantizer.get(None)


def test_unknown_options_are_refused_with_those_that_exist():
    with pytest.raises(ValueError, match="unknown option of 'kivi': 'bit'") as error:
        KVQuantizer.get("kivi", bit=2)
    assert "did you mean 'bits'" in str(error.value)
    assert all(option in str(error.value) for option in KVQuantizer.options("kivi"))
    with pytest.raises(ValueError, match="'bits'"):
        KVQuantizer.get("full_precision", bits=2)


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("kivi", dict(bits=5), ["bits=5", "1, 2, 3, 4, 8"]),
        ("kivi", dict(bits="2"), ["bits='2'"]),
        ("kivi", dict(bits=2.0), ["bits=2.0"]),
        ("kivi", dict(key_bits=0), ["bits=0"]),
        ("kivi", dict(value_bits=0), ["bits=0"]),
        ("kivi", dict(key_bits=False), ["bits=False"]),
        ("per_token", dict(value_bits=7), ["bits=7"]),
        ("kivi", dict(group_size=48), ["group_size=48"]),
        ("per_channel", dict(group_size=8), ["group_size=8"]),
        ("kivi", dict(grid="minmax"), ["grid='minmax'", "'least_squares'"]),
        ("kivi", dict(residual_length=-1), ["residual_length=-1"]),
        ("int8", dict(sink_length=1.5), ["sink_length=1.5"]),
        ("flexgen", dict(group_size=300), ["group_size=300"]),
    ],
)
def test_values_that_are_not_allowed_are_refused_at_once(name, options, words):
    with pytest.raises(ValueError) as error:
        KVQuantizer.get(name, **options)
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("head_dim", [0, -5, 1.5, None])
def test_bits_per_element_needs_a_head(name, head_dim):
    with pytest.raises(ValueError, match=f"head_dim={head_dim} is not allowed"):
        KVQuantizer.get(name).bits_per_element(head_dim)


def test_groups_that_do_not_fit_the_head_are_refused():
    scheme = KVQuantizer.get("flexgen")
    for use in (
        lambda: scheme.quantize_key(torch.zeros(1, 1, 4, 96)),
        lambda: scheme.new_layer(batch_size=1, num_kv_heads=1, head_dim=96),
        lambda: scheme.bits_per_element(96),
    ):
        with pytest.raises(ValueError, match="group_size=64 does not divide head_dim=96"):
            use()


def test_a_name_is_given_once(registry):
    with pytest.raises(ValueError, match=r"name='kivi' is taken by kivi\.schemes\.kivi"):

        class Other(KVQuantizer, name="kivi"):
            pass

    assert type(KVQuantizer.get("kivi")).__module__ == "kivi.schemes.kivi"


def test_a_new_scheme_is_one_class(registry):
    @dataclass(frozen=True)
    class ByLayer(KVQuantizer, name="by_layer", paper="2402.02750"):
        bits: int = 2

        def spec(self, layer_idx=None):
            bits = 8 if layer_idx == 0 else self.bits
            return KVSpec(QuantSpec(bits, "channel"), None)

    assert "by_layer" in KVQuantizer.available()
    scheme = KVQuantizer.get("by_layer", bits=4)
    check_scheme(scheme)
    options = dict(batch_size=1, num_kv_heads=1, head_dim=32)
    assert scheme.new_layer(**options).spec.key.bits == 4
    assert scheme.new_layer(**options, layer_idx=0).spec.key.bits == 8
    k = torch.randn(1, 1, 40, 32)
    assert scheme.quantize_key(k, layer_idx=0).spec.bits == 8
    assert scheme.quantize_value(k, layer_idx=0).spec is None


def test_schemes_are_abstract_without_a_spec(registry):
    class Nothing(KVQuantizer, name="nothing"):
        pass

    with pytest.raises(TypeError, match="spec"):
        Nothing()


# ---------------------------------------------------------------- what the schemes are


@pytest.mark.parametrize(
    ("name", "options", "key", "value", "bits"),
    [
        ("kivi", {}, "channel", "token", 3.0),
        ("kivi", dict(group_size=64), "channel", "token", 2.5),
        ("kivi", dict(group_size=128), "channel", "token", 2.25),
        ("kivi", dict(bits=4), "channel", "token", 5.0),
        ("kivi", dict(key_bits=4, value_bits=2), "channel", "token", 4.0),
        ("per_token", {}, "token", "token", 3.0),
        ("per_channel", {}, "channel", "channel", 3.0),
        ("crossed", {}, "token", "channel", 3.0),
        ("kivi_symmetric", {}, "channel", "token", 2.75),
        ("flexgen", {}, "token", "token", 4.5),
        ("int8", {}, "token", "token", 8.125),
    ],
)
def test_axes_and_cost_are_those_of_the_papers(name, options, key, value, bits):
    scheme = KVQuantizer.get(name, **options)
    spec = scheme.spec()
    assert (spec.key.axis, spec.value.axis) == (key, value)
    assert scheme.bits_per_element(128) == bits


def test_grids_and_windows_are_those_of_the_papers():
    kivi, flexgen, int8 = (KVQuantizer.get(n).spec() for n in ("kivi", "flexgen", "int8"))
    assert kivi == KVSpec(QuantSpec(2, "channel", 32), QuantSpec(2, "token", 32), 128, 0)
    assert flexgen == KVSpec(QuantSpec(4, "token", 64), QuantSpec(4, "token", 64), 0, 0)
    assert int8.key == int8.value == QuantSpec(8, "token", None, "symmetric")
    symmetric = KVQuantizer.get("kivi_symmetric").spec()
    assert (symmetric.key.grid, symmetric.value.grid) == ("symmetric", "asymmetric")
    assert KVQuantizer.get("full_precision").spec() == KVSpec(None, None, 128, 0)


def test_full_precision_is_lossless():
    scheme = KVQuantizer.get("full_precision")
    x = torch.randn(2, 2, 700, 32)
    assert scheme.bits_per_element() == 16
    assert torch.equal(scheme.dequantize(scheme.quantize_key(x)), x)
    layer = scheme.new_layer(batch_size=2, num_kv_heads=2, head_dim=32, dtype=torch.float32)
    layer.prefill(x, -x)
    k, v = layer.dequantize()
    assert torch.equal(k, x) and torch.equal(v, -x)


def test_the_order_of_the_papers_axes():
    """Keys with outlier channels, values without: per-channel keys, per-token values are best."""
    generator = torch.Generator().manual_seed(0)
    k = torch.randn(1, 1, 512, 64, generator=generator)
    k[..., ::16] = k[..., ::16] * 4 + 10
    errors = {}
    for name in ("kivi", "per_token"):
        scheme = KVQuantizer.get(name)
        errors[name] = (scheme.dequantize(scheme.quantize_key(k)) - k).norm()
    assert errors["kivi"] < 0.6 * errors["per_token"]


def test_public_names():
    import kivi

    assert set(kivi.__all__) >= {"KVQuantizer", "KVSpec", "LayerCache", "PackedTensor", "QuantSpec"}
    assert all(hasattr(kivi, name) for name in kivi.__all__)
    assert re.fullmatch(r"\d+\.\d+\.\d+", kivi.__version__)
    assert isinstance(KVQuantizer.get("kivi").quantize_key(torch.zeros(1, 1, 1, 32)), PackedTensor)
    with pytest.raises(AttributeError, match="nothing_like_this"):
        kivi.nothing_like_this  # noqa: B018


def test_more_bits_are_closer():
    x = torch.randn(1, 2, 300, 64)
    for name in ("kivi", "per_token", "per_channel", "crossed", "kivi_symmetric"):
        errors = [math.inf]
        for bits in (1, 2, 3, 4, 8):
            scheme = KVQuantizer.get(name, bits=bits)
            errors.append(float((scheme.dequantize(scheme.quantize_key(x)) - x).norm()))
            assert errors[-1] < 0.75 * errors[-2]
