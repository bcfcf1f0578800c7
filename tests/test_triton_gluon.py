"""The Gluon decode kernel's source on the CPU, against float64; gluon_on_cpu.py says what it shows.

The bounds are those of the tests on a GPU, test_triton_fast.py and test_triton_mapped.py.
"""

import inspect
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from gluon_on_cpu import Kernel
from hypothesis import HealthCheck, settings
from one_thread import one_thread  # noqa: F401
from test_triton_decode import BRAIN, DEVICE, GPU, HALF, _outputs_begin_as_nan  # noqa: F401
from test_triton_fast import check, check_spec, filled, run, specs_up_to
from test_triton_mapped import GLUON, PLUMB, same
from test_triton_mapped import check as check_mapped

from kivi import KVSpec, LayerCache, QuantSpec
from kivi.kernels import triton_direct, triton_fast, triton_mapped

pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.skipif(GPU, reason="runs there as it is: test_triton_fast.py"),
]
# Multiprocessors, shared bytes, architecture: many programs share a unit; five do; each unit has
# its own, nothing is merged, so it may launch what follows early; more than there is work.
SHARED, FIVE, ALONE, MANY = (2, 232448, 8), (5, 9000, 8), (1, 9000, 9), (132, 232448, 8)
Become = Callable[[tuple[int, int, int]], list[dict[str, Any]]]


@pytest.fixture
def become(monkeypatch: pytest.MonkeyPatch) -> Iterator[Become]:
    """Take this machine for such a GPU; what is launched then is told by the kernel's names."""
    launched: list[dict[str, Any]] = []

    class Counted(Kernel):
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            launch, names = super().__getitem__(grid), inspect.signature(self.function).parameters

            def counted(*arguments: Any, **options: Any) -> None:
                launched.append(dict(zip(names, arguments, strict=True)) | {"grid": grid})
                launch(*arguments, **options)

            return counted

    monkeypatch.setattr(triton_fast, "decode_kernel", Counted("triton_gluon", "decode_kernel"))
    monkeypatch.setattr(triton_fast, "on_device", lambda device: triton_direct._HERE)
    monkeypatch.setattr(torch, "empty_like", lambda x: torch.full(x.shape, math.nan, dtype=x.dtype))

    def chosen(gpu: tuple[int, int, int]) -> list[dict[str, Any]]:
        monkeypatch.setattr(triton_fast, "_gpu", lambda device: gpu)
        launched.clear()
        return launched

    triton_mapped.forget()
    yield chosen
    triton_mapped.forget()


