"""New tokens into exact slots by one launch: what torch's copies do, and who still gets those."""

import math

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")
from kivi import KVSpec, QuantSpec
from kivi.kernels import triton_portable
from kivi.kernels.triton_write import STRETCHES, write_new
from kivi.steps import Stretch, ring_slots, stretches

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
pytestmark = pytest.mark.skipif(
    not (GPU or triton_portable.INTERPRETED), reason="needs a GPU or the interpreter"
)


def exact(spec: KVSpec, d: int, dtype: torch.dtype) -> Tensor:
    slots = spec.sink_length + ring_slots(spec) + 1
    return torch.full((2, 3, slots, d), math.nan, device=DEVICE).to(dtype)


def laid_out(order: str, t: int, d: int, dtype: torch.dtype) -> Tensor:
    """`[2, 3, t, d]` in some layout."""
    x = torch.randn(2, 3, t, d, device=DEVICE).to(dtype)
    if order == "tokens first":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if order == "part of more":
        return torch.cat([x, x, x], 3)[..., 1 : 1 + d]
    return x[:, :1].expand(-1, 3, -1, -1) if order == "one head" else x


def both(spec: KVSpec, place: list[Stretch], k: Tensor, v: Tensor) -> None:
    """The kernel and torch write the same, and nothing else."""
    ours, torchs = ([exact(spec, x.shape[3], x.dtype) for x in (k, v)] for _ in "ab")
    assert write_new(*ours, k, v, place)
    for target, new in zip(torchs, (k, v), strict=True):
        for column, slot, count in place:
            target[:, :, slot : slot + count] = new[:, :, column : column + count]
    for a, b in zip(ours, torchs, strict=True):
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("order", ["heads first", "tokens first", "part of more", "one head"])
@pytest.mark.parametrize(("d", "dv"), [(32, 32), (24, 40)])
def test_any_layout(d: int, dv: int, order: str, dtype: torch.dtype) -> None:
    spec = KVSpec(QuantSpec(2, "channel", 32), QuantSpec(2, "token", 16), 16, 4)
    for before, t in ((0, 1), (75, 3)):
        place = stretches(spec, [before, before], t)
        assert place is not None
        both(spec, place, laid_out(order, t, d, dtype), laid_out(order, t, dv, dtype))


def test_every_stretch() -> None:
    """Sinks, the ring up to its end, and its beginning; prompts longer than the ring."""
    spec = KVSpec(QuantSpec(2, "channel", 32), QuantSpec(2, "token", 16), 16, 4)
    seen = set()
    for before in (0, 2, 4, 60, 80, 83):
        for t in (1, 2, 17, 33, 84, 200):
            place = stretches(spec, [before], t)
            assert place is not None
            seen.add(len(place))
            x = torch.randn(2, 3, t, 8, device=DEVICE)
            both(spec, place, x, -x)
    assert seen == {1, 2, STRETCHES}


def test_who_gets_torch() -> None:
    """Slots on the device, channels that are not neighbours, and whoever looks on."""
    spec = KVSpec(QuantSpec(2, "channel", 32), QuantSpec(2, "token", 16), 16)
    k = torch.randn(2, 3, 1, 8, device=DEVICE)
    buffers = exact(spec, 8, k.dtype), exact(spec, 8, k.dtype)
    assert write_new(*buffers, k, k, [(0, 5, 1)])
    slots = torch.zeros(2, 1, dtype=torch.int64, device=DEVICE)
    assert not write_new(*buffers, k, k, (slots, slots))
    assert not write_new(
        *buffers, k.transpose(2, 3)[:, :, :1].expand(-1, -1, -1, 8), k, [(0, 6, 1)]
    )

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    with Seen():
        assert not write_new(*buffers, k, k, [(0, 6, 1)])
    assert not write_new(*buffers, k.requires_grad_(), k, [(0, 6, 1)])
    assert all(x[:, :, 6].isnan().all() for x in buffers)
    with torch.no_grad():
        assert write_new(*buffers, k, k, [(0, 6, 1)])
    assert all(torch.equal(x[:, :, 6:7], k) for x in buffers)
