"""Each scheme's formula, from its paper, in a few lines of float64."""

import json
import math

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from kivi import KVQuantizer
from kivi.__main__ import app
from kivi.evals.attention_error import attention_errors
from kivi.evals.pathologies import PATHOLOGIES, pathology
from kivi.evals.tuning import choose_pairs
from kivi.kernels.reference import partial_attention
from kivi.transforms import random_matrix


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def back(name, x, value=False, **options):
    """What a scheme makes of `x [T, D]`, as key or value, in float64."""
    scheme = KVQuantizer.get(name, **options)
    quantize = scheme.quantize_value if value else scheme.quantize_key
    return scheme.dequantize(quantize(x[None, None].float()))[0, 0].double().numpy()


def matrix(n):
    h = np.ones((1, 1))
    while len(h) < n:
        h = np.kron([[1, 1], [1, -1]], h)
    return h / math.sqrt(n)


def min_max(x, bits, axis, clip=1.0):
    """Asymmetric round to nearest, groups along `axis`."""
    low, high = x.min(axis, keepdims=True) * clip, x.max(axis, keepdims=True) * clip
    step = (high - low) / (2**bits - 1)
    return np.clip(np.rint((x - low) / step), 0, 2**bits - 1) * step + low


def mostly_close(a, b, scale):
    """Equal but for 16-bit metadata, and for a few elements next to a rounding edge."""
    far = np.abs(a - b) > 4e-3 * scale
    assert far.mean() < 0.01, f"{far.mean():.2%} differ"


X = (randn(128, 64) * (1 + 3 * randn(64, seed=1).abs()) + randn(64, seed=2)).double().numpy()
SCALE = np.abs(X).max()


@pytest.mark.parametrize("value", [False, True])
def test_atom(value):
    mostly_close(back("atom", torch.tensor(X), value), min_max(X, 4, 1), SCALE)


@pytest.mark.parametrize("value", [False, True])
@pytest.mark.parametrize("bits", [2, 4])
def test_quarot(bits, value):
    expected = min_max(X @ matrix(64), bits, 1, clip=0.95)
    mostly_close(back("quarot", torch.tensor(X), value, bits=bits) @ matrix(64), expected, SCALE)


def test_oscar():
    rotated = X @ matrix(64)
    norm = np.linalg.norm(rotated, axis=1, keepdims=True)
    keys = [min_max(run, 2, 0) for run in np.split(rotated / norm, 4)]
    mostly_close(back("oscar", torch.tensor(X)) @ matrix(64), np.concatenate(keys) * norm, SCALE)
    groups = min_max(rotated.reshape(128, 2, 32), 2, 2).reshape(128, 64)
    mostly_close(back("oscar", torch.tensor(X), True) @ matrix(64), groups, SCALE)


@pytest.mark.parametrize("bits", [2, 4])
def test_exllamav3(bits):
    blocks = X.reshape(128, 2, 32) @ matrix(32)
    s = np.abs(blocks).max(2, keepdims=True)
    half = 2 ** (bits - 1)
    code = np.clip(np.floor(blocks / s * half + half), 0, 2**bits - 1)
    found = back("exllamav3", torch.tensor(X), bits=bits).reshape(128, 2, 32) @ matrix(32)
    mostly_close(found, s * (code + 0.5 - half) / half, SCALE)


def test_plumb():
    """Rotate, subtract the mean, midpoint levels, and a scale for which <x^, x> = <x, x>."""
    rotated = X @ matrix(64)
    center = rotated.mean(0)
    rest = rotated - center
    step = 0.9957 * np.sqrt((rest**2).mean(1, keepdims=True))
    for _ in range(2):  # the best step for a Gaussian, then the best for its codes
        level = np.clip(np.rint(rest / step - 0.5), -2, 1) + 0.5
        step = (rest * level).sum(1, keepdims=True) / (level**2).sum(1, keepdims=True)
    level = np.clip(np.rint(rest / step - 0.5), -2, 1) + 0.5
    step = (rest**2).sum(1, keepdims=True) / (rest * level).sum(1, keepdims=True)
    for value in (False, True):
        found = back("plumb", torch.tensor(X), value)
        # The oracle refits once more than plumb does and compares without rounding to whole parts:
        # a code or two may differ, those that are about as far from one level as from the other.
        want = (center + step * level) @ matrix(64)
        assert np.abs(found - want).mean() < 0.04 * X.std()
        assert np.linalg.norm(found - X) < 1.005 * np.linalg.norm(want - X)