CASES: dict[str, dict[str, Any]] = {
    # On 8-bit tensor cores
    "KIVI": {},
    "KIVI, bfloat16": {"dtype": BRAIN},
    "4 bits": {"bits": (4, 4), "sinks": 4, "lengths": [700, 20, 1], "aux": True},
    "4 bits, bfloat16": {"bits": (4, 4), "dtype": BRAIN, "softcap": 20.0, "t": 2, "ratio": 2},
    "groups of 64": {"groups": (64, 64), "d": 128, "ratio": 3, "aux": True},
    "groups of 128": {"groups": (128, 128), "d": 128, "lengths": [860, 130]},
    "whole pages": {"groups": (None, None), "lengths": [1200, 64]},
    "whole pages, 4 bits": {"bits": (4, 4), "groups": (None, 16), "d": 128, "ratio": 1},
    "symmetric": {"grid": "symmetric"},
    "symmetric, 4 bits": {"bits": (4, 4), "groups": (64, 32), "grid": "symmetric", "d": 128},
    "least squares": {"grid": "least_squares", "dtype": BRAIN, "ratio": 1, "softcap": 30.0},
    "several tokens": {"ratio": 1, "t": 4, "lengths": [700, 300], "sinks": 3},
    "large values": {"size": 300.0},
    "one query": {"ratio": 1, "d": 128, "sinks": 4},
    "one query, groups of 64, symmetric": {
        "ratio": 1, "groups": (64, 32), "grid": "symmetric", "aux": True,
    },
    "one query, groups of 128, bfloat16": {
        "ratio": 1, "groups": (128, 64), "dtype": BRAIN, "lengths": [860, 130, 1],
    },
    "two queries, 4 bits": {"ratio": 2, "bits": (4, 4), "groups": (64, 16), "softcap": 20.0},
    "256 channels": {"d": 256, "sinks": 40, "lengths": [500, 41, 30, 1]},
    "256 channels, 4 bits, groups of 128, bfloat16": {
        "d": 256, "bits": (4, 4), "groups": (128, 128), "dtype": BRAIN, "softcap": 20.0, "ratio": 3,
        "lengths": [860, 60],
    },
    "256 channels, a group of them, symmetric": {
        "d": 256, "groups": (None, None), "grid": "symmetric", "aux": True, "lengths": [860, 3],
    },
    "256 channels, one query": {
        "d": 256, "ratio": 1, "groups": (64, 32), "softcap": 30.0, "lengths": [700, 80],
    },
    "256 channels, two queries, 4 bits": {
        "d": 256, "ratio": 2, "bits": (4, 4), "groups": (32, None), "lengths": [330, 80],
    },
    # On 16-bit ones
    "eight queries": {"ratio": 8, "bytes": False, "sinks": 4},
    "many queries, bfloat16": {"ratio": 5, "t": 2, "bytes": False, "dtype": BRAIN, "aux": True},
    "large values, eight queries": {"size": 300.0, "ratio": 8, "bytes": False},
    "8 bits": {"bits": (8, 8), "bytes": False},
    "8 bits, symmetric": {"bits": (8, 8), "bytes": False, "grid": "symmetric", "softcap": 20.0},
    "1 bit": {"bits": (1, 1), "groups": (64, 32), "bytes": False, "d": 128, "dtype": BRAIN},
    "4 and 2 bits": {"bits": (4, 2), "bytes": False, "ratio": 1, "t": 4, "softcap": 20.0},
    "2 and 4 bits": {
        "bits": (2, 4), "groups": (64, 64), "bytes": False, "grid": "least_squares", "aux": True,
    },
    "8 and 1 bits": {"bits": (8, 1), "groups": (128, 16), "bytes": False, "d": 128},
    "256 channels, eight queries": {
        "ratio": 8, "bytes": False, "d": 256, "sinks": 40, "lengths": [300, 41, 30, 1],
    },
}  # fmt: skip


def layer_of(case: dict[str, Any]) -> LayerCache:
    key, value = (
        QuantSpec(bits, axis, group, case.get("grid", "asymmetric"))
        for bits, axis, group in zip(
            case.get("bits", (2, 2)),
            ("channel", "token"),
            case.get("groups", (32, 32)),
            strict=True,
        )
    )
    spec = KVSpec(key, value, 100, case.get("sinks", 0))
    lengths, d = case.get("lengths", [730, 60]), case.get("d", 64)
    return filled(spec, lengths, 2, d, case.get("dtype", HALF), case.get("size", 1.0))


RUNS = [(case, gpu) for case in CASES for gpu in ("SHARED", "ALONE")]
RUNS += [
    (case, "FIVE") for case in ("KIVI", "4 bits", "symmetric, 4 bits", "eight queries", "8 bits")
]
RUNS += [(case, "MANY") for case in ("KIVI", "4 bits, bfloat16", "8 bits", "256 channels")]


@pytest.mark.parametrize(("name", "gpu"), RUNS)
def test_formats(name: str, gpu: str, become: Become) -> None:
    case, launched = CASES[name], become(globals()[gpu])
    rows = case.get("ratio", 4), case.get("t", 1)
    check(layer_of(case), *rows, case.get("softcap"), case.get("aux", False))
    one = launched[0]
    assert one["BYTES"] == (case.get("bytes", True) and gpu != "MANY") and not one["MAPPED"]
    assert one["SINGLE"] == one["EARLY"] == (gpu == "ALONE")
    assert one["TOGETHER"] == (one["BYTES"] and rows[0] * rows[1] * one["NP"] <= 4)


MAPPED = {
    **GLUON,
    "centers of 64": (same(2, grid="midpoint", transform="hadamard", center=64), {"d": 64}),
    "4 bits, centers of 32": (same(4, grid="unbiased", center=32), {"d": 64, "ratio": 1, "t": 4}),
    "smooth alone": (same(2, grid="symmetric", smooth="max"), {"d": 64, "dtype": BRAIN}),
    "4 bits, bfloat16": (
        same(4, grid="symmetric", transform="hadamard_32", center=128), {"dtype": BRAIN},
    ),
    "a loud token": (KVSpec(PLUMB, PLUMB, 32, 0), {"loud": 7.0}),
    "a very loud token": (same(4, grid="symmetric", transform="hadamard"), {"loud": 60.0}),
}  # fmt: skip


