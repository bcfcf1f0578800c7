"""Both Triton operators over the whole grid of specs: every pair of choices, at small shapes.

Codes, scales and zeros must equal eager's byte for byte, attention be within twice its error.
"""

import random
from itertools import combinations

import pytest
import torch
from one_thread import one_thread  # noqa: F401
from test_triton_decode import (  # noqa: F401
    BRAIN,
    DEVICE,
    GPU,
    HALF,
    _outputs_begin_as_nan,
    check,
    randn,
    state,
)

from kivi import KVSpec, LayerCache, QuantSpec
from kivi.kernels.triton_formats import supports

pytestmark = [pytest.mark.filterwarnings("ignore::RuntimeWarning"), *[pytest.mark.gpu] * GPU]
HEAD_DIMS = (64, 80, 96, 128, 256)
CHOICES = {
    "key_bits": (0, 1, 2, 3, 4, 8),  # 0: not quantized
    "key_axis": ("channel", "token"),
    "key_group": (16, 32, 64, 128, None),
    "key_grid": ("asymmetric", "symmetric", "least_squares"),
    "value_bits": (0, 1, 2, 3, 4, 8),
    "value_axis": ("channel", "token"),
    "value_group": (16, 32, 64, 128, None),
    "value_grid": ("asymmetric", "symmetric", "least_squares"),
    "d": HEAD_DIMS,
    "dtype": (HALF, BRAIN),
}


def pairs(row: tuple) -> set[tuple]:
    """The pairs of choices that a row shows."""
    return set(combinations(enumerate(row), 2))


def specs(row: tuple) -> list[QuantSpec | None] | None:
    """Keys' and values' specs; None where a group does not divide the head dimension."""
    chosen = dict(zip(CHOICES, row, strict=True))
    both: list[QuantSpec | None] = []
    for name in ("key", "value"):
        bits, axis, group, grid = (chosen[f"{name}_{x}"] for x in ("bits", "axis", "group", "grid"))
        one = QuantSpec(bits, axis, group, grid) if bits else None
        if one is not None and axis == "token" and chosen["d"] % min(group or 16, chosen["d"]):
            return None
        both.append(one)
    return both


def covering() -> list[tuple]:
    """Rows that show every pair of choices that can stand together; greedy, always the same."""
    generator, left, rows = random.Random(0), set(), []
    values = list(CHOICES.values())
    for i, j in combinations(range(len(values)), 2):
        left |= {((i, a), (j, b)) for a in values[i] for b in values[j]}
    while left:
        best: tuple[int, tuple] = (0, ())
        for pair in generator.sample(sorted(left, key=str), min(20, len(left))):
            for _ in range(10):
                row = [generator.choice(x) for x in values]
                for i, x in pair:
                    row[i] = x
                new = len(pairs(tuple(row)) & left) if specs(tuple(row)) is not None else 0
                best = max(best, (new, tuple(row)), key=lambda x: x[0])
        if best[0] == 0:
            break
        rows.append(best[1])
        left -= pairs(best[1])
    return rows


ROWS = covering()


@pytest.mark.parametrize("row", ROWS, ids=lambda row: "-".join(map(str, row)))
def test_pairwise(row: tuple) -> None:
    both, (d, dtype) = specs(row), row[-2:]
    assert both is not None and supports(*both, d, d, dtype) is None
    spec = KVSpec(*both, 0, 1)
    tokens = spec.unit + 37
    k, v = (randn(1, 1, tokens, d, dtype=dtype, seed=seed) for seed in (1, 2))
    views = []
    for impl in ("eager", "triton"):
        layer = LayerCache(spec, 1, 1, d, dtype=dtype, device=DEVICE, impl=impl)
        layer.prefill(k, v)
        views.append(layer._view())
    for a, b in zip(views[0].key + views[0].value, views[1].key + views[1].value, strict=True):
        assert a is b is None or torch.equal(a[1:].view(torch.uint8), b[1:].view(torch.uint8))
    at = state(spec, [tokens], d=d, dv=d, dtype=dtype)
    check(at, randn(1, 2, 1, d, dtype=dtype, seed=9), d**-0.5)


def test_every_pair_is_shown() -> None:
    """Groups that do not divide a head dimension of 80 or 96 stand there as groups of tokens."""
    values, shown = list(CHOICES.values()), set().union(*map(pairs, ROWS))
    for i, j in combinations(range(len(values)), 2):
        assert {((i, a), (j, b)) for a in values[i] for b in values[j]} <= shown
