"""What a spec accepts, what it refuses and with which words, and what it says about its cost."""

import dataclasses
import re
from fractions import Fraction
from pathlib import Path

import pytest

import kivi.spec
from kivi import KVSpec, QuantSpec
from kivi.spec import BITS, PAGE_TOKENS, TILE_ROWS, check_choice, check_count

GRIDS = ("asymmetric", "symmetric", "least_squares")


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("axis", ["channel", "token"])
@pytest.mark.parametrize("grid", GRIDS)
def test_all_combinations_are_allowed(bits, axis, grid):
    spec = QuantSpec(bits, axis, 64, grid)
    assert (spec.bits, spec.axis, spec.group_size, spec.grid) == (bits, axis, 64, grid)
    assert spec.has_zero == (grid != "symmetric")


def test_bits_are_those_of_the_issue():
    assert BITS == (1, 2, 3, 4, 8)
    assert (PAGE_TOKENS, TILE_ROWS) == (512, 32)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (dict(bits=5), ["bits=5", "1, 2, 3, 4, 8"]),
        (dict(bits=0), ["bits=0", "1, 2, 3, 4, 8"]),
        (dict(bits=16), ["bits=16"]),
        (dict(bits=True), ["bits=True"]),
        (dict(bits="2"), ["bits='2'"]),
        (dict(bits=None), ["bits=None"]),
        (dict(axis="row"), ["axis='row'", "'channel'", "'token'"]),
        (dict(grid="minmax"), ["grid='minmax'", *map(repr, GRIDS)]),
        (dict(group_size=48), ["group_size=48", "16, 32, 64, 128, None"]),
        (dict(group_size=8), ["group_size=8"]),
        (dict(group_size=256), ["group_size=256"]),
        (dict(group_size=0), ["group_size=0"]),
        (dict(group_size=True), ["group_size=True"]),
        (dict(axis="token", group_size=8), ["group_size=8", "16"]),
        (dict(axis="token", group_size=129), ["group_size=129", "16 to 128"]),
        (dict(axis="token", group_size=0), ["group_size=0"]),
        (dict(axis="token", group_size=-32), ["group_size=-32"]),
        (dict(axis="token", group_size=32.0), ["group_size=32.0"]),
    ],
)
def test_quant_spec_refuses(arguments, words):
    with pytest.raises(ValueError) as error:
        QuantSpec(**(dict(bits=2, axis="channel") | arguments))
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("arguments", [dict(bits=2.0), dict(group_size=32.0)])
def test_a_float_that_equals_an_allowed_int_is_refused(arguments):
    # It would be taken here and break the first allocation.
    with pytest.raises(ValueError, match=re.escape("=".join(map(str, *arguments.items())))):
        QuantSpec(**(dict(bits=2, axis="channel") | arguments))


@pytest.mark.parametrize("name", ["residual_length", "sink_length"])
@pytest.mark.parametrize("value", [-1, 1.5, "4", None, True])
def test_kv_spec_refuses(name, value):
    with pytest.raises(ValueError, match=re.escape(f"{name}={value!r}")):
        KVSpec(None, None, **{name: value})


@pytest.mark.parametrize("size", [16, 32, 64, 128, None])
@pytest.mark.parametrize("head_dim", [16, 64, 80, 128])
def test_channel_groups_do_not_depend_on_the_head(size, head_dim):
    assert QuantSpec(2, "channel", size).group(head_dim) == (size or 512)


@pytest.mark.parametrize(
    ("size", "head_dim", "group"),
    [
        (32, 128, 32),
        (32, 32, 32),
        (64, 32, 32),
        (128, 64, 64),
        (None, 80, 80),
        (None, 256, 256),
        (20, 80, 20),
        (40, 80, 40),
        (16, 16, 16),
        (32, 16, 16),
        (128, 256, 128),
    ],
)
def test_token_groups_never_span_heads(size, head_dim, group):
    assert QuantSpec(2, "token", size).group(head_dim) == group


