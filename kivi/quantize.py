"""Quantize and dequantize from a spec: groups, pages, and `PackedTensor`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kivi.checks import check_finite_tensor, check_tensor
from kivi.grids import (
    divide,
    encode,
    fit,
    mean,
    metadata_dtype,
    norm,
    round_to,
    unbiased,
    zero_code,
)
from kivi.opaque import decode_opaque, encode_opaque
from kivi.packing import insert, pack_unit, unpack
from kivi.spec import PAGE_TOKENS, TILE_ROWS, OpaqueSpec, QuantSpec, Spec
from kivi.transforms import drops_small, hadamard, inverse_hadamard, smooth_factor, without_small


class Pages(NamedTuple):
    """Storage of N pages of one tensor; every page holds 512 tokens of all heads.

    `words`: `[N, Hkv, bits, 32, D]` int16, `[N, Hkv, 512, D]` in the tensor's own dtype where
    nothing is quantized, or `[N, Hkv, 512/U, bytes]` uint8 for an OpaqueSpec. `scale`, `zero`:
    16-bit floats, per-channel `[N, Hkv, 512/G, D]`, per-token `[N, Hkv, 512, D/G]`; `center`
    `[N, Hkv, 512/C, D]` and `norm` `[N, Hkv, 512, 1]` likewise; None where the spec has none.
    """

    words: Tensor
    scale: Tensor | None
    zero: Tensor | None
    center: Tensor | None = None
    norm: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all pages."""
        return sum(t.nbytes for t in self if t is not None)


