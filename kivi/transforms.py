"""Linear maps of the tokens: quantized is the map of a key or value, attention undoes it.

Keys: `<q, k> = <M^-T q, M k>`, so a kernel may map the query instead. Values: the inverse map of
the output is the output of the inverse maps.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from kivi.spec import QuantSpec, Rope, Smooth

SMOOTHED = 32
"""Tokens, the first packed ones, that the channels' factors are found from."""


SMALL_PART = -10
LEAST_PART = -100


def drops_small(spec: QuantSpec, dtype: torch.dtype) -> bool:
    """Whether tokens are mapped without what is small in them: see `without_small`.

    Only where there are so few levels that their error is at least a hundred times what that adds.
    """
    few = spec.grid == "unbiased" and spec.bits <= 3
    return dtype == torch.bfloat16 and few and spec.transform is not None


def without_small(x: Tensor) -> Tensor:
    """bfloat16 tokens `[..., D]`, float32, with 0 for what is small.

    That is, less than 2^-10 of the token's largest finite element, or than 2^-100. Sums of 64
    elements of 8 bits are then exact in float32 in any order, so that tensor cores may take them.
    """
    size = x.abs()
    peak = torch.where(x.isfinite(), size, 0.0).amax(-1, keepdim=True)
    return torch.where(size < (peak * 2.0**SMALL_PART).clamp_min(2.0**LEAST_PART), 0.0, x)


def hadamard(x: Tensor, block: int) -> Tensor:
    """The Walsh-Hadamard map of each block of `block` channels, `[..., D]` float32; 1: none.

    Times `2^-floor(log2(block) / 2)`, which makes it orthogonal for even powers and sqrt(2) times
    that for odd ones: a power of two rounds nothing. Sums have a fixed order, so that every
    implementation finds the same numbers.
    """
    return _butterflies(x, block) * 2.0 ** -((block.bit_length() - 1) // 2)


def inverse_hadamard(x: Tensor, block: int) -> Tensor:
    """What `hadamard` undoes; also the map of the queries that go with mapped keys."""
    return _butterflies(x, block) * 2.0 ** -(block.bit_length() // 2)


def _butterflies(x: Tensor, block: int) -> Tensor:
    step = 1
    while step < block:
        low, high = x.unflatten(-1, (-1, 2, step)).unbind(-2)
        x = torch.stack([low + high, low - high], -2).flatten(-3)
        step *= 2
    return x


def smooth_factor(x: Tensor, valid: Tensor, smooth: Smooth) -> Tensor:
    """What each channel of a sequence is divided by: powers of two, which round nothing.

    A rotation spreads the error of a channel over all of them. Where queries are small on a channel
    of outliers, and that is what a model learns, the error must stay in it: "outliers" divides by
    `max(1, std / (4 * typical std))`, typical being the median, at least a 16th of the mean. "max"
    divides by `max|x|`, so that all channels are alike (as SmoothQuant, 2211.10438, eq. 4, with all
    of the difficulty moved to the queries).

    Args:
        x: `[..., T, D]`, of which the first 32 tokens count.
        valid: bool, broadcastable to `[..., T]`.
        smooth: which.

    Returns:
        `[..., D]` float32, `2**-14` to `2**14`.
    """
    x = x[..., :SMOOTHED, :].float()
    finite = valid[..., :SMOOTHED, None] & x.isfinite()
    x = torch.where(finite, x, 0.0)
    if smooth == "max":
        ratio = x.abs().amax(-2)
    elif smooth == "sqrt":
        peak = x.abs().amax(-2)
        ratio = torch.maximum(peak, peak.roll(peak.shape[-1] // 2, -1)).sqrt()
    else:
        count = finite.sum(-2).clamp_min(1)
        rest = torch.where(finite, x - (x.sum(-2) / count).unsqueeze(-2), 0.0)
        spread = (rest.square().sum(-2) / count).sqrt()
        typical = spread.median(-1, keepdim=True).values
        typical = torch.maximum(typical, spread.mean(-1, keepdim=True) / 16)
        ratio = spread / (4 * typical).clamp_min(1e-30)
        ratio = ratio.clamp_min(1.0)
    return torch.where(ratio > 0, ratio, 1.0).clamp(2.0**-14, 2.0**14).log2().round().exp2()


def _tables(rope: Rope, device: torch.device) -> tuple[Tensor, Tensor]:
    return torch.tensor(rope.frequency, device=device), torch.tensor(rope.partner, device=device)


# A step, captured or not, copies nothing from the host: what captures one has them made before.
_kept_tables = cache(_tables)


def keep_tables(rope: Rope, device: torch.device) -> None:
    """Make what `turn` takes from the host, for steps to come; nothing while compiling."""
    if not torch.compiler.is_compiling():
        _kept_tables(rope, device)


def turn(x: Tensor, position: Tensor, rope: Rope, back: bool = False) -> Tensor:
    """Tokens `[..., D]` float32 under a rotary embedding, or `back` to what they were before it.

    `position`: of each token, broadcastable to `[...]`. The map is orthogonal whatever the
    positions are, so that turning back and forth changes nothing.
    """
    size = len(rope.frequency)
    tables = _tables if torch.compiler.is_compiling() else _kept_tables
    frequency, other = tables(rope, x.device)
    angle = position.unsqueeze(-1).float() * (-frequency if back else frequency)
    turned = x[..., :size]
    turned = angle.cos() * turned - angle.sin() * turned[..., other]
    return torch.cat([turned, x[..., size:]], -1) if x.shape[-1] > size else turned


@cache
def _random_matrix(rows: int, columns: int, orthogonal: bool, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(columns + orthogonal)
    x = torch.randn(rows, columns, generator=generator, dtype=torch.float64, device="cpu")
    if orthogonal:
        x = torch.linalg.qr(x.unflatten(0, (-1, columns)))[0].flatten(0, 1)
    return x.float().to(device)


def _orthogonal(rows: int, columns: int, device: torch.device) -> Tensor:
    return _random_matrix(rows, columns, True, device)


def _gaussian(rows: int, columns: int, device: torch.device) -> Tensor:
    return _random_matrix(rows, columns, False, device)


# What torch.compiler.assume_constant_result does, which would load the whole of torch._dynamo. It
# tells constants apart by the name of the function alone: one for each kind.
_orthogonal._dynamo_marked_constant = True  # type: ignore[attr-defined]
_gaussian._dynamo_marked_constant = True  # type: ignore[attr-defined]


def precise(x: Tensor, matrix: Tensor) -> Tensor:
    """`x @ matrix` in float64: the same numbers on every device, but for the last bits of those.

    What is rounded next would now and then be rounded otherwise; a GPU may also have been told to
    multiply float32 with ten bits of mantissa.
    """
    return x.double() @ matrix.double()


def random_matrix(rows: int, columns: int, orthogonal: bool, device: torch.device) -> Tensor:
    """A fixed random matrix `[rows, columns]`, the same wherever it is asked for.

    A compiled graph may ask for one orthogonal and one Gaussian matrix, each any number of times.

    Args:
        rows: a multiple of `columns` if orthogonal.
        columns: D.
        orthogonal: each block of D rows is orthonormal; else elements are standard Gaussian.
        device: where it is wanted.
    """
    return (_orthogonal if orthogonal else _gaussian)(rows, columns, device)
