"""What a LayerCache refuses or fails at leaves it as it was."""

import math
import re

import pytest
import torch
from cache_checks import (
    KIVI,
    filled,
    new,
    randn,
    references_are_right,
    same,
    same_cache,
    state,
    tokens,
)
from one_thread import one_thread  # noqa: F401
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kivi import KVSpec, LayerCache

# ---------------------------------------------------------------- refusals


def bad_calls():
    """(what to call on a filled layer of 2 rows, words that the error must hold)."""
    k, v, q = randn(2, 1, 5, 16), randn(2, 1, 5, 16), randn(2, 4, 5, 16)
    ones = torch.ones(2, 5, dtype=torch.bool)
    square = torch.ones(1, 1, 5, 5, dtype=torch.bool)
    cases = [
        ("prefill", (k, v), {}, ["prefill needs an empty cache", "[60, 60]", "reset()"]),
        ("append", (k[..., :8], v), {}, ["k has head dimension 8", "16"]),
        ("append", (k, v[..., :8]), {}, ["v has head dimension 8", "16"]),
        ("append", (k[0], v), {}, ["k has shape (1, 5, 16)"]),
        ("append", (k, None), {}, ["v is NoneType"]),
        ("append", ([[1.0]], v), {}, ["k is list"]),
        ("append", (k, v, [[True] * 5] * 2), {}, ["valid is list", "(2, 5)", "torch.bool"]),
        ("decode", (None, k, v), {}, ["q is NoneType", "[2, a multiple of 1, 5, 16]"]),
        ("decode", (q, k, v), dict(mask=True), ["mask is bool"]),
        ("decode", (q, k, v), dict(s_aux=[0.0] * 4), ["s_aux is list", "(4,)"]),
        ("decode", (q, k, v), dict(s_aux=torch.zeros(4).long()), ["s_aux", "torch.int64"]),
        ("decode", (q, k, v), dict(softcap="a"), ["softcap='a'"]),
        ("decode", (q.to("meta"), k, v), {}, ["q has shape", "meta", "cpu"]),
        ("append", (k, v, ones.to("meta")), {}, ["valid", "meta", "cpu"]),
        ("append", (k[:1], v), {}, ["k has shape (1, 1, 5, 16)", "(2, 1, 5, 16)"]),
        ("append", (k, v[:, :, :4]), {}, ["v has shape (2, 1, 4, 16)", "(2, 1, 5, 16)"]),
        ("append", (k.repeat(1, 2, 1, 1), v), {}, ["k has shape (2, 2, 5, 16)"]),
        ("append", (k.half(), v), {}, ["k has", "torch.float16", "torch.float32"]),
        ("append", (k, v.bfloat16()), {}, ["v has", "torch.bfloat16", "torch.float32"]),
        ("append", (k.double(), v), {}, ["k.dtype=torch.float64"]),
        ("append", (k, v, ones[:1]), {}, ["valid has shape (1, 5)", "(2, 5)"]),
        ("append", (k, v, ones[:, :4]), {}, ["valid has shape (2, 4)", "(2, 5)"]),
        ("append", (k, v, ones.long()), {}, ["valid", "torch.int64", "torch.bool"]),
        ("decode", (q, k[..., :8], v), {}, ["k has head dimension 8"]),
        ("decode", (q, k, v[:1]), {}, ["v has shape (1, 1, 5, 16)"]),
        ("decode", (q[..., :8], k, v), {}, ["q has shape (2, 4, 5, 8)"]),
        ("decode", (q[:1], k, v), {}, ["q has shape (1, 4, 5, 16)"]),
        ("decode", (q[:, :, :4], k, v), {}, ["q has shape (2, 4, 4, 16)"]),
        ("decode", (q[0], k, v), {}, ["q has shape (4, 5, 16)"]),
        ("decode", (q[:, :0], k, v), {}, ["q has shape (2, 0, 5, 16)"]),
        ("decode", (q.half(), k, v), {}, ["q has", "torch.float16", "torch.float32"]),
        ("decode", (q, k, v), dict(valid=ones[:, :4]), ["valid has shape (2, 4)"]),
        ("decode", (q, k, v), dict(mask=square[..., :4]), ["mask has shape (1, 1, 5, 4)"]),
        ("decode", (q, k, v), dict(mask=square[0]), ["mask has shape (1, 5, 5)"]),
        (
            "decode",
            (q, k, v),
            dict(mask=square.repeat(3, 1, 1, 1)),
            ["mask has shape (3, 1, 5, 5)"],
        ),
        ("decode", (q, k, v), dict(mask=square.float()), ["mask", "torch.float32", "torch.bool"]),
        ("decode", (q, k, v), dict(s_aux=torch.zeros(3)), ["s_aux has shape (3,)", "(4,)"]),
        ("decode", (q, k, v), dict(sliding_window=0), ["sliding_window=0"]),
        ("decode", (q, k, v), dict(sliding_window=-4), ["sliding_window=-4"]),
        ("decode", (q, k, v), dict(softcap=0.0), ["softcap=0.0"]),
        ("crop", (61,), {}, ["tokens=61", "[60, 60]"]),
        ("crop", (-1,), {}, ["tokens=-1", ">= 0"]),
        ("crop", (1.0,), {}, ["tokens=1.0"]),
        ("crop", (True,), {}, ["tokens=True"]),
        ("select", ([],), {}, ["indices=[]", "0 to 1"]),
        ("select", ([0, 2],), {}, ["indices=[0, 2]", "0 to 1"]),
        ("select", ([-1],), {}, ["indices=[-1]"]),
        ("select", (torch.tensor([0, 5]),), {}, ["indices=[0, 5]"]),
        ("select", (torch.tensor([[0, 1]]),), {}, ["indices="]),
        ("select", ([True, False],), {}, ["indices=[True, False]"]),
        ("select", ([0.0, 1.0],), {}, ["indices=[0.0, 1.0]"]),
        (
            "append",
            tuple(x.repeat(1, 1, 100, 1) for x in (k, v)),
            {},
            ["k has 500", "max_length=200"],
        ),
        ("decode", tuple(x.repeat(1, 1, 29, 1) for x in (q, k, v)), {}, ["205", "max_length=200"]),
    ]
    return [
        pytest.param(*case, id=re.sub(r"[^\w=.,-]+", " ", f"{case[0]} {case[3][0]}"))
        for case in cases
    ]