def test_fp8_is_e4m3():
    levels = [0.0] + [m / 8 * 2.0**-6 for m in range(1, 8)]
    levels += [(1 + m / 8) * 2.0 ** (e - 7) for e in range(1, 16) for m in range(8 - (e == 15))]
    levels = np.array(levels)
    found = back("fp8", torch.tensor(X))
    assert np.isin(np.abs(found), levels).all()
    assert np.allclose(np.abs(X - found), np.abs(np.abs(X)[..., None] - levels).min(-1), atol=1e-6)
    assert back("fp8", torch.full((32, 16), 1e4)).max() == 448


def test_nvfp4():
    levels = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    groups = X.reshape(128, 4, 16)
    scale = back("fp8", torch.tensor(np.abs(groups).max(2) / 6))[..., None]
    place = groups / scale
    nearest = levels[np.abs(np.abs(place)[..., None] - levels).argmin(-1)]
    mostly_close(
        back("nvfp4", torch.tensor(X)), (np.sign(place) * nearest * scale).reshape(128, 64), 1
    )


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_turboquant_mse(bits):
    """Algorithm 1; its error is that of theorem 1: 0.36, 0.117, 0.03, 0.009 of the norm squared."""
    x = torch.tensor(X)
    rotation = random_matrix(64, 64, True, x.device).double().numpy()
    assert np.allclose(rotation @ rotation.T, np.eye(64), atol=1e-6)
    norm = np.linalg.norm(X, axis=1, keepdims=True)
    place = X / norm @ rotation.T * 8
    found = back("turboquant", x, bits=bits)
    levels = np.unique(np.round(found / norm @ rotation.T * 8, 2))
    assert np.allclose(levels, -levels[::-1]) and 2**bits <= len(levels) <= 2 ** (bits + 1)
    error = ((X - found) ** 2).sum() / (X**2).sum()
    assert error == pytest.approx({1: 0.36, 2: 0.117, 3: 0.03, 4: 0.009}[bits], rel=0.2)
    codes = np.abs(place[..., None] - levels).argmin(-1)
    mostly_close(levels[codes] * norm / 8 @ rotation, found, 10 * SCALE)


def test_turboquant_prod_is_unbiased_where_mse_is_not():
    """Theorem 2: `E <y, x^> = <y, x>`; over many x the product with x itself keeps its size."""
    x = randn(4000, 64)
    ratio = {
        variant: (back("turboquant", x, bits=2, variant=variant) * x.numpy()).sum()
        / (x.double() ** 2).sum().item()
        for variant in ("mse", "prod")
    }
    assert ratio["prod"] == pytest.approx(1, abs=0.01) and ratio["mse"] < 0.9


def test_qjl_is_its_estimator():
    """Definition 3.1: `sqrt(pi/2) / m |k| <S q, sign(S k)>`."""
    k, q = torch.tensor(X), randn(5, 64, seed=4).double().numpy()
    s = random_matrix(3 * 64, 64, True, k.device).double().numpy() * 8
    norm = np.linalg.norm(X, axis=1)
    expected = math.sqrt(math.pi / 2) / len(s) * (q @ s.T) @ np.sign(X @ s.T).T * norm
    assert np.allclose(q @ back("qjl", k).T, expected, rtol=5e-3, atol=0.05)
    mostly_close(back("qjl", k, True), min_max(X.reshape(128, 2, 32), 2, 2).reshape(128, 64), SCALE)


@pytest.mark.parametrize("value", [False, True])
def test_kvarn(value):
    """Alternate column and row deviations in logarithms, keep the least imbalance, round rows."""
    tile = X @ matrix(64) if value else (X @ matrix(64)).T  # rows: tokens of values, else channels
    log = [np.zeros((1, tile.shape[1])), np.zeros((tile.shape[0], 1))]

    def std(x, axis):
        return x.std(axis, ddof=1, keepdims=True)

    def imbalance(x):
        return sum(std(x, axis).max() / std(x, axis).min() for axis in (0, 1))

    least, best = imbalance(tile), [np.exp(x) for x in log]
    for _ in range(16):
        for axis in (0, 1):
            now = std(tile / np.exp(log[0]) / np.exp(log[1]), axis)
            log[axis] = np.clip(log[axis] + np.log(now.clip(1e-3, 1e3)), -0.3, 10)
        found = imbalance(tile / np.exp(log[0]) / np.exp(log[1]))
        if found <= least:
            least, best = found, [np.exp(x) for x in log]
    bits = 2 if value else 4
    expected = min_max(tile / best[0] / best[1], bits, 1) * best[0] * best[1]
    found = back("kvarn", torch.tensor(X), value) @ matrix(64)
    mostly_close(found if value else found.T, expected, SCALE)


