"""Grids: how a group's scale and zero are found, and how codes are computed with them.

A group's elements lie along one dimension. Scale and zero are stored in 16 bit, and codes are
always computed with the *stored* values, so that rounding them costs no more than it must.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kivi.spec import Grid


def metadata_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of scales and zeros: bfloat16 for bfloat16 tensors, else float16.

    A 16-bit tensor's minimum is then stored without rounding, so a constant group is exact.
    """
    return torch.bfloat16 if dtype == torch.bfloat16 else torch.float16


def round_to(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Round float32 to what `dtype` can store, half to even; saturate instead of overflowing.

    Spelled out because compilers keep a 16-bit intermediate in float32: codes would then be
    computed with another scale than the one that is stored.
    """
    info = torch.finfo(dtype)
    x = x.clamp(-info.max, info.max)
    power = (x.view(torch.int32) & 0x7F800000).view(torch.float32)  # 2^floor(log2|x|)
    # A subnormal step is fixed; below float32's normal range GPUs may flush to zero.
    least = max(info.smallest_normal * info.eps, torch.finfo(torch.float32).smallest_normal)
    step = (power * info.eps).clamp_min(least)
    inverse = (0x7F000000 - step.view(torch.int32)).view(torch.float32)
    return (x * inverse).round() * step


def _store_scale(scale: Tensor, spread: Tensor, dtype: torch.dtype) -> Tensor:
    """A stored scale is 0 only for a constant group, else at least the least usable value."""
    info = torch.finfo(dtype)
    least = max(info.smallest_normal * info.eps, torch.finfo(torch.float32).smallest_normal)
    return torch.where(spread > 0, round_to(scale, dtype).clamp_min(least), 0.0)


def symmetric_offset(bits: int) -> float:
    """The code that stands for 0 on a symmetric grid: `zero = -offset * scale`."""
    return 0.5 if bits == 1 else float(2 ** (bits - 1))


def zero_code(bits: int, grid: Grid) -> float:
    """The code that stands for 0 on a grid that stores no zero: `zero = -zero_code * scale`."""
    return symmetric_offset(bits) if grid == "symmetric" else (2**bits - 1) / 2


def refit_unit(bits: int, group: int) -> float:
    """Parts of a step of the grid in a refit: as many as keep sums over a group exact."""
    return float(2 ** min(20, 25 - bits - (group - 1).bit_length()))


def _inverse(scale: Tensor) -> Tensor:
    """The reciprocal, a little too small (see `encode`); 0 of 0."""
    inverse = torch.where(scale > 0, scale, 1.0).reciprocal() * (1 - 2**-21)
    return torch.where(scale > 0, inverse, 0.0)


# The largest element in whole parts is below this. Sums of whole numbers are exact, so that their
# order does not matter (see `fit`): sums of squares over a group of 512 fit int32. Where there are
# few levels so do few parts: a part fits a byte, and float32 takes its sums.
FIXED = 2**10
FEW = 2**7
# Where the refit of an unbiased grid starts. Few levels: the step that is best for a Gaussian, in
# standard deviations (Max, 1960, table II); many must reach the largest element, or most of it.
# A refit of the step of two or four levels takes less than 1 % off the error.
STEP = {1: 1.596, 2: 0.9957, 3: 0.586}
REFITS = {1: 0, 2: 0, 3: 1}
COVER = {4: 0.9, 8: 1.0}


def fixed_point(x: Tensor, valid: Tensor, most: int = FIXED) -> tuple[Tensor, Tensor, Tensor]:
    """`x [..., G]` in whole parts.

    Returns:
        parts, int32 up to `most`, the largest at least half of that (below 2^-117, fewer); what is
        not finite or not valid is 0. What a part is worth, a power of two; the largest element.
    """
    finite = valid & x.isfinite()
    peak = torch.where(finite, x.abs(), 0.0).amax(-1, keepdim=True)
    power = (peak.view(torch.int32) & 0x7F800000).view(torch.float32)  # 2^floor(log2 peak)
    part = power.clamp_min(2.0**-117) * (2 / most)
    inverse = (0x7F000000 - part.view(torch.int32)).view(torch.float32)
    return torch.where(finite, x * inverse, 0.0).round().to(torch.int32), part, peak


def total(x: Tensor) -> Tensor:
    """Sum of int32 over the last dimension as float32 `[..., 1]`, rounded once."""
    return x.sum(-1, keepdim=True, dtype=torch.int32).float()


def norm(x: Tensor, valid: Tensor, dtype: torch.dtype) -> Tensor:
    """Euclidean norm of `x [..., G]` as stored, `[..., 1]`; 0 only of zeros."""
    parts, part, peak = fixed_point(x, valid)
    return _store_scale(total(parts * parts).sqrt() * part, peak, dtype)


MEAN_STEP = 8


def mean(x: Tensor, valid: Tensor) -> Tensor:
    """Means over tokens, `[..., 1, D]`, of `x [..., C, D]` float32; C a power of two.

    Sums have a fixed order: steps of 8 tokens one after the other, then halves.
    """
    finite = valid & x.isfinite()
    steps = (torch.where(finite, x, 0.0) / x.shape[-2]).split(MEAN_STEP, -2)
    sums = steps[0]
    for step in steps[1:]:
        sums = sums + step
    while sums.shape[-2] > 1:
        low, high = sums.chunk(2, -2)
        sums = low + high
    count = finite.expand_as(x).sum(-2, keepdim=True).clamp_min(1)
    means: Tensor = sums * (x.shape[-2] / count)
    return means


def divide(x: Tensor, norm: Tensor) -> Tensor:
    """`x / norm`, 0 where the norm is 0, the same in every implementation."""
    return x * _inverse(norm)


def unbiased(x: Tensor, valid: Tensor, bits: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Codes of least squared error with 0 halfway between two, and a scale that is unbiased.

    Such codes are a shrunk estimate of x: attention scores computed with them are too small, all
    the more the coarser the grid. The stored scale is the one with which `<quantized, x> = <x, x>`,
    as in EDEN (2108.08842).

    Args:
        x: see `fit`, as what follows.
        valid: see x.
        bits: see x.
        dtype: see x.

    Returns:
        codes `[..., G]`, 0 where not valid, and the scale `[..., 1]`, both float32.
    """
    finite = (valid & x.isfinite()).expand_as(x)
    if bits in STEP:
        parts, part, peak = fixed_point(x, valid, FEW)
        size, inner = parts.abs(), 2 ** (bits - 1)
        squares = total(size * size)
        step = (squares / finite.sum(-1, keepdim=True).clamp_min(1)).sqrt() * STEP[bits]
        for refit in reversed(range(REFITS[bits] + 1)):
            over = torch.zeros_like(size)
            for i in range(1, inner):
                over = over + (size > (step * i).floor().clamp_max(FEW - 1))
            level = torch.where(finite, 2 * over + 1, 0)
            product = total(size * level)
            if refit:
                step = 2 * product / total(level * level).clamp_min(1.0)
        # What is not finite gets an outermost level, NaN the lowest.
        over = torch.where(finite, over, inner - 1)
        negative = torch.where(finite, x.signbit(), ~(valid & (x > 0)))
        codes = torch.where(negative, inner - 1 - over, inner + over).float()
    else:
        top = 2**bits - 1
        parts, part, peak = fixed_point(x, valid)
        scale = _store_scale(peak * (COVER[bits] * 2 / top), peak, dtype)
        for _ in range(2):
            codes = torch.where(valid, encode(x, scale, -top / 2 * scale, bits), 0.0)
            level = torch.where(finite, 2 * codes - top, 0.0).to(torch.int32)
            product = total(parts * level)
            ratio = product / total(level * level).clamp_min(1.0)
            scale = _store_scale(ratio * (2 * part), peak, dtype)
        squares = total(parts * parts)
    return codes, _store_scale(squares / product.clamp_min(1.0) * (2 * part), peak, dtype)


def fit(
    x: Tensor,
    valid: Tensor,
    bits: int,
    grid: Grid,
    dtype: torch.dtype,
    clip: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Scale and zero of groups.

    Elements that are not finite or not valid take no part, so a NaN or an infinity never spreads
    over its group: it saturates (NaN to the group's zero).

    Args:
        x: `[..., G]` float32, the group along the last dimension.
        valid: bool, broadcastable to `x`.
        bits: bits per code.
        grid: "asymmetric": `scale = (max - min) / (2^b - 1)`, `zero = min` (KIVI, 2402.02750,
            eq. 1). "symmetric": `scale = max|x| / (2^(b-1) - 1)`, zero derived. "least_squares":
            asymmetric, then the scale and zero that minimise the squared error for its codes.
            "midpoint": `scale = 2 max|x| / (2^b - 1)`, `zero = -max|x|` (exllamav3's cache).
            "unbiased" finds codes too: see `unbiased`.
        dtype: the dtype that they are stored in.
        clip: factor of min, max and max|x|; elements outside saturate.

    Returns:
        `(scale, zero)` `[..., 1]` float32, exactly representable in `dtype` (a symmetric grid's
        zero is a small multiple of its scale).
    """
    finite = valid & x.isfinite()
    top = 2**bits - 1
    assert grid != "unbiased"
    if grid == "midpoint":
        spread = torch.where(finite, x.abs(), 0.0).amax(-1, keepdim=True)
        scale = _store_scale(spread * (clip * 2 / top), spread, dtype)
        return scale, -top / 2 * scale
    if grid == "symmetric":
        # One bit has no zero level: its two levels are -max|x| and +max|x|.
        steps = 0.5 if bits == 1 else float(2 ** (bits - 1) - 1)
        spread = torch.where(finite, x.abs(), 0.0).amax(-1, keepdim=True)
        scale = _store_scale(spread * (clip / steps), spread, dtype)
        return scale, -symmetric_offset(bits) * scale
    low = torch.where(finite, x, torch.inf).amin(-1, keepdim=True)
    high = torch.where(finite, x, -torch.inf).amax(-1, keepdim=True)
    if clip != 1:
        low, high = low * clip, high * clip
    # Plus 0.0: whether the least of -0.0 and 0.0 is negative is nowhere defined.
    zero = round_to(torch.where(low <= high, low, 0.0), dtype) + 0.0
    spread = torch.where(low <= high, high, 0.0) - zero
    # Times the reciprocal, here and in encode: compilers turn a division into that anyway.
    scale = _store_scale(spread * (1.0 / top), spread, dtype)
    if grid == "least_squares":
        # What codes leave over, in parts of a step. Both are whole numbers whose sums are exact, so
        # that their order does not matter: every implementation finds the same scale and zero.
        unit, offset = refit_unit(bits, x.shape[-1]), symmetric_offset(bits)
        place = (x - zero) * _inverse(scale)
        codes = place.clamp(0, top).round()
        rest = ((place - codes).clamp(-1, 1) * unit).round()
        codes, rest = torch.where(finite, codes - offset, 0.0), torch.where(finite, rest, 0.0)
        count = finite.sum(-1, keepdim=True).clamp_min(1).float()
        code_sum, rest_sum = codes.sum(-1, keepdim=True), rest.sum(-1, keepdim=True)
        squares = (codes * codes).sum(-1, keepdim=True)
        products = (codes * rest).sum(-1, keepdim=True)
        variance = count * squares - code_sum * code_sum
        slope = (count * products - code_sum * rest_sum) / variance.clamp_min(1e-9)
        shift = (rest_sum - slope * code_sum) / count - slope * offset
        new = scale + scale * (slope * (1.0 / unit))
        # Without two different codes, or past what 16 bit can hold, there is nothing to refit.
        refit = (variance > 0) & (new > 0) & (spread <= torch.finfo(dtype).max)
        moved = round_to(zero + scale * (shift * (1.0 / unit)), dtype)
        scale = torch.where(refit, _store_scale(new, new, dtype), scale)
        zero = torch.where(refit, moved, zero)
    return scale, zero


def encode(x: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """Codes `round((x - zero) / scale)`, half down, clamped to `[0, 2^b - 1]`; float32.

    16-bit tensors have many elements halfway between two codes. GPUs and compilers differ in the
    last bits of a quotient, so the reciprocal is taken a little too small: every implementation
    then rounds those elements down, and codes are the same everywhere.
    """
    codes = ((x - zero) * _inverse(scale)).round()
    codes = torch.where(codes.isnan(), 0.0, codes)
    return codes.clamp(0, 2**bits - 1)
