"""quantize_pack of tokens that are mapped, centered or smoothed: `kivi::quantize_mapped`."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor

from kivi.grids import COVER, STEP, metadata_dtype, zero_code
from kivi.kernels.triton_formats import VECTOR, lanes
from kivi.kernels.triton_pack_mapped import quantize_mapped
from kivi.kernels.triton_portable import FAST
from kivi.packing import widths
from kivi.quantize import Pages
from kivi.spec import PAGE_TOKENS, TILE_ROWS, WORD_BITS, QuantSpec
from kivi.transforms import drops_small


@cache
def _has_tensor_cores(device: torch.device) -> bool:
    """Whether a GPU of NVIDIA's has what triton_tile_mma.py takes."""
    return device.type == "cuda" and torch.cuda.get_device_properties(device).major >= 9


@cache
def _constants(
    spec: QuantSpec, unit: int, d: int, dtype: torch.dtype, fast: bool, tensor: bool
) -> dict[str, Any]:
    """What the kernel is compiled for, and how it shares elements out to threads."""
    group, info = spec.group(d), torch.finfo(metadata_dtype(dtype))
    bits, top = spec.bits, 2**spec.bits - 1
    start = spec.clip * 2 / top
    if spec.grid == "symmetric":
        start = spec.clip / (0.5 if bits == 1 else 2 ** (bits - 1) - 1)
    elif spec.grid == "unbiased":
        start = STEP[bits] if bits in STEP else COVER[bits] * 2 / top
    small = drops_small(spec, dtype)
    tensor = tensor and small and lanes(d) == 4 and spec.block(d) >= 4 * VECTOR
    put = min(unit, WORD_BITS // widths(spec.bits)[0] * TILE_ROWS) // TILE_ROWS
    least = max(info.smallest_normal * info.eps, torch.finfo(torch.float32).smallest_normal)
    offset, of_dtype = zero_code(bits, spec.grid), (info.max, info.eps, least)
    return {
        "FORMAT": (bits, spec.grid, group, spec.clip, start, offset, *of_dtype, fast),
        "MAP": spec.block(d),
        "U": unit,
        "D": d,
        "PADDED": triton.next_power_of_2(d),
        "CENTERED": spec.center // TILE_ROWS if spec.center else put,
        "PUT": put,
        "LANES": lanes(d),
        "VECTOR": VECTOR,
        "SMALL": small,
        "TENSOR": tensor,
        "num_warps": min(16, lanes(d)),
        # Without a limit the compiler takes twice as many for fewer waits: half as many programs.
        **({"maxnreg": 168 if tensor else 128} if fast else {}),
    }


def _aligned(x: Tensor) -> Tensor:
    """What can be read 16 bytes at a time from every token on."""
    strides = [n for n, size in zip(x.stride(), x.shape, strict=True) if size > 1]
    steps = [n * x.element_size() for n in strides[:-1]]
    if x.stride(-1) == 1 and not any(n % 16 for n in (x.data_ptr(), *steps)):
        return x
    return x.clone(memory_format=torch.contiguous_format)


def _op(
    words: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    center: Tensor | None,
    x: Tensor,
    page: Tensor,
    first: Tensor,
    valid: Tensor | None,
    smooth: Tensor | None,
    bits: int,
    group_size: int | None,
    grid: str,
    clip: float,
    transform: str | None,
) -> None:
    assert all(t is None or t.is_contiguous() for t in (words, scale, zero, center))
    x = _aligned(x)
    if smooth is not None:
        smooth = _aligned(smooth)
    page, first = page.contiguous(), first.contiguous()
    rows = x if x.dim() == 5 else x.unsqueeze(1)
    (_, n, heads, unit, d), strides = rows.shape, rows.stride()[:4]
    tokens = None if center is None else PAGE_TOKENS // center.shape[2]
    spec = QuantSpec(bits, "token", group_size, grid, clip, transform, tokens)  # type: ignore[arg-type]
    constants = _constants(spec, unit, d, x.dtype, FAST, FAST and _has_tensor_cores(x.device))
    of_smooth = (0, 0) if smooth is None else smooth.stride()[:2]
    of_valid = (0, 0, 0) if valid is None else valid.stride()
    tensors = (words, scale, zero, center, x, smooth, page, first, valid)
    with torch.cuda.device_of(x):
        quantize_mapped[(page.numel() * heads,)](
            *tensors, heads, n, *strides[:3], *of_smooth, *of_valid, 0, strides[3], **constants
        )


_LIBRARY = torch.library.Library(__name__.partition(".")[0], "FRAGMENT")
_LIBRARY.define(
    "quantize_mapped(Tensor(a!) words, Tensor(b!) scale, Tensor(c!)? zero, Tensor(d!)? center, "
    "Tensor x, Tensor page, Tensor first, Tensor? valid, Tensor? smooth, int bits, "
    "int? group_size, str grid, float clip, str? transform) -> ()"
)
_LIBRARY.impl("quantize_mapped", _op, "CompositeExplicitAutograd")
torch.library.register_fake("kivi::quantize_mapped", lambda *_: None, lib=_LIBRARY)


def quantize_pack_mapped(
    pages: Pages,
    spec: QuantSpec,
    x: Tensor,
    page: Tensor,
    first: Tensor,
    valid: Tensor | None,
    smooth: Tensor | None,
) -> None:
    """`triton_quantize.quantize_pack` for specs that are not plain; `valid` is expanded."""
    of_spec = (spec.bits, spec.group_size, spec.grid, float(spec.clip), spec.transform)
    assert pages.scale is not None
    torch.ops.kivi.quantize_mapped.default(*pages[:4], x, page, first, valid, smooth, *of_spec)
