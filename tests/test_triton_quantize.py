"""The Triton quantize_pack writes, byte for byte, what quantize.quantize_pack writes.

Without a GPU the kernels run in Triton's interpreter, which must be asked for before triton is
imported.
"""

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

GPU = torch.cuda.is_available()
if not GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")
triton = pytest.importorskip("triton")
if not GPU and isinstance(triton.language.max, triton.JITFunction):
    pytest.skip("triton was imported before TRITON_INTERPRET=1", allow_module_level=True)

from kivi.kernels import triton_quantize  # noqa: E402
from kivi.quantize import Pages, empty_pages, quantize_pack  # noqa: E402
from kivi.spec import BITS, PAGE_TOKENS, QuantSpec  # noqa: E402

# The interpreter computes with numpy, which warns of NaN and overflow.
pytestmark = [pytest.mark.filterwarnings("ignore::RuntimeWarning"), *[pytest.mark.gpu] * GPU]
DEVICE = "cuda" if GPU else "cpu"
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
GRIDS = ("asymmetric", "symmetric", "least_squares")
KINDS = (
    "plain",
    "ties",
    "zeros",
    "constant",
    "zero",
    "huge",
    "tiny",
    "outlier",
    "nan",
    "inf",
    "offset",
)


def tokens(kind: str, shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Elements of a kind that breaks quantizers."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    some = torch.rand(shape, generator=generator) < 0.05
    top = torch.finfo(dtype).max
    if kind == "ties":
        x = (x * 2).round() / 2
    elif kind == "zeros":  # of both signs
        x = torch.where(some, x.abs(), x * 0)
    elif kind == "constant":
        x = x[..., :1, :1].expand(shape).clone()
    elif kind == "zero":
        x = torch.zeros(shape)
    elif kind == "huge":
        x = (x.double() * top).clamp(-top, top)
    elif kind == "tiny":
        # The interpreter takes subnormal bfloat16 for something else.
        x = x.sign() * (x.abs() + 1) if dtype == torch.bfloat16 and not GPU else x * 0.1
        x = x * torch.finfo(dtype).smallest_normal
    elif kind == "outlier":
        x = torch.where(some, x * 1e4, x).clamp(-6e4, 6e4)
    elif kind == "nan":
        x = torch.where(some, torch.nan, x)
        x[..., :32, :] = torch.nan
    elif kind == "inf":
        x = torch.where(some, x.sign() * torch.inf, x)
    elif kind == "offset":
        x = x * 1e-2 + 5
    return x.to(dtype).to(DEVICE)


def kinds(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """`[N, H, U, D]` with another kind in each run and head."""
    n, h = shape[:2]
    each = [
        tokens(KINDS[(seed + i) % len(KINDS)], shape[2:], dtype, seed + i) for i in range(n * h)
    ]
    return torch.stack(each).view(shape)


def garbage(spec: QuantSpec | None, h: int, d: int, dtype: torch.dtype, n: int = 5) -> Pages:
    """Pages of random bytes."""
    pages = empty_pages(spec, n, h, d, dtype, DEVICE)
    for t in pages:
        if t is not None:
            t.view(torch.uint8).random_(0, 256)
    return pages


def written(spec, x, first, valid=None, page=(3, 1, 4, 2)) -> tuple[Pages, Pages]:
    """What the reference and the kernel make of the same pages."""
    n, h, _, d = x.shape
    reference = garbage(spec, h, d, x.dtype)
    kernel = Pages(*(None if t is None else t.clone() for t in reference))
    page = torch.tensor(page[:n], device=DEVICE)
    first = torch.tensor(first, device=DEVICE)
    quantize_pack(reference, spec, x, page, first, valid)
    triton_quantize.quantize_pack(kernel, spec, x, page, first, valid)
    return reference, kernel


def check(spec, x, first, valid=None) -> None:
    reference, kernel = written(spec, x, first, valid)
    for name, a, b in zip(Pages._fields, reference, kernel, strict=True):
        if a is not None:
            wrong = a.view(torch.uint8) != b.view(torch.uint8)
            assert not wrong.any(), f"{name}: {int(wrong.sum())} bytes of {wrong.numel()}"


# ---------------------------------------------------------------- bytes


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("axis", ["channel", "token"])
@pytest.mark.parametrize("bits", BITS)
def test_bytes(bits: int, axis: str, grid: str, dtype: torch.dtype) -> None:
    """All kinds of elements in one plane of a tile; the other planes must stay."""
    spec = QuantSpec(bits, axis, 32, grid)
    check(spec, kinds((1, len(KINDS), 32, 32), dtype), (96,))


SHAPES = [  # bits, axis, group, unit, head dim
    *[(bits, "channel", None, 512, 16) for bits in BITS],
    *[(bits, "channel", 128, 128, 32) for bits in BITS],
    *[(bits, "token", 32, 512, 32) for bits in (1, 3, 8)],
    (2, "channel", 128, 256, 128),
    (4, "channel", 16, 512, 16),
    (3, "channel", 64, 256, 64),
    (2, "channel", 32, 64, 80),
    (2, "channel", 16, 32, 20),
    (2, "channel", 32, 32, 7),
    (2, "token", None, 64, 256),
    (3, "token", None, 32, 80),
    (2, "token", None, 32, 7),
    (2, "token", None, 32, 4),
    (3, "token", None, 64, 2),
    (4, "token", 128, 128, 256),
    (2, "token", 16, 32, 80),
    (2, "token", 20, 64, 80),
    (4, "token", 48, 32, 96),
    (1, "token", 24, 32, 96),
]


@pytest.mark.parametrize(("bits", "axis", "group", "unit", "d"), SHAPES)
def test_shapes(bits: int, axis: str, group: int | None, unit: int, d: int) -> None:
    spec = QuantSpec(bits, axis, group)
    check(spec, kinds((2, 1, unit, d), torch.float16, 7), (0, PAGE_TOKENS - unit))


@st.composite
def calls(draw):
    """A spec, tokens in some layout, and which of them count."""
    axis = draw(st.sampled_from(["channel", "token"]))
    d = draw(st.sampled_from([16, 32, 40, 48, 64]))
    channels = [g for g in range(16, d + 1) if d % g == 0]
    group = draw(st.sampled_from([16, 32, 64] if axis == "channel" else [*channels, None]))
    grid = draw(st.sampled_from(GRIDS))
    spec = QuantSpec(draw(st.sampled_from(BITS)), axis, group, grid)
    unit = draw(st.sampled_from([u for u in (32, 64, 128) if u >= (group or 0)]))
    n, h = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    dtype, seed = draw(st.sampled_from(DTYPES)), draw(st.integers(0, 10**6))
    x = kinds((n, h, unit, d), dtype, seed)
    layout = draw(st.sampled_from(["plain", "heads inside", "wide", "channels first"]))
    if layout == "heads inside":
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
    elif layout == "wide":
        x = torch.nn.functional.pad(x, (3, 5))[..., 3:-5]
    elif layout == "channels first":
        x = x.mT.contiguous().mT
    generator = torch.Generator().manual_seed(seed)
    shape = draw(st.sampled_from([None, (unit,), (n, 1, unit), (h, unit), (n, h, unit)]))
    valid = shape and (torch.rand(shape, generator=generator) < 0.7).to(DEVICE)
    first = [draw(st.integers(0, PAGE_TOKENS // unit - 1)) * unit for _ in range(n)]
    return spec, x, first, valid


@settings(max_examples=25)
@given(calls())
def test_any_call(call) -> None:
    check(*call)


def test_rows_of_a_batch_side_by_side() -> None:
    """What a prefill passes: pages of `[B, H, T, D]` that are not next to each other."""
    x = kinds((1, 2, 1024, 16), torch.bfloat16).unflatten(2, (2, 512)).transpose(1, 2).flatten(0, 1)
    assert not x.is_contiguous()
    check(QuantSpec(4, "channel"), x, (0, 0))


@pytest.mark.parametrize("spec", [QuantSpec(2, "channel", 32), QuantSpec(3, "token", 16), None])
@pytest.mark.parametrize("masked", [False, True])
def test_runs_of_several_rows(spec: QuantSpec | None, masked: bool) -> None:
    """`[B, n, Hkv, U, D]`: a prompt of several rows, not copied together."""
    x = kinds((2, 2, 128, 16), torch.float16).unflatten(2, (2, 64)).transpose(1, 2)
    with pytest.raises(RuntimeError, match="view"):
        x.view(4, 2, 64, 16)
    page, first = torch.tensor([[3, 1], [4, 2]], device=DEVICE), torch.tensor([[0, 64]] * 2)
    valid = torch.rand(2, 2, 1, 64, device=DEVICE) < 0.7 if masked and spec else None
    pages = garbage(spec, 2, 16, x.dtype)
    both = [Pages(*(None if t is None else t.clone() for t in pages)) for _ in range(3)]
    flat = valid if valid is None else valid.flatten(0, 1)
    quantize_pack(both[0], spec, x.flatten(0, 1), page.flatten(), first.flatten().to(DEVICE), flat)
    quantize_pack(both[1], spec, x, page, first.to(DEVICE), valid)
    triton_quantize.quantize_pack(both[2], spec, x, page, first.to(DEVICE), valid)
    for expected, *others in zip(*both, strict=True):
        for other in others:
            assert other is expected is None or torch.equal(
                other.view(torch.uint8), expected.view(torch.uint8)
            )


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
@pytest.mark.parametrize(("unit", "d"), [(32, 7), (512, 16), (64, 80)])
def test_copy(dtype: torch.dtype, unit: int, d: int) -> None:
    check(None, kinds((2, 3, unit, d), dtype), (0, PAGE_TOKENS - unit))


def test_bin_takes_several_runs() -> None:
    spec, x = QuantSpec(2, "channel"), torch.randn(3, 2, 32, 16).to(DEVICE)
    reference, kernel = written(spec, x, (64, 64, 32), page=(0, 0, 2))
    for a, b in zip(reference[:3], kernel[:3], strict=True):
        assert torch.equal(a[1:].view(torch.uint8), b[1:].view(torch.uint8))


# ---------------------------------------------------------------- operator


def arguments(spec: QuantSpec, x: torch.Tensor) -> tuple[object, ...]:
    pages = garbage(spec, x.shape[1], x.shape[3], x.dtype)
    page, first = torch.tensor([2, 1], device=DEVICE), torch.tensor([0, 32], device=DEVICE)
    valid = torch.rand(2, x.shape[1], 32, device=DEVICE) < 0.9
    return (*pages[:3], x, page, first, valid, spec.bits, spec.axis, spec.group_size, spec.grid)


@pytest.mark.parametrize("grid", GRIDS)
def test_operator_is_well_formed(grid: str) -> None:
    x = torch.randn(2, 1, 32, 16, device=DEVICE)
    for spec in (QuantSpec(2, "channel", 32, grid), QuantSpec(2, "token", 16, grid)):
        torch.library.opcheck(torch.ops.kivi.quantize_pack.default, arguments(spec, x))


def test_one_graph() -> None:
    spec, x = QuantSpec(2, "channel"), torch.randn(2, 1, 32, 16, device=DEVICE)
    pages = garbage(spec, 1, 16, x.dtype)
    expected = Pages(*(None if t is None else t.clone() for t in pages))
    page, first = torch.tensor([2, 1], device=DEVICE), torch.tensor([0, 32], device=DEVICE)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def call(pages: Pages, x: torch.Tensor) -> torch.Tensor:
        triton_quantize.quantize_pack(pages, spec, x * 2, page, first)
        return pages.words + 1

    got = call(pages, x)
    quantize_pack(expected, spec, x * 2, page, first)
    assert torch.equal(got, expected.words + 1)
    for a, b in zip(expected[:3], pages[:3], strict=True):
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))


# ---------------------------------------------------------------- GPU only


@pytest.mark.gpu
@pytest.mark.parametrize("axis", ["channel", "token"])
def test_graph_replays_and_nothing_is_compiled_again(axis: str) -> None:
    spec = QuantSpec(2, axis)
    for n in (1, 2, 3, 4):  # other batches
        x = torch.randn(n, 2, 32, 64, device=DEVICE)
        check(spec, x, tuple(range(0, 32 * n, 32)))
        if n == 1:
            compiled = triton_quantize.quantize_tiles.device_caches[torch.cuda.current_device()][0]
            variants = len(compiled)
        assert len(compiled) == variants
    for t in (512, 1536, 2048):  # other prompts
        x = torch.randn(1, 2, t, 64, device=DEVICE).unflatten(2, (-1, 512)).transpose(1, 2)
        check(spec, x.flatten(0, 1), (0,) * (t // 512))
        assert len(compiled) == variants + 1
    x = torch.randn(2, 2, 32, 64, device=DEVICE)
    pages = garbage(spec, 2, 64, x.dtype)
    page, first = torch.tensor([2, 1], device=DEVICE), torch.tensor([0, 32], device=DEVICE)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        triton_quantize.quantize_pack(pages, spec, x, page, first)
    for _ in range(3):
        x.copy_(torch.randn_like(x))
        expected = Pages(*(None if t is None else t.clone() for t in pages))
        quantize_pack(expected, spec, x, page, first)
        graph.replay()
        for a, b in zip(expected[:3], pages[:3], strict=True):
            assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("axis", ["channel", "token"])
@pytest.mark.parametrize("bits", BITS)
def test_many_elements(bits: int, axis: str, grid: str, dtype: torch.dtype) -> None:
    for group, d in ((32, 128), (128, 128), (None, 80)):
        check(QuantSpec(bits, axis, group, grid), kinds((4, 5, 512, d), dtype, 1), (0,) * 4)