@pytest.mark.parametrize("max_length", [None, 200])
@pytest.mark.parametrize(("name", "arguments", "options", "words"), bad_calls())
def test_a_refused_call_names_the_argument_and_changes_nothing(
    name, arguments, options, words, max_length
):
    layer = filled(60, max_length=max_length)
    if any("max_length" in word for word in words) and max_length is None:
        return
    before = state(layer)
    with pytest.raises(ValueError) as error:
        getattr(layer, name)(*arguments, **options)
    for word in words:
        assert word in str(error.value)
    assert state(layer) == before


@pytest.mark.parametrize("name", ["k", "v"])
def test_check_finite_refuses_and_names_the_argument(name):
    layer = filled(60, check_finite=True)
    k, v = tokens(layer, 40)
    valid = torch.ones(2, 40, dtype=torch.bool)
    valid[1, :3] = False
    (k if name == "k" else v)[1, 0, 2, 5] = math.inf
    before = state(layer)
    for call in (
        lambda: layer.append(k, v),
        lambda: layer.decode(randn(2, 1, 40, 16), k, v),
    ):
        with pytest.raises(ValueError, match=rf"^{name} has 1 NaN or infinite elements"):
            call()
        assert state(layer) == before
    layer.append(k, v, valid)  # padding may hold anything
    assert layer.lengths() == [100, 97]