def new_pages(
    spec: Spec | None,
    pages: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device | str | None = None,
) -> Pages:
    """Pages for a spec (None: unquantized) that are still to be zeroed."""
    if spec is None:
        shape = (pages, num_kv_heads, PAGE_TOKENS, head_dim)
        return Pages(torch.empty(shape, dtype=dtype, device=device), None, None)
    if isinstance(spec, OpaqueSpec):
        shape = (pages, num_kv_heads, PAGE_TOKENS // spec.unit, spec.unit_nbytes(head_dim))
        return Pages(torch.empty(shape, dtype=torch.uint8, device=device), None, None)
    group = spec.group(head_dim)
    words = (pages, num_kv_heads, spec.bits, TILE_ROWS, head_dim)
    groups = (
        (pages, num_kv_heads, PAGE_TOKENS // group, head_dim)
        if spec.axis == "channel"
        else (pages, num_kv_heads, PAGE_TOKENS, head_dim // group)
    )
    meta = metadata_dtype(dtype)

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=meta, device=device)

    return Pages(
        torch.empty(words, dtype=torch.int16, device=device),
        empty(*groups),
        empty(*groups) if spec.has_zero else None,
        empty(pages, num_kv_heads, PAGE_TOKENS // spec.center, head_dim) if spec.center else None,
        empty(pages, num_kv_heads, PAGE_TOKENS, 1) if spec.token_norm else None,
    )


def zero(tensors: Iterable[Tensor | None]) -> None:
    """Zero tensors of one device; small ones of a dtype in one launch, of which large take many."""
    small: dict[torch.dtype, list[Tensor]] = {}
    for x in tensors:
        if x is not None and x.numel() > 2**24:
            x.zero_()
        elif x is not None:
            small.setdefault(x.dtype, []).append(x)
    for group in small.values():
        torch._foreach_zero_(group)


def zeros(shapes: list[tuple[int, ...]], dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Zeroed tensors of one dtype; see `zero`."""
    made = [torch.empty(shape, dtype=dtype, device=device) for shape in shapes]
    zero(made)
    return made


def empty_pages(
    spec: Spec | None,
    pages: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device | str | None = None,
) -> Pages:
    """Zeroed pages for a spec (None: unquantized)."""
    made = new_pages(spec, pages, num_kv_heads, head_dim, dtype, device)
    zero(made)
    return made


class Unit(NamedTuple):
    """Runs of tokens quantized: codes `[..., U, D]` int16, and as in Pages what goes with them."""

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    center: Tensor | None
    norm: Tensor | None


def quantize_unit(
    x: Tensor, spec: QuantSpec, valid: Tensor | None = None, smooth: Tensor | None = None
) -> Unit:
    """Codes and metadata of runs of whole groups.

    Args:
        x: `[..., U, D]`, U a multiple of the group for per-channel specs.
        spec: what to do.
        valid: bool, broadcastable to `[..., U]`; other tokens take no part in a group's statistics
            and their codes are 0.
        smooth: what channels are divided by, broadcastable to x.

    Returns:
        codes; scale and zero per-channel `[..., U/G, D]`, per-token `[..., U, D/G]`, center
        `[..., U/C, D]` and norm `[..., U, 1]` in 16 bit, None what the spec has not.
    """
    tokens, d = x.shape[-2:]
    group, meta = spec.group(d), metadata_dtype(x.dtype)
    if valid is None:
        valid = torch.ones(tokens, dtype=torch.bool, device=x.device)
    small = drops_small(spec, x.dtype)
    x = x.float()
    own = x if smooth is None else x / smooth
    own = hadamard(without_small(own) if small else own, spec.block(d))
    center = size = None
    if spec.center:
        # The mean of what a map gives is what it gives for the mean.
        means = mean(
            x.unflatten(-2, (-1, spec.center)), valid.unflatten(-1, (-1, spec.center))[..., None]
        )
        means = means if smooth is None else means / smooth.unsqueeze(-2)
        means = hadamard(means, spec.block(d))
        center = round_to(torch.where(means.isfinite(), means, 0.0), meta)
        own = (own.unflatten(-2, (-1, spec.center)) - center).flatten(-3, -2)
    if spec.token_norm:
        size = norm(own, valid[..., None], meta)
        own = divide(own, size)
    if spec.axis == "channel":
        grouped = own.unflatten(-2, (tokens // group, group)).transpose(-1, -2)
        mask = valid.unflatten(-1, (tokens // group, 1, group))
    else:
        grouped = own.unflatten(-1, (d // group, group))
        mask = valid[..., None, None]
    if spec.grid == "unbiased":
        (codes, scale), zero = unbiased(grouped, mask, spec.bits, meta), None
    else:
        scale, zero = fit(grouped, mask, spec.bits, spec.grid, meta, spec.clip)
        codes = torch.where(mask, encode(grouped, scale, zero, spec.bits), 0.0)
    codes = codes.transpose(-1, -2) if spec.axis == "channel" else codes
    return Unit(
        codes.reshape(x.shape).to(torch.int16),
        scale.squeeze(-1).to(meta),
        zero.squeeze(-1).to(meta) if zero is not None and spec.has_zero else None,
        None if center is None else center.squeeze(-2).to(meta),
        None if size is None else size.to(meta),
    )


def quantize_pack(
    pages: Pages,
    spec: Spec | None,
    x: Tensor,
    page: Tensor,
    first: Tensor,
    valid: Tensor | None = None,
    smooth: Tensor | None = None,
    position: Tensor | None = None,
    weight: Tensor | None = None,
) -> None:
    """Quantize runs of tokens and write them into their pages, in place.

    Two runs that share a word tile must not be in one call (`packing.units_per_tile`).

    Args:
        pages: the storage.
        spec: None stores `x` as it is.
        x: `[N, Hkv, U, D]`, or `[B, n, Hkv, U, D]`: N = B * n runs, n in each row. U whole groups
            and whole planes, dividing 512.
        page: `[N]` or `[B, n]` int64, the page of each run (page 0 is a bin: an implementation may
            drop what goes there).
        first: like page, the run's first token in its page, a multiple of U.
        valid: bool, broadcastable to x without D: tokens that count (default: all).
        smooth: `[N or B, Hkv, D]` float32 powers of two that the channels of a row are divided by.
        position: like page, the run's first token in its row: a format with a rope asks for it.
        weight: like x with 1 for D, float32: a format that weighs tokens asks for it.
    """
    if smooth is not None:
        smooth = smooth.unsqueeze(-2)
    if x.dim() == 5:
        position = position if position is None else position.flatten()
        weight = weight if weight is None else weight.flatten(0, 1)
        if smooth is not None:
            smooth = smooth.unsqueeze(1).expand(*x.shape[:3], 1, -1).flatten(0, 1)
        valid = valid if valid is None else valid.expand(x.shape[:4]).flatten(0, 1)
        x, page, first = x.flatten(0, 1), page.flatten(), first.flatten()
    tokens = x.shape[2]
    index = page[:, None]
    row = first[:, None] + torch.arange(tokens, device=x.device)
    if spec is None:
        pages.words[index, :, row] = x.transpose(1, 2)
        return
    if isinstance(spec, OpaqueSpec):
        encode_opaque(pages.words, spec, x, index, first, valid, position, weight)
        return
    unit = quantize_unit(x, spec, valid, smooth)
    for stored, new in zip(pages[1:], unit[1:], strict=True):
        if stored is not None and new is not None:
            size = PAGE_TOKENS // stored.shape[2]  # tokens that share an entry
            row = first[:, None] // size + torch.arange(new.shape[2], device=x.device)
            stored[index, :, row] = new.transpose(1, 2)
    codes = unit.codes
    for part in pack_unit(codes, spec.bits, first):
        pages.words[index, :, part.tile] = insert(pages.words[index, :, part.tile], part)


def dequantize_pages(
    pages: Pages, spec: Spec | None, dtype: torch.dtype, head_dim: int | None = None
) -> Tensor:
    """All tokens of the pages, `[N, Hkv, 512, D]` in `dtype`; computed in float32, saturated.

    `head_dim`: D, which the pages of an OpaqueSpec do not tell.
    """
    if spec is None:
        return pages.words.to(dtype)
    if isinstance(spec, OpaqueSpec):
        assert head_dim is not None
        return saturate(decode_opaque(pages.words, spec, head_dim).flatten(2, 3), dtype)
    codes = unpack(pages.words, spec.bits).float()
    assert pages.scale is not None
    scale = pages.scale.float()
    zero = pages.zero
    zero = -zero_code(spec.bits, spec.grid) * scale if zero is None else zero.float()
    group = spec.group(codes.shape[-1])
    if spec.axis == "channel":
        grouped = codes.unflatten(-2, (-1, group))
        x = torch.addcmul(zero.unsqueeze(-2), grouped, scale.unsqueeze(-2)).flatten(-3, -2)
    else:
        grouped = codes.unflatten(-1, (-1, group))
        x = torch.addcmul(zero.unsqueeze(-1), grouped, scale.unsqueeze(-1)).flatten(-2, -1)
    if pages.norm is not None:
        x = x * pages.norm.float()
    if pages.center is not None:
        x = x + pages.center.float().repeat_interleave(PAGE_TOKENS // pages.center.shape[2], 2)
    x = inverse_hadamard(x, spec.block(x.shape[-1]))
    # Half a step above the largest element a sum can leave float16's range.
    return saturate(x, dtype)


def saturate(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x` in `dtype`, finite."""
    top = torch.finfo(dtype).max
    return x.clamp(-top, top).to(dtype)


@dataclass(frozen=True, eq=False)
class PackedTensor:
    """A quantized tensor `[B, Hkv, T, D]` in the cache's own page format.

    `pages.words` is `[B * n, Hkv, ...]` with `n = ceil(T / 512)` pages for each sequence; `smooth`
    `[B, Hkv, 1, D]` what their channels were divided by, if the spec asks for it.
    """

    pages: Pages
    spec: Spec | None
    shape: tuple[int, int, int, int]
    dtype: torch.dtype
    smooth: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the pages, counted whole."""
        return self.pages.nbytes


@torch.no_grad()
def quantize(
    x: Tensor, spec: Spec | None, *, name: str = "x", check_finite: bool = False
) -> PackedTensor:
    """Quantize a whole tensor.

    Args:
        x: `[B, Hkv, T, D]` float16, bfloat16 or float32, any T, any strides. The last group may
            be incomplete: only its own tokens enter its statistics.
        spec: None keeps the values as they are.
        name: how errors call `x`.
        check_finite: refuse NaN and infinities. Without it they saturate within their group.

    Raises:
        ValueError: for a wrong shape or dtype, a group size that does not fit the head
            dimension, or elements that are not finite if `check_finite`.
    """
    check_tensor(name, x)
    if check_finite:
        check_finite_tensor(name, x)
    b, h, t, d = x.shape
    n = max(1, -(-t // PAGE_TOKENS))
    pages = empty_pages(spec, b * n, h, d, x.dtype, x.device)
    smooth = None
    if spec is not None and spec.smooth:
        every = torch.ones(t, dtype=torch.bool, device=x.device)
        smooth = smooth_factor(x, every, spec.smooth)
    padded = F.pad(x, (0, 0, 0, n * PAGE_TOKENS - t)).unflatten(2, (n, PAGE_TOKENS))
    page = torch.arange(b * n, device=x.device).view(b, n)
    token = torch.arange(n * PAGE_TOKENS, device=x.device).view(n, 1, PAGE_TOKENS)
    start = page % n * PAGE_TOKENS
    runs = padded.transpose(1, 2)
    quantize_pack(pages, spec, runs, page, page * 0, token < t, smooth, start)
    smooth = None if smooth is None else smooth.unsqueeze(2)
    return PackedTensor(pages, spec, (b, h, t, d), x.dtype, smooth)


def dequantize(packed: PackedTensor) -> Tensor:
    """The tensor `[B, Hkv, T, D]` that a PackedTensor stands for, in its original dtype."""
    b, h, t, d = packed.shape
    dtype = packed.dtype if packed.smooth is None else torch.float32
    x = dequantize_pages(packed.pages, packed.spec, dtype, d)
    x = x.view(b, -1, h, PAGE_TOKENS, d).transpose(1, 2).reshape(b, h, -1, d)[:, :, :t]
    return x if packed.smooth is None else saturate(x * packed.smooth, packed.dtype)