def test_polarquant():
    """Angles of pairs, of pairs of radii, ...: the nearest of 16, 4, 4 and 4 angles each."""
    rotation = random_matrix(64, 64, True, torch.device("cpu")).double().numpy()

    def polar(x):
        angles = []
        for _ in range(4):
            a, b = x[..., ::2], x[..., 1::2]
            angles.append(np.arctan2(b, a) % (2 * np.pi))
            x = np.hypot(a, b)
        return angles, x

    exact, radius = polar(X @ rotation.T)
    coded, kept = polar(back("polarquant", torch.tensor(X)) @ rotation.T)
    assert np.allclose(radius, kept, rtol=1e-3)
    for level, (found, true, count) in enumerate(zip(coded, exact, (16, 4, 4, 4), strict=True)):
        levels = np.unique(np.round(found, 3))
        levels = levels[np.concatenate([[True], np.diff(levels) > 0.01])]
        assert len(levels) == count
        nearest = np.abs(true[..., None] - levels).min(-1)
        mostly_close(np.abs(true - found), nearest, 1)
        if level:  # each angle is the mean of what it stands for: k-means has settled
            codes = np.abs(true[..., None] - levels).argmin(-1)
            means = [true[codes == i].mean() for i in range(count)]
            assert np.allclose(means, levels, atol=0.05)
    error = ((X - back("polarquant", torch.tensor(X))) ** 2).sum() / (X**2).sum()
    assert 0.01 < error < 0.05


def test_int8_smoothing_moves_magnitudes_to_the_queries():
    x = randn(64, 64)
    x[:, 3] *= 1000
    others = [c for c in range(64) if c != 3]
    error = {s: np.abs(back("int8", x, smooth=s) - x.numpy())[:, others] for s in (None, "max")}
    assert error["max"].mean() < error[None].mean() / 50


def test_kvtuner_reads_bits_for_each_layer(tmp_path):
    file = tmp_path / "bits.json"
    file.write_text(json.dumps({"layers": [[8, 4], [4, 2], [2, 2]]}))
    scheme = KVQuantizer.get("kvtuner", file=str(file))
    found = [(s.key.bits, s.value.bits) for s in map(scheme.spec, (0, 1, 2, 7, None))]
    assert found == [(8, 4), (4, 2), (2, 2), (2, 2), (8, 4)]
    assert scheme.bits_per_element(64) == pytest.approx((8 + 4 + 4 + 2 + 2 + 2) / 6 + 1)
    file.write_text(json.dumps({"layers": [[3, 1]]}))  # tuned again
    assert scheme.spec(0).key.bits == 3
    for text in ("", "{}", '{"layers": []}', '{"layers": [[5, 2]]}', '{"layers": [[2]]}'):
        file = tmp_path / f"{len(text)}.json"
        file.write_text(text)
        with pytest.raises(ValueError, match="file="):
            KVQuantizer.get("kvtuner", file=str(file))
    with pytest.raises(ValueError, match=r"no\.json"):
        KVQuantizer.get("kvtuner", file="no.json")


@pytest.mark.parametrize(
    ("name", "options", "bits"),
    [
        ("plumb", {}, 2 + 2 * 16 / 128),
        ("plumb", dict(value_bits=1), 1.5 + 2 * 16 / 128),
        ("quarot", {}, 4.25),
        ("atom", {}, 4.25),
        ("oscar", {}, 3 + 16 / 128 / 2),
        ("exllamav3", {}, 4.5),
        ("fp8", {}, 8),
        ("nvfp4", {}, 4.5),
        ("turboquant", {}, 3 + 16 / 128),
        ("turboquant", dict(variant="prod"), 3 + 32 / 128),
        ("qjl", {}, (3 + 16 / 128 + 3) / 2),
        ("kvtuner", {}, 4.0),
        ("kvarn", {}, 3.375),
        ("polarquant", {}, 3.875),
    ],
)
def test_sizes_are_those_of_the_papers(name, options, bits):
    assert KVQuantizer.get(name, **options).bits_per_element(128) == bits


@pytest.mark.parametrize(
    ("name", "head_dim", "words"),
    [("nvfp4", 24, "head_dim=24"), ("turboquant", 20, "head_dim=20"), ("qjl", 12, "head_dim=12")],
)
def test_heads_that_do_not_fit_are_refused(name, head_dim, words):
    with pytest.raises(ValueError, match=words):
        KVQuantizer.get(name).new_layer(batch_size=1, num_kv_heads=1, head_dim=head_dim)