def test_max_length_counts_tokens_not_columns():
    layer = filled(60, max_length=100)
    k, v = tokens(layer, 50)
    layer.append(k, v, torch.arange(50) < torch.tensor([[40], [3]]))
    assert layer.lengths() == [100, 63]
    before = state(layer)
    one = tokens(layer, 1)
    with pytest.raises(ValueError, match="max_length=100"):
        layer.append(*one)
    assert state(layer) == before
    layer.append(*one, torch.tensor([[False], [True]]))
    assert layer.lengths() == [100, 64]


@pytest.mark.parametrize("fails", [0, 1, 2, 3])
@pytest.mark.parametrize("t", [1, 31, 100])
@pytest.mark.parametrize("call", ["append", "decode"])
def test_a_call_that_fails_half_way_can_be_repeated(call, t, fails):
    """Out of memory in an operator: all is as it was, and the call can be made again."""
    layer, twin = (filled(97, KVSpec(KIVI.key, KIVI.value, 32, 2)) for _ in range(2))
    assert layer.packed_lengths() == [32, 32]
    k, v = tokens(layer, t, seed=5)
    q, ops, calls = randn(2, 2, t, 16), layer._ops, 0

    def failing(*arguments):
        nonlocal calls
        calls += 1
        if calls > fails:
            raise RuntimeError("out of memory")
        return ops.quantize_pack(*arguments)

    def do(layer):
        layer.append(k, v) if call == "append" else layer.decode(q, k, v)

    dense = layer.dequantize()
    layer._ops = ops._replace(quantize_pack=failing)
    if fails < 2:  # keys and values of one unit are packed at least
        with pytest.raises(RuntimeError, match="out of memory"):
            do(layer)
    else:
        try:
            do(layer)
        except RuntimeError:
            pass
        else:
            return
    assert layer.lengths() == [97, 97] and layer.packed_lengths() == [32, 32]
    assert all(same(x, y) for x, y in zip(layer.dequantize(), dense, strict=True))
    layer._ops = ops
    do(layer)
    do(twin)
    assert same_cache(layer, twin)


class OutOfMemory(TorchDispatchMode):
    """The n-th allocation of a kilobyte or more fails."""

    def __init__(self, n: int | None = None) -> None:
        super().__init__()
        self.n, self.count = n, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        held = {x.untyped_storage().data_ptr() for x in tree_leaves(args) if torch.is_tensor(x)}
        new = [x.untyped_storage() for x in tree_leaves(out) if torch.is_tensor(x)]
        if any(x.nbytes() >= 1024 and x.data_ptr() not in held for x in new):
            self.count += 1
            if self.count == self.n:
                raise torch.OutOfMemoryError
        return out


def shared_rows() -> LayerCache:
    """Rows of different lengths that share pages with each other and with a fork."""
    layer = new(KIVI)
    k, v = tokens(layer, 600)
    layer.prefill(k, v, torch.arange(600) < torch.tensor([[600], [590]]))
    layer.select([0, 1, 1])
    layer.other = layer.fork()
    return layer


CALLS = {
    "append 1": lambda layer: layer.append(*tokens(layer, 1, 5)),
    "append 31": lambda layer: layer.append(*tokens(layer, 31, 5)),
    "append 100": lambda layer: layer.append(*tokens(layer, 100, 5)),
    "decode 31": lambda layer: layer.decode(randn(3, 1, 31, 16), *tokens(layer, 31, 5)),
    "decode 100": lambda layer: layer.decode(randn(3, 1, 100, 16), *tokens(layer, 100, 5)),
    "crop": lambda layer: layer.crop(200),
    "select": lambda layer: layer.select([1, 0, 0]),
    "more rows": lambda layer: layer.select([1, 1, 0, 2, 2]),
    "fork": lambda layer: layer.fork(),
    "reset": lambda layer: layer.reset(),
}


def round_rows(length: int = 1100) -> LayerCache:
    """Rows that share pages with a fork, two of which come round at the next steps."""
    layer = new(KIVI, sliding_window=40)
    layer.append(*tokens(layer, length))
    layer.select([0, 1, 1])
    layer.other = layer.fork()
    return layer


