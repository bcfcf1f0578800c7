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


def _store(x: Tensor, dtype: torch.dtype) -> Tensor:
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
    return torch.where(spread > 0, _store(scale, dtype).clamp_min(least), 0.0)


def symmetric_offset(bits: int) -> float:
    """The code that stands for 0 on a symmetric grid: `zero = -offset * scale`."""
    return 0.5 if bits == 1 else float(2 ** (bits - 1))


def refit_unit(bits: int, group: int) -> float:
    """Parts of a step of the grid in a refit: as many as keep sums over a group exact."""
    return float(2 ** min(20, 25 - bits - (group - 1).bit_length()))


def _inverse(scale: Tensor) -> Tensor:
    """The reciprocal, a little too small (see `encode`); 0 of 0."""
    inverse = torch.where(scale > 0, scale, 1.0).reciprocal() * (1 - 2**-21)
    return torch.where(scale > 0, inverse, 0.0)


def fit(
    x: Tensor, valid: Tensor, bits: int, grid: Grid, dtype: torch.dtype
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
        dtype: the dtype that they are stored in.

    Returns:
        `(scale, zero)` `[..., 1]` float32, exactly representable in `dtype` (a symmetric grid's
        zero is a small multiple of its scale).
    """
    finite = valid & x.isfinite()
    top = 2**bits - 1
    if grid == "symmetric":
        # One bit has no zero level: its two levels are -max|x| and +max|x|.
        steps = 0.5 if bits == 1 else float(2 ** (bits - 1) - 1)
        spread = torch.where(finite, x.abs(), 0.0).amax(-1, keepdim=True)
        scale = _store_scale(spread * (1.0 / steps), spread, dtype)
        return scale, -symmetric_offset(bits) * scale
    low = torch.where(finite, x, torch.inf).amin(-1, keepdim=True)
    high = torch.where(finite, x, -torch.inf).amax(-1, keepdim=True)
    # Plus 0.0: whether the least of -0.0 and 0.0 is negative is nowhere defined.
    zero = _store(torch.where(low <= high, low, 0.0), dtype) + 0.0
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
        moved = _store(zero + scale * (shift * (1.0 / unit)), dtype)
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
