"""The Triton quantize_pack of mapped, centered and smoothed tokens writes the reference's bytes."""

import pytest
import torch
from ptx_in_interpreter import serve_assembly
from test_triton_quantize import (
    DEVICE,
    GPU,
    KINDS,
    Pages,
    garbage,
    kinds,
    tokens,
    triton_quantize,
)

from kivi import KVQuantizer, LayerCache
from kivi.kernels import triton_quantize_mapped
from kivi.kernels.triton_formats import lanes, packs
from kivi.quantize import empty_pages, quantize_pack
from kivi.spec import BITS, QuantSpec

pytestmark = [pytest.mark.filterwarnings("ignore::RuntimeWarning"), *[pytest.mark.gpu] * GPU]
PLUMB = dict(transform="hadamard", center=32)


def factors(*shape: int) -> torch.Tensor:
    return torch.randint(-6, 7, shape).float().exp2().to(DEVICE)


def check(spec, x, first, valid=None, smooth=None, page=None) -> None:
    """`x [N, H, U, D]`, or [B, n, H, U, D]."""
    heads, d, runs = x.shape[-3], x.shape[-1], x.shape[:-3].numel()
    assert packs(spec, d)
    reference = garbage(spec, heads, d, x.dtype, runs + 1)
    kernel = Pages(*(None if t is None else t.clone() for t in reference))
    page = torch.arange(runs, 0, -1) if page is None else torch.tensor(page)
    page = page.view(x.shape[:-3]).to(DEVICE)
    first = torch.tensor(first, device=DEVICE).expand(page.shape)
    quantize_pack(reference, spec, x, page, first, valid, smooth)
    triton_quantize.quantize_pack(kernel, spec, x, page, first, valid, smooth)
    for name, a, b in zip(Pages._fields, reference, kernel, strict=True):
        if a is not None:
            wrong = a[1:].view(torch.uint8) != b[1:].view(torch.uint8)
            assert not wrong.any(), f"{name}: {int(wrong.sum())} bytes of {wrong.numel()}"


@pytest.mark.parametrize(
    ("bits", "dtype"),
    [*((bits, torch.float16) for bits in BITS), (2, torch.bfloat16), (8, torch.bfloat16),
     (2, torch.float32)],
)  # fmt: skip
def test_bytes(bits: int, dtype: torch.dtype) -> None:
    """All kinds of elements in one plane of a tile; the other planes must stay."""
    x = kinds((1, len(KINDS), 32, 16), dtype)
    check(QuantSpec(bits, "token", None, "unbiased", **PLUMB), x, 96)


@pytest.mark.parametrize("grid", ["midpoint", "asymmetric", "symmetric"])
@pytest.mark.parametrize("bits", [1, 2, 4])
def test_other_grids(bits: int, grid: str) -> None:
    x = kinds((1, len(KINDS), 32, 16), torch.float16)
    check(QuantSpec(bits, "token", 16, grid, 0.9, **PLUMB), x, 480)


@pytest.mark.parametrize(
    ("bits", "group", "d", "unit", "center", "transform"),
    [
        (2, None, 128, 128, 128, "hadamard"),
        (2, None, 64, 256, 128, "hadamard"),
        (3, None, 32, 256, 64, "hadamard"),
        (3, None, 32, 512, 128, "hadamard"),
        (8, None, 32, 128, 128, "hadamard"),
        (4, None, 32, 128, 128, None),
        (1, 32, 64, 64, 32, "hadamard_32"),
        (2, 16, 32, 64, None, "hadamard"),
        (2, None, 96, 32, None, "hadamard"),
        (2, None, 80, 32, 32, "hadamard"),
        (1, None, 256, 32, 32, "hadamard"),
    ],
)
def test_shapes(bits, group, d, unit, center, transform) -> None:
    spec = QuantSpec(bits, "token", group, "unbiased", transform=transform, center=center)
    x = kinds((1, 1, unit, d), torch.bfloat16)
    check(spec, x, 512 - unit, smooth=factors(1, 1, d))


@pytest.mark.skipif(GPU, reason="which runs its own assembly")
@pytest.mark.parametrize(
    ("bits", "d", "unit", "dtype", "kind"),
    [
        (1, 64, 512, torch.bfloat16, "outlier"),
        (2, 32, 512, torch.float16, "plain"),
        (2, 64, 128, torch.bfloat16, "nan"),
        (3, 64, 512, torch.float16, "ties"),
        (3, 32, 128, torch.bfloat16, "offset"),
    ],
)
def test_assembly(bits, d, unit, dtype, kind, monkeypatch: pytest.MonkeyPatch) -> None:
    """The path of NVIDIA's GPUs, without their tensor cores."""
    serve_assembly(monkeypatch)
    monkeypatch.setattr(triton_quantize_mapped, "FAST", True)
    x, smooth = tokens(kind, (1, 1, unit, d), dtype), factors(1, 1, d)
    spec = QuantSpec(bits, "token", None, "unbiased", transform="hadamard", center=128)
    check(spec, x, 512 - unit, smooth=smooth)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_centers_stay_finite_where_sums_overflow(dtype: torch.dtype) -> None:
    """What overflows when it is divided is inf or NaN, as the compiler fuses: no bytes of that."""
    spec = QuantSpec(2, "token", None, "unbiased", **PLUMB)
    x = tokens("huge", (1, 2, 32, 32), dtype)
    x[0, 1] = torch.finfo(dtype).max
    page, first = torch.tensor([1], device=DEVICE), torch.tensor([0], device=DEVICE)
    for smooth in (None, factors(1, 2, 32)):
        centers = []
        for pack in (quantize_pack, triton_quantize.quantize_pack):
            pages = empty_pages(spec, 2, 2, 32, dtype, DEVICE)
            pack(pages, spec, x, page, first, None, smooth)
            centers.append(pages.center)
        assert centers[0].isfinite().all() and torch.equal(*centers)


