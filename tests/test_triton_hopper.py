"""The Hopper kernel's source on the CPU, against float64; gluon_on_cpu.py says what that shows."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from gluon_on_cpu import Kernel
from one_thread import one_thread  # noqa: F401
from test_triton_decode import _outputs_begin_as_nan  # noqa: F401
from test_triton_extend import BRAIN, GPU, HALF, KIVI, Q, check, randn, state
from test_triton_mapped import PLUMB, SPECS, check_extend

from kivi import KVSpec
from kivi.kernels import triton_extend_hopper, triton_extend_portable

pytestmark = pytest.mark.skipif(GPU, reason="runs there as it is: test_triton_extend.py")

CASES: dict[str, dict[str, Any]] = {
    "two bits": {},
    "many queries": {"lengths": [300], "t": 200, "ratio": 3},
    "1 and 4 bits, large groups, bfloat16": {
        "spec": KVSpec(Q(4, "channel", 128), Q(1, "token", 128), 100, 0),
        "lengths": [900],
        "d": 128,
        "dtype": BRAIN,
    },
    "8 bits, bfloat16": {
        "spec": KVSpec(Q(8, "channel", None), Q(8, "token", 16), 16, 2),
        "lengths": [1100],
        "dtype": BRAIN,
    },
    "1 bit": {"spec": KVSpec(Q(1, "channel", 64), Q(8, "token", 32), 32, 3)},
    "symmetric": {
        "spec": KVSpec(Q(2, "channel", 32, "symmetric"), Q(8, "token", 64, "symmetric"), 16, 0)
    },
    "padding": {"t": 150, "padding": [3, 149]},
    "softcap and sinks": {"softcap": 3.0, "s_aux": True},
    "splits": {"lengths": [1300, 30], "splits": 5, "s_aux": True},
    "three stages": {"stages": 3},
    "nothing packed": {"lengths": [20], "t": 140},
    "window": {"sliding_window": 300, "t": 200},
    "short window, padding": {"sliding_window": 40, "t": 200, "padding": [30, 0]},
    "window, splits": {"sliding_window": 500, "softcap": 3.0, "splits": 3},
    "outliers": {"outlier": 65504.0},
    "keys a token, symmetric": {
        "spec": KVSpec(Q(2, "token", 64, "symmetric"), Q(4, "token", 32), 32, 3)
    },
    "keys a token, zeros": {"spec": KVSpec(Q(4, "token", 16), Q(2, "token", 16), 32, 3)},
    "heads that are not next to each other": {"hkv": 2, "strided": True},
}


def same(bits: int, **options: Any) -> KVSpec:
    one = Q(bits, "token", None, **options)
    return KVSpec(one, one, 32, 4)


MAPPED: dict[str, tuple[KVSpec, list[int], int, dict[str, Any]]] = {
    "plumb": (SPECS["plumb"], [700, 40], 40, {}),
    "4 and 1 bits, bfloat16, many queries": (
        KVSpec(replace(PLUMB, bits=4), replace(PLUMB, bits=1), 32, 4),
        [600],
        70,
        {"d": 128, "dtype": BRAIN, "ratio": 4},
    ),
    "8 bits, blocks of 32, short centers": (
        same(8, grid="midpoint", transform="hadamard_32", center=32, smooth="max"),
        [300],
        20,
        {"softcap": 20.0, "s_aux": True},
    ),
    "8 bits, bfloat16": (same(8, grid="midpoint", center=64), [300], 20, {"dtype": BRAIN}),
    "3 bits": (same(3, grid="unbiased", transform="hadamard", center=128), [700], 20, {}),
    "3 bits, bfloat16": (
        KVSpec(replace(PLUMB, bits=3), Q(3, "token", 32), 32, 4),
        [700],
        20,
        {"dtype": BRAIN},
    ),
    "keys rotated": (SPECS["keys rotated"], [300], 20, {}),
    "values smoothed": (
        KVSpec(Q(2, "token", 16), Q(1, "token", None, "symmetric", smooth="max"), 32, 0),
        [300],
        20,
        {},
    ),
    "splits": (SPECS["plumb"], [900, 1], 20, {"splits": 4}),
    "more splits than tiles": (SPECS["plumb"], [300], 20, {"splits": 9}),
    "window": (SPECS["plumb"], [900], 150, {"sliding_window": 300}),
    "padding": (SPECS["plumb"], [300, 40], 40, {"padding": [3, 39]}),
}


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int]]:
    """The grids of what ran on the CPU in place of the kernel."""
    grids = []

    class Counted(Kernel):
        def __getitem__(self, grid: tuple[int]) -> Any:
            grids.append(grid)
            return super().__getitem__(grid)

    monkeypatch.setattr(
        triton_extend_hopper, "extend_hopper", Counted("triton_hopper", "extend_hopper")
    )
    monkeypatch.setattr(triton_extend_hopper, "_is_hopper", lambda _: True)
    return grids


@pytest.mark.parametrize("case", MAPPED.values(), ids=MAPPED)
def test_mapped(
    case: tuple[KVSpec, list[int], int, dict[str, Any]],
    launched: list[tuple[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spec, lengths, t, options = case
    options = {"d": 64} | options
    if options.pop("s_aux", False):
        options["s_aux"] = randn(4, seed=3)
    splits = options.pop("splits", 1)
    monkeypatch.setattr(triton_extend_portable, "division", lambda *_: splits)
    check_extend(spec, lengths, t, **options)
    assert len(launched) == 1


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_hopper(
    case: dict[str, Any], launched: list[tuple[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    tuning = triton_extend_hopper.Tuning(stages=case.get("stages", 2))
    monkeypatch.setattr(triton_extend_hopper, "tuning", tuning)
    monkeypatch.setattr(triton_extend_portable, "division", lambda *_: case.get("splits", 1))
    d, ratio, hkv = case.get("d", 64), case.get("ratio", 2), case.get("hkv", 1)
    at = state(
        case.get("spec", KIVI),
        case.get("lengths", [700, 60]),
        case.get("t", 40),
        ratio,
        hkv,
        d,
        d,
        case.get("dtype", HALF),
        case.get("padding"),
        outlier=case.get("outlier"),
    )
    scale, slack = 0.2, 1.0
    if "outlier" in case:
        at, scale, slack = at._replace(q=at.q / 100), 0.01, 16.0
    if "strided" in case:
        q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in at[2:5])
        at = at._replace(q=q, k=k, v=v)
    s_aux = randn(ratio * hkv, seed=4) if "s_aux" in case else None
    check(at, scale, slack, s_aux=s_aux, **{n: case.get(n) for n in ("sliding_window", "softcap")})
    assert len(launched) == 1


def test_what_it_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_extend_hopper, "_is_hopper", lambda _: True)
    q, key, value = torch.empty(1, 1, 1, 64, dtype=HALF), (2, True, 32), (2, False, 32)
    serves = triton_extend_hopper.serves
    assert serves(q, 64, key, value, 0.1)
    assert not serves(q, 128, key, value, 0.1)
    assert not serves(q.float(), 64, key, value, 0.1)
    assert serves(q, 64, (3, True, 32), (3, False, 32), 0.1)
    assert not serves(q, 64, (0, False, 64), value, 0.1)
    assert not serves(q, 64, (2, True, 16), value, 0.1)
    assert serves(q, 64, (2, False, 32), value, 0.1)
    assert not serves(q, 64, (2, False, 20), value, 0.1)
    assert not serves(q, 64, key, (2, True, 32), 0.1)
    assert not serves(q, 64, key, (2, False, 20), 0.1)
    assert not serves(q, 64, key, value, 0.0)
