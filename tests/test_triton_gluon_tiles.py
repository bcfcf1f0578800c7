"""The Gluon decode kernel's tiles on the CPU: what hardware and compiler do in them.

See gluon_on_cpu.py for what the stand-in shows.
"""

from types import SimpleNamespace

import pytest
import torch
from gluon_memory import WRITTEN, Shared
from gluon_on_cpu import Kernel, convert_layout
from ptx_on_cpu import lanes_of
from test_triton_decode import BRAIN, GPU, HALF
from triton._C.libtriton import gluon_ir, ir

from kivi.kernels import triton_tile_gluon
from kivi.transforms import inverse_hadamard

pytestmark = pytest.mark.skipif(GPU, reason="there the kernel runs as it is: test_triton_fast.py")


def held(x: torch.Tensor) -> Shared:
    """In shared memory."""
    return Shared(x, torch.full(x.shape, WRITTEN))


@pytest.fixture(scope="module")
def own() -> SimpleNamespace:
    """All that the kernel's files define."""
    files = Kernel("triton_gluon", "decode_kernel").files.values()
    return SimpleNamespace(**{name: x for names in files for name, x in names.items()})


@pytest.mark.parametrize("rows", [16, 32, 128])
def test_lanes_hold_what_the_compiler_says(rows: int, own: SimpleNamespace) -> None:
    context = ir.context()
    ir.load_dialects(context)
    builder, mma = gluon_ir.GluonOpBuilder(context), triton_tile_gluon.MMA.value
    real = builder.to_linear_layout(mma._to_ir(builder), [rows, 8])
    of_heads, spelled = torch.empty(rows // 8, 8, 4), own.rows_of_heads(rows)
    for x, layout in ((torch.empty(rows, 8), real), (of_heads, spelled), (of_heads[0], own.LANES)):
        assert torch.equal(lanes_of(x), lanes_of(convert_layout(x, layout)))


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("upper", [0, 1])
def test_products_of_bytes(bits: int, upper: int, own: SimpleNamespace) -> None:
    words = torch.randint(-(2**15), 2**15, (32, 64), dtype=torch.int16)
    x = torch.randint(-32600, 32601, (64, 4))
    both = own.bytes_of(words, upper, 32, 64)
    down = torch.tensor([1.0, 2.0**-9, 2.0**40, 2.0**-100])  # by head: what whole numbers count
    added = x.view(8, 8, 4) * down + own.offset(down)
    operand = own.operand(added, 64)
    for plane in range(8 // bits):
        got = own.whole_product(own.codes_of(both, bits, plane), operand, 32)
        byte = (words.long() >> 8 * upper) & 255
        codes = byte & (2**bits - 1) << bits * plane
        codes -= 128 * (plane == 8 // bits - 1)
        torch.testing.assert_close(
            got.view(32, 4).double(), (codes @ x).double(), rtol=1e-7, atol=0
        )
    words &= 0x7777
    low, high = own.bytes_of(words, upper, 32, 64), own.bytes_of(words >> 4, upper, 32, 64)
    assert torch.equal(own.half_down(low) & 7, high & 7)


def test_rows_of_heads(own: SimpleNamespace) -> None:
    x = torch.randn(8, 4)
    assert torch.equal(own.largest_row(x), x.amax(0).expand(8, 4))
    torch.testing.assert_close(own.sum_of_rows(x), x.sum(0).expand(8, 4))
    up, down = own.to_largest(x.abs())
    assert torch.equal(up * down, torch.ones(8, 4)) and up.log2().frac().eq(0).all()
    assert ((x * up).abs() <= 32600).all() and ((x * up).abs() > 16299).all()
    for d, block in ((128, 1), (128, 32), (128, 128), (256, 64), (256, 256)):
        y = torch.randn(d, 4)
        want = inverse_hadamard(y.mT, block).mT
        for n in range(1, d // 128 + 1):
            parts = own.unmapped(own.pieces(y.view(-1, 8, 4), d, n), d, block)
            got = torch.cat([x.reshape(-1, 4) for x in parts])
            torch.testing.assert_close(got * 2.0 ** own.inverse_scale(block), want)
        if block > 1:
            y = torch.randint(-2047, 2048, (4, d)) * 2.0**14  # as much as TF32 takes
            got = own.rotated(y, d, block).view(d, 4)
            assert torch.equal(got, inverse_hadamard(y, block).mT)


@pytest.mark.parametrize("planes", [2, 4])
def test_slots_of_planes(planes: int, own: SimpleNamespace) -> None:
    plane, x = torch.arange(4) % planes, torch.randn(8, 4)
    assert torch.equal(own.plane_of_slot(planes), plane.expand(8, 4).int())
    assert torch.equal(own.by_plane(2.0, -3, 4, planes)[0], 2.0 ** -(3.0 * plane % 4))
    by_head = x.view(8, 4 // planes, planes)
    for got, want in (
        (own.largest_plane(x, planes), by_head.amax(-1, keepdim=True)),
        (own.sum_of_planes(x, planes), by_head.sum(-1, keepdim=True)),
    ):
        torch.testing.assert_close(got.view(by_head.shape), want.expand(by_head.shape))
    numbers = torch.randn(planes, 32, 4).half()
    want = numbers.view(planes, 4, 8, 4).permute(1, 2, 0, 3)
    for first, n in ((0, 4), (2, 2)):
        got = own.plane_numbers(held(numbers), planes, 4, first, n)
        assert torch.equal(got, want[:, :, plane, first : first + n])
        got = own.one_plane(held(numbers[1]), 4, first, n)
        assert torch.equal(got, want[:, :, 1, first : first + n])
    for groups in {1, 2, planes}:
        numbers = torch.randn(groups, 64).half()
        got = own.group_numbers(held(numbers), planes, groups, 64)
        want = numbers.view(groups, 8, 8)[plane * groups // planes].permute(1, 2, 0)
        assert torch.equal(got, want.float())
    masks = own.plane_masks(planes)
    for i in range(planes):
        assert torch.equal(
            masks[i], -(plane == i).repeat_interleave(2).expand(32, 8).to(torch.int8)
        )


@pytest.mark.parametrize("dtype", [HALF, BRAIN])
def test_results_and_operands(dtype: torch.dtype, own: SimpleNamespace) -> None:
    x = torch.randn(32, 8).to(dtype)
    assert torch.equal(own.transpose_blocks(x), x)
    assert torch.equal(own.heads_as_rows(x), torch.cat([x.mT, torch.zeros(8, 32, dtype=dtype)]))
    half = own.halves(torch.cat([x[:8], x[8:16]]).float())[1]
    for row in range(8):
        assert torch.equal(own.row_of(half, row, 8), x[8 + row].float().expand(8, 8))
    assert torch.equal(own.in_every_row(half[:1].expand(8, 8)), half[:1].expand(32, 8))
    y, z = torch.randn(2, 32, 8).to(dtype)
    error = (x.double() * y.double() - (x * y).double()).to(dtype)
    assert torch.equal(own.product_error(x, y, x * y), error)
    assert torch.equal(own.multiply_add(x, 1.5, z), (x.double() * 1.5 + z).float().to(dtype))
    assert torch.equal(own.products(x, y.float()), x.float() * y.float())


@pytest.mark.parametrize("dtype", [HALF, BRAIN])
def test_rounding_is_carried(dtype: torch.dtype, own: SimpleNamespace) -> None:
    """A query times scales: of two channels 8 apart together, only the second one's is left."""
    q, scales = torch.randn(64, 8).to(dtype), torch.rand(64).to(dtype)
    exact = (q.double() * scales.double()[:, None]).view(4, 2, 8, 8)
    got = own.scaled_query(q, scales, 64).double().view(4, 2, 8, 8)
    bound = torch.finfo(dtype).eps / 2 * got[:, 1].abs() + torch.finfo(dtype).tiny
    assert ((got - exact).sum(1).abs() <= bound).all()
    assert not ((got - exact)[:, 0].abs() <= bound / 4).all()
