"""Quantize and dequantize from a spec: groups, pages, and `PackedTensor`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kivi.checks import check_finite_tensor, check_tensor
from kivi.grids import encode, fit, metadata_dtype, symmetric_offset
from kivi.packing import insert, pack_unit, unpack
from kivi.spec import PAGE_TOKENS, TILE_ROWS, QuantSpec


class Pages(NamedTuple):
    """Storage of N pages of one tensor; every page holds 512 tokens of all heads.

    `words`: `[N, Hkv, bits, 32, D]` int16, or `[N, Hkv, 512, D]` in the tensor's own dtype where
    nothing is quantized. `scale`, `zero`: 16-bit floats, per-channel `[N, Hkv, 512/G, D]`,
    per-token `[N, Hkv, 512, D/G]`; None where the spec has none.
    """

    words: Tensor
    scale: Tensor | None
    zero: Tensor | None

    @property
    def nbytes(self) -> int:
        """Bytes of all pages."""
        return sum(t.nbytes for t in self if t is not None)


def empty_pages(
    spec: QuantSpec | None,
    pages: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device | str | None = None,
) -> Pages:
    """Zeroed pages for a spec (None: unquantized)."""
    if spec is None:
        shape = (pages, num_kv_heads, PAGE_TOKENS, head_dim)
        return Pages(torch.zeros(shape, dtype=dtype, device=device), None, None)
    group = spec.group(head_dim)
    words = (pages, num_kv_heads, spec.bits, TILE_ROWS, head_dim)
    groups = (
        (pages, num_kv_heads, PAGE_TOKENS // group, head_dim)
        if spec.axis == "channel"
        else (pages, num_kv_heads, PAGE_TOKENS, head_dim // group)
    )
    meta = metadata_dtype(dtype)
    return Pages(
        torch.zeros(words, dtype=torch.int16, device=device),
        torch.zeros(groups, dtype=meta, device=device),
        torch.zeros(groups, dtype=meta, device=device) if spec.has_zero else None,
    )


def quantize_unit(
    x: Tensor, spec: QuantSpec, valid: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes and metadata of runs of whole groups.

    Args:
        x: `[..., U, D]`, U a multiple of the group for per-channel specs.
        spec: what to do.
        valid: bool, broadcastable to `[..., U]`; other tokens take no part in a group's statistics
            and their codes are 0.

    Returns:
        codes `[..., U, D]` int16; scale and zero (None if derived) in 16 bit: per-channel
        `[..., U/G, D]`, per-token `[..., U, D/G]`.
    """
    tokens, d = x.shape[-2:]
    group = spec.group(d)
    if valid is None:
        valid = torch.ones(tokens, dtype=torch.bool, device=x.device)
    if spec.axis == "channel":
        grouped = x.float().unflatten(-2, (tokens // group, group)).transpose(-1, -2)
        mask = valid.unflatten(-1, (tokens // group, 1, group))
    else:
        grouped = x.float().unflatten(-1, (d // group, group))
        mask = valid[..., None, None]
    meta = metadata_dtype(x.dtype)
    scale, zero = fit(grouped, mask, spec.bits, spec.grid, meta)
    codes = torch.where(mask, encode(grouped, scale, zero, spec.bits), 0.0).to(torch.int16)
    codes = codes.transpose(-1, -2) if spec.axis == "channel" else codes
    stored = zero.squeeze(-1).to(meta) if spec.has_zero else None
    return codes.reshape(x.shape), scale.squeeze(-1).to(meta), stored


def quantize_pack(
    pages: Pages,
    spec: QuantSpec | None,
    x: Tensor,
    page: Tensor,
    first: Tensor,
    valid: Tensor | None = None,
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
    """
    if x.dim() == 5:
        valid = valid if valid is None else valid.expand(x.shape[:4]).flatten(0, 1)
        x, page, first = x.flatten(0, 1), page.flatten(), first.flatten()
    tokens = x.shape[2]
    index = page[:, None]
    row = first[:, None] + torch.arange(tokens, device=x.device)
    if spec is None:
        pages.words[index, :, row] = x.transpose(1, 2)
        return
    codes, scale, zero = quantize_unit(x, spec, valid)
    if spec.axis == "channel":
        group = spec.group(x.shape[3])
        row = first[:, None] // group + torch.arange(tokens // group, device=x.device)
    assert pages.scale is not None
    pages.scale[index, :, row] = scale.transpose(1, 2)
    if zero is not None and pages.zero is not None:
        pages.zero[index, :, row] = zero.transpose(1, 2)
    for part in pack_unit(codes, spec.bits, first):
        pages.words[index, :, part.tile] = insert(pages.words[index, :, part.tile], part)


def dequantize_pages(pages: Pages, spec: QuantSpec | None, dtype: torch.dtype) -> Tensor:
    """All tokens of the pages, `[N, Hkv, 512, D]` in `dtype`; computed in float32, saturated."""
    if spec is None:
        return pages.words.to(dtype)
    codes = unpack(pages.words, spec.bits).float()
    assert pages.scale is not None
    scale = pages.scale.float()
    zero = -symmetric_offset(spec.bits) * scale if pages.zero is None else pages.zero.float()
    group = spec.group(codes.shape[-1])
    if spec.axis == "channel":
        grouped = codes.unflatten(-2, (-1, group))
        x = torch.addcmul(zero.unsqueeze(-2), grouped, scale.unsqueeze(-2)).flatten(-3, -2)
    else:
        grouped = codes.unflatten(-1, (-1, group))
        x = torch.addcmul(zero.unsqueeze(-1), grouped, scale.unsqueeze(-1)).flatten(-2, -1)
    # Half a step above the largest element a sum can leave float16's range.
    top = torch.finfo(dtype).max
    return x.clamp(-top, top).to(dtype)


@dataclass(frozen=True, eq=False)
class PackedTensor:
    """A quantized tensor `[B, Hkv, T, D]` in the cache's own page format.

    `pages.words` is `[B * n, Hkv, ...]` with `n = ceil(T / 512)` pages for each sequence.
    """

    pages: Pages
    spec: QuantSpec | None
    shape: tuple[int, int, int, int]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes allocated, whole pages counted."""
        return self.pages.nbytes


@torch.no_grad()
def quantize(
    x: Tensor, spec: QuantSpec | None, *, name: str = "x", check_finite: bool = False
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
    padded = F.pad(x, (0, 0, 0, n * PAGE_TOKENS - t)).unflatten(2, (n, PAGE_TOKENS))
    page = torch.arange(b * n, device=x.device)
    token = page[:, None, None] % n * PAGE_TOKENS + torch.arange(PAGE_TOKENS, device=x.device)
    quantize_pack(pages, spec, padded.transpose(1, 2).flatten(0, 1), page, page * 0, token < t)
    return PackedTensor(pages, spec, (b, h, t, d), x.dtype)


def dequantize(packed: PackedTensor) -> Tensor:
    """The tensor `[B, Hkv, T, D]` that a PackedTensor stands for, in its original dtype."""
    b, h, t, d = packed.shape
    x = dequantize_pages(packed.pages, packed.spec, packed.dtype)
    return x.view(b, -1, h, PAGE_TOKENS, d).transpose(1, 2).reshape(b, h, -1, d)[:, :, :t]