@pytest.mark.parametrize("t", [1, 100])
def test_whichever_allocation_fails_as_pages_come_round(t):
    """A step that writes a shared page again: what is still seen outlives a failure."""

    def call(layer):
        return layer.decode(randn(3, 1, t, 16), *tokens(layer, t, 5))

    length = 3 * 512 + 35 + 31 - t + 1
    twin = round_rows(length)
    with OutOfMemory() as all_of_them:
        expected = call(twin)
    total = all_of_them.count
    assert twin._pages.opened == [4, 4, 4]
    for n in sorted({*range(1, total + 1, total // 15 + 1), *range(max(1, total - 8), total + 1)}):
        layer = round_rows(length)
        seen = [x[:, :, -170:] for x in layer.dequantize()]
        with pytest.raises(torch.OutOfMemoryError), OutOfMemory(n):
            call(layer)
        for each in (layer, layer.other):
            now = [x[:, :, -170:] for x in each.dequantize()]
            assert all(same(x, y) for x, y in zip(now, seen, strict=True)), n
        assert references_are_right(layer, layer.other)
        assert same(call(layer), expected)
        assert same_cache(layer, twin)


def test_a_failure_that_cost_tokens_is_not_hidden():
    """A step over many pages overwrites what its first tokens see; if it fails, nothing goes on."""
    layer, twin = round_rows(), round_rows()
    big = tokens(layer, 1500, 5)
    with OutOfMemory() as all_of_them:
        twin.append(*big)
    with pytest.raises(torch.OutOfMemoryError), OutOfMemory(all_of_them.count - 4):
        layer.append(*big)
    with pytest.raises(ValueError, match="a step that failed has overwritten"):
        layer.append(*tokens(layer, 1, 6))
    layer.reset()
    layer.append(*big)
    other = new(KIVI, batch=3, sliding_window=40)
    other.append(*big)
    assert all(same(x, y) for x, y in zip(layer.dequantize(), other.dequantize(), strict=True))


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_whichever_allocation_fails_the_call_can_be_repeated(call):
    twin = shared_rows()
    before, lengths = twin.dequantize(), twin.lengths()
    with OutOfMemory() as all_of_them:
        call(twin)
    total = all_of_them.count
    # Some of many, and all of the last: what is written then must be complete at once.
    for n in sorted({*range(1, total + 1, total // 15 + 1), *range(max(1, total - 8), total + 1)}):
        layer = shared_rows()
        with pytest.raises(torch.OutOfMemoryError), OutOfMemory(n):
            call(layer)
        for each in (layer, layer.other):
            assert each.lengths() == lengths
            assert all(same(x, y) for x, y in zip(each.dequantize(), before, strict=True)), n
        assert references_are_right(layer, layer.other)
        call(layer)
        assert same_cache(layer, twin)
        assert all(same(x, y) for x, y in zip(layer.other.dequantize(), before, strict=True))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (dict(batch_size=0), "batch_size=0"),
        (dict(num_kv_heads=-1), "num_kv_heads=-1"),
        (dict(head_dim=1.5), "head_dim=1.5"),
        (dict(value_head_dim=0), "value_head_dim=0"),
        (dict(max_length=0), "max_length=0"),
        (dict(max_length=True), "max_length=True"),
        (dict(dtype=torch.float64), "dtype=torch.float64"),
        (dict(dtype="float16"), "dtype='float16'"),
        (dict(device="nope"), "device='nope'"),
        (dict(device=1.5), "device=1.5"),
        (dict(impl="cuda"), "impl='cuda'"),
        (dict(value_head_dim=40), "group_size=32 does not divide head_dim=40"),
    ],
)
def test_the_constructor_refuses(arguments, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        LayerCache(**(dict(spec=KIVI, batch_size=1, num_kv_heads=1, head_dim=32) | arguments))