def test_a_group_that_does_not_divide_the_head_is_refused_with_those_that_do():
    spec = QuantSpec(2, "token", 32)
    with pytest.raises(ValueError, match="group_size=32 does not divide head_dim=80") as error:
        spec.group(80)
    allowed = [int(x) for x in re.search(r"\[(.*)\]", str(error.value))[1].split(",")]
    assert allowed == [16, 20, 40, 80]
    assert all(QuantSpec(2, "token", g).group(80) == g for g in allowed)
    with pytest.raises(ValueError, match="head_dim=80"):
        spec.bits_per_element(80)


@pytest.mark.parametrize(
    ("size", "bits", "grid", "expected"),
    [
        (32, 2, "asymmetric", 3.0),
        (64, 2, "asymmetric", 2.5),
        (128, 2, "asymmetric", 2.25),
        (128, 2, "symmetric", 2.125),
        (32, 2, "least_squares", 3.0),
        (32, 1, "symmetric", 1.5),
        (16, 3, "asymmetric", 5.0),
        (64, 4, "asymmetric", 4.5),
        (None, 8, "symmetric", 8.125),
    ],
)
def test_bits_per_element_of_a_token_spec(size, bits, grid, expected):
    assert QuantSpec(bits, "token", size, grid).bits_per_element(128) == expected


def test_bits_per_element_of_a_page_wide_group():
    assert QuantSpec(2, "channel", None).bits_per_element(128) == 2 + 32 / 512


def test_bits_per_element_weighs_keys_and_values_by_their_size():
    key, value = QuantSpec(4, "channel", 32), QuantSpec(2, "token", 32)
    assert KVSpec(key, value).bits_per_element(64) == (5 + 3) / 2
    mean = Fraction(5 * 192 + 3 * 128, 192 + 128)
    assert KVSpec(key, value).bits_per_element(192, 128) == pytest.approx(float(mean), abs=1e-12)
    assert KVSpec(None, value).bits_per_element(64) == (16 + 3) / 2
    assert KVSpec(None, None).bits_per_element(64) == 16


@pytest.mark.parametrize(
    ("key", "value", "unit"),
    [
        (None, None, 32),
        (QuantSpec(2, "channel", 16), None, 32),
        (QuantSpec(2, "channel", 32), QuantSpec(2, "token", 128), 32),
        (QuantSpec(2, "token", 128), QuantSpec(2, "channel", 64), 64),
        (QuantSpec(2, "channel", 128), QuantSpec(2, "channel", 64), 128),
        (QuantSpec(2, "token", None), QuantSpec(2, "token", None), 32),
        (QuantSpec(2, "channel", None), QuantSpec(2, "token", 32), 512),
    ],
)
def test_unit_is_whole_planes_and_whole_groups(key, value, unit):
    spec = KVSpec(key, value)
    assert spec.unit == unit
    assert unit % TILE_ROWS == 0 and PAGE_TOKENS % unit == 0


def test_specs_are_values():
    one, two = QuantSpec(2, "channel"), QuantSpec(2, "channel", 32, "asymmetric")
    assert one == two and hash(one) == hash(two)
    assert one != QuantSpec(3, "channel")
    assert {KVSpec(one, None): 1}[KVSpec(two, None)] == 1
    assert eval(repr(KVSpec(one, None))) == KVSpec(one, None)
    with pytest.raises(dataclasses.FrozenInstanceError):
        one.bits = 3
    with pytest.raises(dataclasses.FrozenInstanceError):
        KVSpec(one, None).sink_length = 3


def test_checks_name_the_argument_its_value_and_what_is_allowed():
    with pytest.raises(ValueError, match=r"colour='red' is not allowed; choose from 'blue', None"):
        check_choice("colour", "red", ("blue", None))
    with pytest.raises(ValueError, match=r"n=2 is not allowed; it must be an integer >= 3"):
        check_count("n", 2, 3)
    check_choice("colour", None, ("blue", None))
    check_count("n", 3, 3)


def test_spec_is_free_of_torch():
    assert "torch" not in re.findall(r"import (\w+)", Path(kivi.spec.__file__).read_text())