@pytest.mark.parametrize("gpu", ["SHARED", "ALONE"])
@pytest.mark.parametrize("name", MAPPED)
def test_mapped(name: str, gpu: str, become: Become, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_mapped, "portable", None)  # it is not called
    launched, (spec, options) = become(globals()[gpu]), MAPPED[name]
    options = {"d": 128, "ratio": 4, **options}
    check_mapped(spec, [660, 60, 3], dv=options["d"], **options)
    one = launched[0]
    assert one["BYTES"] and one["MAPPED"] and one["SINGLE"] == (gpu == "ALONE")


@pytest.mark.parametrize(
    ("key", "value", "options"),
    [
        ({"group_size": 128}, {"group_size": 128}, {}),
        ({"group_size": 128, "grid": "asymmetric"}, {}, {}),
        ({"axis": "channel", "group_size": 32}, {}, {}),
        ({"bits": 4}, {}, {}),
        ({"bits": 8}, {"bits": 8}, {}),
        ({"center": 64}, {"center": 128}, {}),
        ({}, {}, {"ratio": 17}),
        ({}, {}, {"d": 512, "dv": 512}),
        ({}, {}, {"dtype": torch.float32}),
    ],
    ids=str,
)
def test_mapped_by_the_portable_kernel(
    key: dict[str, Any],
    value: dict[str, Any],
    options: dict[str, Any],
    become: Become,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What `test_mapped` has no case of is not served, and so left to the kernel that takes all."""
    base = {"bits": 2, "axis": "token", "group_size": None, "grid": "midpoint"}
    both = (QuantSpec(**base | {"transform": "hadamard"} | x) for x in (key, value))
    launched, calls, portable = become(SHARED), [], triton_mapped.portable
    monkeypatch.setattr(triton_mapped, "portable", lambda *x: calls.append(x) or portable(*x))
    check_mapped(KVSpec(*both, 32, 4), [70], **{"ratio": 1, "d": 256, "dv": 256} | options)
    assert len(calls) == 1 and launched == []


@pytest.mark.parametrize(("token", "ratio"), [(37, 1e3), (37, 1e5), (600, 1e25), (600, 1e45)])
@pytest.mark.parametrize(("bits", "queries"), [(1, 4), (2, 4), (2, 1), (4, 4), (4, 2)])
@pytest.mark.parametrize("dtype", [HALF, BRAIN])
def test_a_loud_token(
    bits: int, queries: int, token: int, ratio: float, dtype: torch.dtype, become: Become
) -> None:
    """A token of so many times the others' probability does not hide what they are together.

    Where it comes late, what was summed until then must follow.
    """
    become((1, 9000, 8))
    d, n, scale = 64, 1000, 64**-0.5
    spec = KVSpec(QuantSpec(bits, "channel", 32), QuantSpec(bits, "token", 32), 32, 0)
    layer = LayerCache(spec, 1, 1, d, dtype=dtype, impl="eager")
    k, v = 0.3 * torch.randn(1, 1, n, d), 4 + 2 * torch.randn(1, 1, n, d)
    q = 0.3 * torch.randn(1, queries, 1, d)
    k[..., 0], k[:, :, token, 0] = 0, 8
    v[:, :, token] -= 4
    q[..., 0] = math.log(ratio) / (8 * scale)
    layer.append(k.to(dtype), v.to(dtype))
    check(layer, queries, 1, q=q.to(dtype))


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@specs_up_to(500)
def test_random_specs(become: Become, **spec: Any) -> None:
    become(FIVE)
    check_spec(**spec)


@pytest.mark.parametrize("programs", [1, 2, 7])
def test_independent_of_the_number_of_programs(programs: int, become: Become) -> None:
    case = {"lengths": [700, 300, 20]}
    layer = layer_of(case)
    q, position = torch.randn(3, 8, 1, 64).half(), torch.tensor([[699], [299], [19]])
    become(SHARED)
    out, lse = run(q, layer._view(), layer.spec, position, 0.125)
    launched = become((programs, 9000, 8))
    other, other_lse = run(q, layer._view(), layer.spec, position, 0.125)
    assert launched[0]["grid"][0] == (programs if programs > 1 else 6)
    torch.testing.assert_close(out, other, atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(lse, other_lse, atol=1e-3, rtol=1e-4)
