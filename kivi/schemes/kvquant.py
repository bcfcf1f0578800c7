"""KVQuant (2401.18079): keys before RoPE, levels where elements are, outliers kept apart."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from kivi.codebooks import k_means, levels
from kivi.grids import divide, fit
from kivi.packing import join_bits, of_bytes, split_bits
from kivi.quantizer import KVQuantizer
from kivi.spec import BITS, KVSpec, OpaqueSpec, Rope, check_choice
from kivi.transforms import turn

REACH = 2.0
"""Where a vector without its outliers is taken to end, in standard deviations of a Gaussian."""


@cache
def normal_levels(bits: int) -> tuple[float, ...]:
    """The k-means of a Gaussian between its ends, which lie at 0 and 1."""
    count = 2**bits
    fine = [(i + 0.5) / 4096 for i in range(4096)]
    weight = [math.exp(-0.5 * (REACH * (2 * x - 1)) ** 2) for x in fine]
    return k_means(fine, weight, [(i + 0.5) / count for i in range(count)])


def read_levels(file: str, bits: int, name: str, layer: int) -> tuple[float, ...]:
    """Levels of keys or values of a layer, from `{"key": [[0.1, ...], ...], "value": ...}`.

    Raises:
        ValueError: for a file that cannot be read or says something else.
    """
    try:
        layers = json.loads(Path(file).read_text(encoding="utf-8"))[name]
        found = tuple(float(x) for x in layers[min(layer, len(layers) - 1)])
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise ValueError(
            f'file={file!r} must hold {{"key": [levels, ...], "value": [levels, ...]}}: {error}'
        ) from error
    if len(found) != 2**bits or any(not a < b for a, b in pairwise((-1e-9, *found, 1 + 1e-9))):
        raise ValueError(f"file={file!r} must hold {2**bits} ascending levels of 0 to 1 for {name}")
    return found


@dataclass(frozen=True)
class NonUniform(OpaqueSpec):
    """Vectors are channels of 128 tokens (keys, `by_channel`) or tokens (values).

    Stored are codes, the ends of each vector without its outliers, and `sparsity` of its elements,
    those farthest from its mean, with their places; all but codes and places in 16 bit.
    """

    bits: int
    by_channel: bool
    levels: tuple[float, ...]
    sparsity: float
    unit: int
    pre_rope: bool
    rope: Rope | None = None
    stable = False  # no level lies at an end, so that the range shrinks anew

    def __post_init__(self) -> None:
        if type(self.sparsity) not in (int, float) or not 0 <= self.sparsity <= 0.5:
            raise ValueError(f"sparsity={self.sparsity!r} is not allowed; it must be 0 to 0.5")

    def _shape(self, head_dim: int) -> tuple[int, int, int]:
        """Vectors, their elements, and the outliers of one."""
        rows, n = (head_dim, self.unit) if self.by_channel else (self.unit, head_dim)
        return rows, n, 0 if self.sparsity == 0 else max(1, round(self.sparsity * n))

    def _sizes(self, head_dim: int) -> list[int]:
        rows, n, apart = self._shape(head_dim)
        sparse = rows * apart
        return [self.bits * rows * n // 8, 4 * rows + 2 * sparse, (1 + (n > 256)) * sparse]

    def nbytes(self, head_dim: int) -> int:
        """See OpaqueSpec."""
        if head_dim % 8:
            raise ValueError(f"head_dim={head_dim} is not allowed; it must be a multiple of 8")
        return sum(self._sizes(head_dim))

    def _placed(self, x: Tensor, valid: Tensor) -> tuple[Tensor, ...]:
        """Vectors `[..., rows, n]`, which elements are dense, their range, and where outliers are.

        The last is where in its range an element lies, 0 to 1.
        """
        _, _, apart = self._shape(x.shape[-1])
        x = x.nan_to_num(0.0, 0.0, 0.0)
        mask = valid.unsqueeze(-1).expand_as(x)
        if self.by_channel:
            x, mask = x.transpose(-1, -2), mask.transpose(-1, -2)
        x = torch.where(mask, x, 0.0)
        mean = x.sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp_min(1)
        outlier = torch.where(mask, (x - mean).abs(), -1.0).topk(apart, -1).indices
        dense = mask & ~torch.zeros_like(mask).scatter(-1, outlier, True)
        span, low = fit(x, dense, 1, "asymmetric", torch.float16)  # one step from end to end
        return x, dense, span, low, outlier, divide(x - low, span)

    def fitted(self, x: Tensor, gradient: Tensor, first: int) -> tuple[float, ...]:
        """Levels for tokens `[..., T, D]` like these, weighted by sensitivity (section 3.3).

        An element's squared error counts by the square of the loss' gradient. As it is a part of
        its vector's range, that counts too; the authors' code leaves the range out.
        `first`: position of the first token; what is no whole unit is left out.
        """
        tokens = x.shape[-2] // self.unit * self.unit
        both = [t[..., :tokens, :].float() for t in (x, gradient)]
        if self.rope is not None:
            position = torch.arange(first, first + tokens, device=x.device)
            both = [turn(t, position, self.rope, back=True) for t in both]
        units, slope = (t.unflatten(-2, (-1, self.unit)) for t in both)
        every = torch.ones(self.unit, dtype=torch.bool, device=x.device)
        _, dense, span, _, _, place = self._placed(units, every)
        slope = slope.transpose(-1, -2) if self.by_channel else slope
        return levels(place[dense], (slope * span).square()[dense], 2**self.bits)

    def encode(self, x: Tensor, valid: Tensor) -> tuple[Tensor, ...]:
        """See OpaqueSpec."""
        _, n, _ = self._shape(x.shape[-1])
        x, dense, span, low, outlier, place = self._placed(x, valid)
        level = torch.tensor(self.levels, device=x.device)
        codes = torch.bucketize(place.contiguous(), (level[1:] + level[:-1]) / 2)
        codes = torch.where(dense, codes, 0)
        floats = [span, low, x.gather(-1, outlier).clamp(-65504, 65504)]
        stored = [part.half().flatten(-2) for part in floats]
        index = outlier.flatten(-2).to(torch.uint8 if n <= 256 else torch.int16)
        return (join_bits(codes.flatten(-2), self.bits), *stored, index)

    def decode(self, data: Tensor, head_dim: int) -> Tensor:
        """See OpaqueSpec."""
        rows, n, apart = self._shape(head_dim)
        packed, floats, index = data.split(self._sizes(head_dim), -1)
        numbers = of_bytes(floats, torch.float16).float()
        span, low, values = numbers.split([rows, rows, rows * apart], -1)
        level = torch.tensor(self.levels, device=data.device)
        x: Tensor = level[split_bits(packed, self.bits)].unflatten(-1, (rows, n))
        x = x * span.unsqueeze(-1) + low.unsqueeze(-1)
        if apart:
            place = of_bytes(index, torch.uint8 if n <= 256 else torch.int16).long()
            x = x.scatter(-1, place.unflatten(-1, (rows, -1)), values.unflatten(-1, (rows, -1)))
        return x.transpose(-1, -2) if self.by_channel else x


@dataclass(frozen=True, kw_only=True)
class KVQuant(KVQuantizer, name="kvquant", paper="2401.18079"):
    """3-bit non-uniform levels, 1 % of each vector (at least one) sparse, the first token exact.

    Keys per-channel before the model's rotary embedding (section 3.1, 3.2), values per-token; a
    vector is scaled to its range and takes the nearest level (3.3), without its outliers (3.4);
    the first token stays exact, as an attention sink (3.5). Without a `file` of levels they are the
    k-means of a Gaussian; the paper's k-means is weighted by sensitivity, for each layer, as a file
    has them that a user's model and text give (`NonUniform.fitted`). The paper also finds scales
    and thresholds of keys offline, where here 128 tokens give their own, and takes outliers from
    both ends alike, where here they are the farthest from the mean.
    """

    bits: int = 3
    key_bits: int | None = None
    value_bits: int | None = None
    sparsity: float = 0.01
    file: str | None = None
    residual_length: int = 0
    sink_length: int = 1

    def spec(self, layer_idx: int | None = None) -> KVSpec:
        """See KVQuantizer.spec; of any layer, None, it is the first one's."""

        def one(name: str, own: int | None) -> NonUniform:
            bits = self.bits if own is None else own
            check_choice("bits" if own is None else f"{name}_bits", bits, BITS)
            found = (
                normal_levels(bits)
                if self.file is None
                else read_levels(self.file, bits, name, layer_idx or 0)
            )
            keys = name == "key"
            return NonUniform(bits, keys, found, self.sparsity, 128 if keys else 1, keys)

        key, value = one("key", self.key_bits), one("value", self.value_bits)
        return KVSpec(key, value, self.residual_length, self.sink_length)
