"""KVarN (2606.03458): rotated tiles whose rows and columns are scaled to equal variance."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kivi.grids import round_to
from kivi.packing import join_bits, of_bytes, split_bits
from kivi.quantizer import KVQuantizer
from kivi.spec import KVSpec, OpaqueSpec, QuantSpec, check_choice
from kivi.transforms import hadamard, inverse_hadamard

TIE = 1e-9
"""Steps whose imbalance differs by no more are equally good; the last one counts.

At the end all are: columns and rows deviate from other means, so that a step still moves a factor
from the ones to the others, and nothing else. Rounding must not choose between them.
"""


def normalize(x: Tensor, valid: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Scales of the columns and rows of tiles `[..., rows, columns]`, alternately refined.

    Each step divides columns, then rows by their standard deviation, in logarithms that stay in
    [-0.3, 10]; kept are the scales with the least imbalance, max / min of the deviations of columns
    plus that of rows. `valid`: what counts, like x.

    In float64: what is stored then hardly depends on the order of sums, which 16 steps amplify.
    """
    x = torch.where(valid, x.double(), 0.0)
    counts = [valid.sum(dim, keepdim=True) for dim in (-2, -1)]

    def deviation(now: Tensor, axis: int) -> Tensor:
        dim, count = axis - 2, counts[axis]
        mean = now.sum(dim, keepdim=True) / count.clamp_min(1)
        rest = torch.where(valid, now - mean, 0.0).square().sum(dim, keepdim=True)
        # What has no element of its own takes no part.
        return torch.where(count > 0, (rest / (count - 1).clamp_min(1)).sqrt(), torch.nan)

    def scaled() -> Tensor:
        return x * ((-logs[0]).exp() * (-logs[1]).exp())

    def imbalance(both: list[Tensor]) -> Tensor:
        most = [d.nan_to_num(0.0).amax((-2, -1), keepdim=True) for d in both]
        least = [d.nan_to_num(torch.inf).amin((-2, -1), keepdim=True) for d in both]
        return sum(m / s.clamp_min(1e-8) for m, s in zip(most, least, strict=True))  # type: ignore[return-value]

    logs = [torch.zeros_like(x[..., :1, :]), torch.zeros_like(x[..., :1])]
    spread = [deviation(x, axis) for axis in (0, 1)]
    best, least = list(logs), imbalance(spread)
    for _ in range(steps):
        for axis in (0, 1):
            own = deviation(scaled(), 1) if axis else spread[0]
            logs[axis] = (logs[axis] + own.nan_to_num(1.0).clamp(1e-3, 1e3).log()).clamp(-0.3, 10.0)
        now = scaled()
        spread = [deviation(now, axis) for axis in (0, 1)]
        found = imbalance(spread)
        better = found <= least * (1 + TIE)
        best = [torch.where(better, n, b) for n, b in zip(logs, best, strict=True)]
        least = torch.minimum(found, least)
    return best[0].exp(), best[1].exp()


@dataclass(frozen=True)
class Tile(OpaqueSpec):
    """Tiles of tokens: Hadamard map, `normalize`, asymmetric round to nearest of each row.

    Rows are channels of keys (`by_channel`) and tokens of values. Stored for a row are scale and
    zero, for a column its scale, in 16 bit.
    """

    bits: int
    by_channel: bool
    unit: int = 128
    steps: int = 16
    stable = False  # of what was quantized, normalization finds other scales

    def nbytes(self, head_dim: int) -> int:
        """See OpaqueSpec."""
        QuantSpec(self.bits, "token", transform="hadamard").block(head_dim)  # raises if none fits
        rows = (head_dim, self.unit) if self.by_channel else (self.unit, head_dim)
        return self.bits * self.unit * head_dim // 8 + 4 * rows[0] + 2 * rows[1]

    def encode(self, x: Tensor, valid: Tensor) -> tuple[Tensor, ...]:
        """See OpaqueSpec."""
        d = x.shape[-1]
        tile = hadamard(x.nan_to_num(0.0, 0.0, 0.0), (d & -d))
        mask = valid.unsqueeze(-1).expand_as(tile)
        if self.by_channel:
            tile, mask = tile.transpose(-1, -2), mask.transpose(-1, -2)
        column, row = normalize(tile, mask, self.steps)
        column = round_to(column.float(), torch.float16)
        even = tile / column.double() / row
        low = torch.where(mask, even, torch.inf).amin(-1, keepdim=True)
        high = torch.where(mask, even, -torch.inf).amax(-1, keepdim=True)
        low, high = (torch.where(low <= high, e, 0.0) for e in (low, high))
        top = 2**self.bits - 1
        step = ((high - low) / top).clamp_min(1e-10)
        codes = torch.where(mask, ((even - low) / step).round().clamp(0, top), 0.0)
        scale, zero = ((row * e).clamp(-65504, 65504).float() for e in (step, low))
        parts = [e.half().flatten(-2) for e in (scale, zero, column)]
        return (join_bits(codes.flatten(-2), self.bits), *parts)

    def decode(self, data: Tensor, head_dim: int) -> Tensor:
        """See OpaqueSpec."""
        shape = (head_dim, self.unit) if self.by_channel else (self.unit, head_dim)
        sizes = [self.bits * self.unit * head_dim // 8, 2 * shape[0], 2 * shape[0], 2 * shape[1]]
        packed, *others = data.split(sizes, -1)
        scale, zero, column = (of_bytes(e, torch.float16).float() for e in others)
        codes = split_bits(packed, self.bits).unflatten(-1, shape).float()
        tile = (codes * scale.unsqueeze(-1) + zero.unsqueeze(-1)) * column.unsqueeze(-2)
        tile = tile.transpose(-1, -2) if self.by_channel else tile
        return inverse_hadamard(tile, head_dim & -head_dim)


@dataclass(frozen=True, kw_only=True)
class KVarN(KVQuantizer, name="kvarn", paper="2606.03458"):
    """Keys per-channel, values per-token, over tiles of 128 tokens, 16 steps of normalization.

    Defaults are the released preset, 4-bit keys and 2-bit values. Tokens of a tile that is not yet
    full are exact.
    """

    key_bits: int = 4
    value_bits: int = 2
    residual_length: int = 0
    sink_length: int = 0

    def spec(self, layer_idx: int | None = None) -> KVSpec:
        """See KVQuantizer.spec."""
        for name in ("key_bits", "value_bits"):
            check_choice(name, getattr(self, name), (1, 2, 3, 4, 8))
        key, value = Tile(self.key_bits, True), Tile(self.value_bits, False)
        return KVSpec(key, value, self.residual_length, self.sink_length)
