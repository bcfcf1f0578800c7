"""Whole pages and exact tokens from one lookup: what quantize_pack and write_new store."""

import math

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")
from kivi import KVSpec, LayerCache, QuantSpec
from kivi.kernels import triton_portable
from kivi.kernels.triton_prompt import store_pages
from kivi.kernels.triton_quantize import quantize_pack
from kivi.quantize import empty_pages
from kivi.steps import exact_slots, stretches
from kivi.view import CacheView

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
pytestmark = pytest.mark.skipif(
    not (GPU or triton_portable.INTERPRETED), reason="needs a GPU or the interpreter"
)
KIVI = KVSpec(QuantSpec(2, "channel", 32), QuantSpec(2, "token", 32), 128)
OTHER = KVSpec(None, QuantSpec(4, "token", 16, "symmetric"), 32, 16)


def view_of(spec: KVSpec, like: Tensor, pages: int) -> CacheView:
    (b, h, _, d), where = like.shape, (like.dtype, DEVICE)
    key, value = (empty_pages(one, pages, h, d, *where) for one in (spec.key, spec.value))
    exact = [torch.full((b, h, exact_slots(spec), d), math.nan, device=DEVICE).to(like.dtype)] * 2
    none = torch.zeros(b, dtype=torch.int64, device=DEVICE)
    return CacheView(key, value, none[:, None], none, exact[0], exact[1].clone(), none)


def assert_same(one: CacheView, other: CacheView) -> None:
    for a, b in zip(one.tensors(), other.tensors(), strict=True):
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@pytest.mark.parametrize(
    ("spec", "dtype", "order"),
    [
        (KIVI, torch.bfloat16, "tokens first"),
        (KIVI, torch.float32, "heads first"),
        (OTHER, torch.float16, "tokens first"),
    ],
)
def test_bytes(spec: KVSpec, dtype: torch.dtype, order: str) -> None:
    """From a column on; one page is the bin's."""
    t, column = 1100, spec.sink_length
    k, v = (torch.randn(2, 1, t, 32, device=DEVICE).to(dtype) for _ in "kv")
    if order == "tokens first":
        k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v))
    page = torch.tensor([[3, 1], [0, 2]], device=DEVICE)
    place = stretches(spec, [0, 0], t)
    assert place is not None
    ours, others = view_of(spec, k, 4), view_of(spec, k, 4)
    for _ in range(2):  # compiled at first, launched again later
        assert store_pages(ours, spec, k, v, column, page, page * 0, place)
    for x, pages, one in zip((k, v), others[:2], (spec.key, spec.value), strict=True):
        runs = x[:, :, column : column + 1024].unflatten(2, (2, 512)).transpose(1, 2)
        quantize_pack(pages, one, runs, page, page * 0)
    for x, exact in ((k, others.exact_key), (v, others.exact_value)):
        for first, slot, count in place:
            exact[:, :, slot : slot + count] = x[:, :, first : first + count]
    assert_same(ours, others)
    assert store_pages(ours, spec, v, k, column, page, page * 0, None)
    assert torch.equal(ours.exact_key.nan_to_num(), others.exact_key.nan_to_num())


def test_who_gets_quantize_pack() -> None:
    """Mapped formats, channels that are not neighbours, odd addresses, and whoever looks on."""
    k = torch.randn(1, 1, 512, 32, device=DEVICE)
    page = torch.ones(1, 1, dtype=torch.int64, device=DEVICE)
    view, untouched = view_of(KIVI, k, 2), view_of(KIVI, k, 2)
    rotated = QuantSpec(2, "token", 32, transform="hadamard")
    odd = torch.cat([k, k], 3)[..., 1:33]
    for spec, x in (
        (KVSpec(rotated, rotated), k),
        (KIVI, k.transpose(2, 3).contiguous().transpose(2, 3)),
        (KIVI, odd),
        (KIVI, k.clone().requires_grad_()),
    ):
        assert not store_pages(view, spec, x, x, 0, page, page * 0, [(0, 0, 32)])

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    with Seen():
        assert not store_pages(view, KIVI, k, k, 0, page, page * 0, [(0, 0, 32)])
    assert_same(view, untouched)


@pytest.mark.parametrize("sinks", [0, 4])
@pytest.mark.parametrize("lengths", [(1024,), (1500,), (4, 1100), (256, 1000)])
def test_a_layer_stores_the_same(sinks: int, lengths: tuple[int, ...]) -> None:
    """Prompts that fill pages, leave one unfinished, or go on with one."""
    spec = KVSpec(KIVI.key, KIVI.value, 128, sinks)
    layers = [
        LayerCache(spec, 1, 1, 32, dtype=torch.float16, device=DEVICE, impl="triton") for _ in "ab"
    ]
    assert layers[0]._ops.store_pages is store_pages
    layers[1]._ops = layers[1]._ops._replace(store_pages=None)
    for t in lengths:
        k, v = (torch.randn(1, 1, t, 32, device=DEVICE).half() for _ in "kv")
        for layer in layers:
            layer.append(k, v)
    assert layers[0].lengths() == layers[1].lengths()
    for a, b in zip(layers[0]._view().tensors(), layers[1]._view().tensors(), strict=True):
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))
