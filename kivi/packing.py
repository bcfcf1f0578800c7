"""Sub-byte packing. Here, and in the kernels' tile loaders, is the only place that shifts bits.

A *tile* is `[32, D]` int16 words. At `w` bits it has `16 / w` *planes*: plane i holds the codes of
32 tokens at bits `[i*w, (i+1)*w)` of every word. A page of 512 tokens at b bits is b tiles, in the
order of its tokens; 3 bits are stored as a 2-bit part (tiles 0 and 1) and a 1-bit part (tile 2),
so that every width packs exactly.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kivi.spec import TILE_ROWS, WORD_BITS


class Part(NamedTuple):
    """The bits of a run of tokens that go into tiles of one width.

    `words [N, H, n, 32, D]` int32, aligned to bit 0; `tile [N, n]` the tiles that take them;
    `shift [N]` the bit of the first plane; `bits` how many bits of each word they fill.
    """

    words: Tensor
    tile: Tensor
    shift: Tensor
    bits: int


# A table and not a formula: torch.compile then takes the width as a constant.
_WIDTHS = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 8: (8,)}


def widths(bits: int) -> tuple[int, ...]:
    """Widths of the parts that a code of `bits` bits is stored in, low bits first."""
    return _WIDTHS[bits]


def units_per_tile(bits: int, tokens: int) -> int:
    """How many runs of `tokens` tokens can share a tile (of the narrowest part)."""
    return max(1, WORD_BITS // widths(bits)[-1] * TILE_ROWS // tokens)


def pack_unit(codes: Tensor, bits: int, first: Tensor) -> list[Part]:
    """Pack a run of tokens of a page.

    Args:
        codes: `[N, H, U, D]` integer codes below `2**bits`; U a multiple of 32 that divides 512.
        bits: 1, 2, 3, 4 or 8.
        first: `[N]` the run's first token in its page, a multiple of U.

    Returns:
        A Part for each width that the code is stored in.
    """
    n, h, tokens, d = codes.shape
    plane = first // TILE_ROWS
    low, tile0, parts = 0, 0, []
    for width in widths(bits):
        planes = WORD_BITS // width
        together = min(tokens // TILE_ROWS, planes)
        part = (codes.to(torch.int32) >> low) & ((1 << width) - 1)
        part = part.view(n, h, -1, together, TILE_ROWS, d)
        word = part[:, :, :, 0]
        for i in range(1, together):
            word = word | (part[:, :, :, i] << (i * width))
        tile = tile0 + (plane // planes)[:, None] + torch.arange(part.shape[2], device=plane.device)
        parts.append(Part(word, tile, (plane % planes) * width, together * width))
        low, tile0 = low + width, tile0 + width
    return parts


def insert(old: Tensor, part: Part) -> Tensor:
    """Put a part's bits into words, whatever stood there.

    Args:
        old: `[N, n, H, 32, D]` int16, the words of `part.tile`.
        part: what goes in.

    Returns:
        The new words, like `old`.
    """
    new = part.words.transpose(1, 2)
    if part.bits == WORD_BITS:
        return new.to(torch.int16)
    shift = part.shift.to(torch.int32).view(-1, 1, 1, 1, 1)
    mask = ((1 << part.bits) - 1) << shift
    return ((old.to(torch.int32) & ~mask) | (new << shift)).to(torch.int16)


def unpack(words: Tensor, bits: int) -> Tensor:
    """Codes of whole pages.

    Args:
        words: `[..., bits, 32, D]` int16.
        bits: 1, 2, 3, 4 or 8.

    Returns:
        `[..., 512, D]` int16 codes, in the order of the tokens.
    """
    low, tile0, codes = 0, 0, None
    for width in widths(bits):
        shift = torch.arange(0, WORD_BITS, width, dtype=torch.int16, device=words.device)
        tiles = words[..., tile0 : tile0 + width, :, :].unsqueeze(-3)
        part = ((tiles >> shift[:, None, None]) & ((1 << width) - 1)).flatten(-4, -2)
        codes = part if codes is None else codes | (part << low)
        low, tile0 = low + width, tile0 + width
    assert codes is not None
    return codes


def join_bits(codes: Tensor, bits: int) -> Tensor:
    """Codes `[..., n]` below `2**bits` as bytes `[..., n * bits / 8]`, a whole number of them."""
    place = torch.arange(bits, device=codes.device)
    each = ((codes.long().unsqueeze(-1) >> place) & 1).flatten(-2).unflatten(-1, (-1, 8))
    data: Tensor = (each << torch.arange(8, device=codes.device)).sum(-1)
    return data.to(torch.uint8)


def split_bits(data: Tensor, bits: int) -> Tensor:
    """What `join_bits` joined, `[..., n]` int64."""
    each = (data.long().unsqueeze(-1) >> torch.arange(8, device=data.device)) & 1
    each = each.flatten(-2).unflatten(-1, (-1, bits))
    codes: Tensor = (each << torch.arange(bits, device=data.device)).sum(-1)
    return codes


def of_bytes(data: Tensor, dtype: torch.dtype) -> Tensor:
    """Bytes `[..., n]` as numbers of a dtype; a copy, so that they lie where the dtype wants."""
    return data.clone(memory_format=torch.contiguous_format).view(dtype)
