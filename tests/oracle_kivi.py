"""KIVI in numpy and float64, written from the paper (2402.02750) and the page format's description.

It shares no code with kivi: not the grid, not the bit layout, not the window, not the attention.
Everything works on one head of one row, `[T, D]`, in plain loops over groups. The paper does not
say how a tie is rounded, and float32 arithmetic may fall to either side of one: within a relative
2^-20 of a tie the oracle returns both outcomes (`low`, `high`) instead of one.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

PAGE = 512
NEAR = 2.0**-20
"""Relative distance from a rounding tie at which either outcome is right."""


def array(x: torch.Tensor) -> np.ndarray:
    """A tensor's exact values in float64."""
    return x.detach().double().cpu().numpy()


# ---------------------------------------------------------------- 16 bit


def round16(x: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """Round float64 to float16 or bfloat16, half to even, saturating."""
    bits, least = (11, -24) if dtype == torch.float16 else (8, -133)
    largest = (2.0 - 2.0 ** (1 - bits)) * 2.0 ** (15 if dtype == torch.float16 else 127)
    x = np.clip(np.asarray(x, dtype=np.float64), -largest, largest)
    exponent = np.frexp(x)[1]
    step = np.ldexp(1.0, np.maximum(exponent - bits, least))
    return np.rint(x / step) * step


def between(stored: np.ndarray, exact: np.ndarray, slack: np.ndarray, dtype: torch.dtype) -> bool:
    """Whether `stored` is `exact`, off by at most `slack`, rounded to 16 bit."""
    low, high = round16(exact - slack, dtype), round16(exact + slack, dtype)
    return bool(((low <= stored) & (stored <= high)).all())


# ---------------------------------------------------------------- the grid: section 3.2, eq. 1


class Grouped(NamedTuple):
    """Codes and metadata of one head `[T, D]`: `low` and `high` differ only at rounding ties.

    `scale`, `zero`: per-channel `[groups, D]`, per-token `[T, groups]`.
    """

    low: np.ndarray
    high: np.ndarray
    scale: np.ndarray
    zero: np.ndarray


def groups(tokens: int, channels: int, axis: str, group: int) -> list[tuple[slice, slice]]:
    """Index of every group: G tokens of a channel, or G channels of a token."""
    if axis == "channel":
        starts = range(0, tokens, group)
        return [(slice(t, t + group), slice(c, c + 1)) for t in starts for c in range(channels)]
    starts = range(0, channels, group)
    return [(slice(t, t + 1), slice(c, c + group)) for t in range(tokens) for c in starts]


def scale_and_zero(x: np.ndarray, bits: int) -> tuple[float, float]:
    """Eq. 1 before rounding to 16 bit: `z = min X`, `s = (max X - min X) / (2^B - 1)`."""
    return float(x.max() - x.min()) / (2**bits - 1), float(x.min())


def encode(
    x: np.ndarray, bits: int, axis: str, group: int, scale: np.ndarray, zero: np.ndarray
) -> Grouped:
    """Eq. 1, `Q(X) = round((X - z) / s)`, with the stored (rounded) scale and zero."""
    low, high = np.zeros(x.shape, int), np.zeros(x.shape, int)
    for index, s, z in zip(groups(*x.shape, axis, group), scale.flat, zero.flat, strict=True):
        if s == 0:  # a constant group: code 0 and z say it all
            continue
        exact = (x[index] - z) / s
        slack = NEAR * (np.abs(exact) + 1)
        low[index] = np.clip(np.rint(exact - slack), 0, 2**bits - 1)
        high[index] = np.clip(np.rint(exact + slack), 0, 2**bits - 1)
    return Grouped(low, high, scale, zero)


def published(
    x: np.ndarray, bits: int, axis: str, group: int, dtype: torch.dtype
) -> tuple[np.ndarray, np.ndarray]:
    """What eq. 1 makes of one head `[T, D]`: dequantized values `[n, T, D]`, and each one's step.

    The n outcomes differ only where a scale or a code falls on a rounding tie.
    """
    index = groups(*x.shape, axis, group)
    zero = round16(np.array([x[i].min() for i in index]), dtype)
    top = np.array([x[i].max() for i in index])
    exact = np.maximum(top - zero, 0.0) / (2**bits - 1)
    outcomes = []
    for side in (-NEAR, NEAR):
        scale = round16(exact * (1 + side), dtype)
        codes = encode(x, bits, axis, group, scale, zero)
        outcomes += [decode(c, axis, group, scale, zero) for c in (codes.low, codes.high)]
    step = decode(np.ones(x.shape), axis, group, exact, 0 * exact)
    return np.stack(outcomes), step


def stored_as_published(
    x: np.ndarray,
    bits: int,
    axis: str,
    group: int,
    scale: np.ndarray,
    zero: np.ndarray,
    dtype: torch.dtype,
) -> bool:
    """Whether stored scales and zeros are eq. 1's, rounded to 16 bit."""
    index = groups(*x.shape, axis, group)
    exact = np.array([scale_and_zero(x[i], bits) for i in index])
    zeros = between(zero.ravel(), exact[:, 1], 0.0 * exact[:, 1], dtype)
    # The scale spans to the stored zero, which a float32 tensor's minimum may be rounded to.
    top = np.array([x[i].max() for i in index])
    spread = np.maximum(top - zero.ravel(), 0.0) / (2**bits - 1)
    return zeros and between(scale.ravel(), spread, NEAR * spread, dtype)


def decode(
    codes: np.ndarray, axis: str, group: int, scale: np.ndarray, zero: np.ndarray
) -> np.ndarray:
    """`X' = Q(X) * s + z`, exactly."""
    out = np.zeros(codes.shape)
    for index, s, z in zip(groups(*codes.shape, axis, group), scale.flat, zero.flat, strict=True):
        out[index] = codes[index] * s + z
    return out


# ---------------------------------------------------------------- the page format


def read_codes(words: np.ndarray, bits: int) -> np.ndarray:
    """Codes `[512, D]` of a page `[bits, 32, D]` of int16 words, one token and bit field at a time.

    A part of w bits has 16/w planes of 32 tokens in each tile; 3 bits are a 2-bit part in tiles 0
    and 1 and a 1-bit part in tile 2.
    """
    unsigned = words.astype(np.int64) % 2**16
    codes = np.zeros((PAGE, words.shape[-1]), int)
    weight, first_tile = 1, 0
    for width in (2, 1) if bits == 3 else (bits,):
        tokens_per_tile = 16 // width * 32
        for token in range(PAGE):
            tile, inside = divmod(token, tokens_per_tile)
            plane, row = divmod(inside, 32)
            field = unsigned[first_tile + tile, row] // 2 ** (plane * width) % 2**width
            codes[token] += weight * field
        weight, first_tile = weight * 2**width, first_tile + width
    return codes


# ---------------------------------------------------------------- the window: section 3.3


def quantized_tokens(length: int, residual: int, unit: int, sinks: int = 0) -> int:
    """How many tokens after the sinks are quantized.

    The paper's Algorithm 1 keeps `l mod R` keys and R values exact; here both tensors keep at least
    R tokens, and leave the window a unit of whole groups at a time.
    """
    return max(0, length - sinks - residual) // unit * unit


# ---------------------------------------------------------------- attention


def attention(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    allowed: np.ndarray,
    scale: float,
    softcap: float | None = None,
    s_aux: np.ndarray | None = None,
) -> np.ndarray:
    """Softmax attention of one row: q `[Hq, T, D]`, k `[Hkv, N, D]`, v `[Hkv, N, Dv]`.

    `allowed [T, N]` says what each query sees; nothing else is even read. A query that sees nothing
    returns 0.
    """
    hq, t, _ = q.shape
    shared = hq // k.shape[0]
    out = np.zeros((hq, t, v.shape[-1]))
    for j in range(t):
        seen = np.flatnonzero(allowed[j])
        if not seen.size:
            continue
        for h in range(hq):
            scores = k[h // shared][seen] @ q[h, j] * scale
            if softcap is not None:
                scores = softcap * np.tanh(scores / softcap)
            top = scores.max() if s_aux is None else max(scores.max(), s_aux[h])
            weight = np.exp(scores - top)
            total = weight.sum() + (0.0 if s_aux is None else np.exp(s_aux[h] - top))
            out[h, j] = weight @ v[h // shared][seen] / total
    return out


def allowed_keys(
    past: int,
    valid: np.ndarray,
    window: int | None = None,
    mask: np.ndarray | None = None,
) -> np.ndarray:
    """What T new columns of a row see of its `past` tokens and of each other, `[T, past + T]`.

    Columns that are not valid have no position and nobody sees them. `mask [T, T]` replaces causal
    order and window among the new columns.
    """
    t = valid.size
    # A column that is not valid takes the position that the next valid one has.
    position = past + np.cumsum(valid) - valid
    query = position[:, None]
    old = np.ones((t, past), bool) if window is None else query - np.arange(past) < window
    if mask is None:
        mask = np.tri(t, dtype=bool)
        if window is not None:
            mask &= query - position < window
    return np.concatenate([old, mask & valid], 1)