# ---------------------------------------------------------------- pathologies


def error(scheme, x):
    def make_layer(_, x):
        return scheme.new_layer(batch_size=1, num_kv_heads=2, head_dim=64, dtype=torch.float32)

    return attention_errors([x], make_layer, prefill=512, chunk=32)[0]


@pytest.mark.parametrize("name", PATHOLOGIES)
def test_plumb_is_better_than_kivi_whatever_is_wrong_with_the_cache(name):
    """At fewer bits an element: 2.375 against 2.5 (and better than 3.0 but for uneven tokens)."""
    x = pathology(name, 64, 768)
    plumb = KVQuantizer.get("plumb")
    kivi = [KVQuantizer.get("kivi", group_size=size) for size in (64, 32)]
    errors = [error(scheme, x) for scheme in (plumb, *kivi)]
    assert errors[0] < 0.95 * errors[1]
    assert errors[0] < (1.1 if name == "uneven tokens" else 1.0) * errors[2]


def test_a_pathology_is_exact_attention():
    x = pathology("plain", 32, 60)
    allow = torch.ones(60, 60, dtype=torch.bool).tril()[None, None]
    out, _ = partial_attention(x.q, x.k, x.v, allow, 1.0)
    assert torch.allclose(out, x.out, atol=1e-4)
    with pytest.raises(ValueError, match="name='none'"):
        pathology("none")


# ---------------------------------------------------------------- tuning


def test_pairs_go_where_they_help_most():
    easy = {(2, 2): 0.10, (4, 2): 0.09, (2, 4): 0.09, (4, 4): 0.08}
    hard = {(2, 2): 0.90, (4, 2): 0.10, (2, 4): 0.80, (4, 4): 0.05}
    assert choose_pairs([easy, hard], 2) == [(2, 2), (2, 2)]
    assert choose_pairs([easy, hard], 2.5) == [(2, 2), (4, 2)]
    assert choose_pairs([easy, hard], 3) == [(2, 2), (4, 4)]
    assert choose_pairs([easy, hard], 8) == [(4, 4), (4, 4)]
    with pytest.raises(ValueError, match=r"bits=1.5 is not allowed; the cheapest pairs have 2"):
        choose_pairs([easy, hard], 1.5)
    with pytest.raises(ValueError, match="bits=nan is not allowed"):
        choose_pairs([easy, hard], float("nan"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--context", "319"], "context=319 is not allowed; it must be >= 320"),
        (["--out", "no/bits.json"], "out='no/bits.json' is not allowed; it must be a file in"),
        (["--out", "."], "out='.' is not allowed"),
    ],
)
def test_tune_refuses_in_one_line(options, message, tmp_path):
    result = CliRunner().invoke(app, ["tune", "--out", str(tmp_path / "bits.json"), *options])
    assert result.exit_code == 2 and not list(tmp_path.iterdir())
    assert message in " ".join(result.output.split())


def test_tune_writes_a_file_that_the_scheme_reads(tmp_path):
    out = tmp_path / "bits.json"
    result = CliRunner().invoke(app, ["tune", "--out", str(out), "--context", "512"])
    assert result.exit_code == 0, result.output
    scheme = KVQuantizer.get("kvtuner", file=str(out))
    pairs = [(s.key.bits, s.value.bits) for s in map(scheme.spec, range(6))]
    assert len(set(pairs)) > 1 and sum(map(sum, pairs)) / 12 <= 3
    assert scheme.bits_per_element(64) == pytest.approx(sum(map(sum, pairs)) / 12 + 1)
    errors = json.loads(out.read_text())["attention_error"]
    assert len(errors) == 6 and all(0 < e < 0.5 for e in errors)


@pytest.mark.compile
@pytest.mark.parametrize("name", ["polarquant", "turboquant"])
def test_tables_of_a_format_are_constants_of_the_graph(name):
    """Not traced: polarquant's search for its angles has millions of steps."""
    torch._dynamo.reset()
    scheme = KVQuantizer.get(name)
    sizes = {"batch_size": 1, "num_kv_heads": 1, "head_dim": 32, "dtype": torch.float32}
    eager, traced = (scheme.new_layer(**sizes, max_length=70) for _ in range(2))
    step = torch.compile(lambda *qkv: traced.decode(*qkv), backend="eager", fullgraph=True)
    with torch.no_grad():
        for seed in range(40):
            qkv = randn(3, 1, 1, 1, 32, seed=seed)
            torch.testing.assert_close(step(*qkv), eager.decode(*qkv))