def test_tokens_that_do_not_count() -> None:
    """A mask, tokens of several rows side by side, and what goes to the bin."""
    spec = QuantSpec(2, "token", None, "unbiased", **PLUMB)
    x = kinds((2, 2, 64, 16), torch.float16).unflatten(2, (2, 32)).transpose(1, 2)
    valid = torch.rand(2, 2, 1, 32, device=DEVICE) < 0.7
    valid[1, 0] = False
    check(spec, x, [[0, 32]] * 2, valid, factors(2, 2, 16))
    check(spec, x, [[0, 32]] * 2, None, factors(2, 2, 16), page=(0, 3, 0, 1))
    one = torch.arange(32, device=DEVICE) == 5
    check(QuantSpec(3, "token", None, "unbiased", **PLUMB), x[0], 64, one)
    check(QuantSpec(4, "token", None, "midpoint", **PLUMB), x[0], 64, one)


@pytest.mark.parametrize("layout", ["heads inside", "wide", "channels first"])
def test_layouts(layout: str) -> None:
    x = torch.randn(1, 2, 32, 16).to(torch.bfloat16).to(DEVICE)
    if layout == "heads inside":
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
    elif layout == "wide":
        x = torch.nn.functional.pad(x, (3, 5))[..., 3:-5]
    else:
        x = x.mT.contiguous().mT
    check(QuantSpec(2, "token", None, "unbiased", **PLUMB), x, 32)


def test_lanes_divide_tokens() -> None:
    for d in range(8, 513, 8):
        count = lanes(d)
        assert d % (8 * count) == 0 and count & (count - 1) == 0 and count <= 16


def test_operator_is_well_formed() -> None:
    spec, x = QuantSpec(2, "token", None, "unbiased", **PLUMB), torch.randn(2, 1, 32, 16)
    pages = garbage(spec, 1, 16, x.dtype)
    page, first = torch.tensor([2, 1], device=DEVICE), torch.tensor([0, 32], device=DEVICE)
    valid = torch.rand(2, 1, 32, device=DEVICE) < 0.9
    arguments = (*pages[:4], x.to(DEVICE), page, first, valid, factors(2, 1, 16))
    torch.library.opcheck(
        torch.ops.kivi.quantize_mapped.default,
        (*arguments, 2, None, "unbiased", 1.0, "hadamard"),
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
    )


# ---------------------------------------------------------------- GPU only


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("bits", "grid", "group", "d", "dtype"),
    [
        (2, "unbiased", None, 128, torch.bfloat16),
        (2, "unbiased", None, 64, torch.float16),
        (3, "unbiased", None, 256, torch.bfloat16),
        (1, "unbiased", None, 80, torch.float32),
        (4, "unbiased", None, 128, torch.float16),
        (8, "asymmetric", 32, 128, torch.bfloat16),
        (2, "midpoint", 32, 128, torch.float16),
    ],
)
def test_many_elements(bits: int, grid: str, group: int, d: int, dtype: torch.dtype) -> None:
    spec = QuantSpec(bits, "token", group, grid, transform="hadamard", center=128)
    for seed in range(3):
        x, smooth = kinds((8, 7, 512, d), dtype, seed), factors(8, 7, d)
        # What overflows when it is divided is inf or NaN, as the compiler fuses: not there.
        largest = torch.where(x.isfinite(), x.float().abs(), 0).amax(2)
        smooth = torch.where((largest / smooth).isfinite(), smooth, 1.0)
        check(spec, x, 0, smooth=smooth)


@pytest.mark.gpu
def test_a_cache_is_the_same_with_kernels() -> None:
    """Prompts, flushes in a captured graph and a second turn: bytes as plain torch packs them."""
    layers = [
        LayerCache(KVQuantizer.get("plumb").spec(), 2, 2, 128, dtype=torch.bfloat16, device="cuda",
                   max_length=2048, impl=impl)
        for impl in ("triton", "eager")
    ]  # fmt: skip
    k, v = (3 * torch.randn(2, 2, 1500, 128, device="cuda").to(torch.bfloat16) for _ in range(2))
    k[..., 5] *= 30
    for layer in layers:
        layer.prefill(k[:, :, :700], v[:, :, :700])
    q, new_k, new_v = (torch.zeros(2, h, 1, 128, device="cuda").bfloat16() for h in (8, 2, 2))
    for layer in layers:  # a fork may take pages of its own
        layer.fork().decode(q, new_k, new_v)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        layers[0].decode(q, new_k, new_v)
    for i in range(700, 1000):
        new_k.copy_(k[:, :, i : i + 1])
        new_v.copy_(v[:, :, i : i + 1])
        graph.replay()
        layers[1].decode(q, new_k, new_v)
    for layer in layers:
        layer.append(k[:, :, 1000:], v[:, :, 1000:])
    assert layers[0].packed_lengths() == layers[1].packed_lengths()
    for a, b in zip(layers[0]._view()[:2], layers[1]._view()[:2], strict=True):
        for x, y in zip(a, b, strict=True):
            assert x is y is None or torch.equal(x[1:].view(torch.uint8), y[1:].view(torch.uint8))
