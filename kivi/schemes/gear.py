"""GEAR (2403.05527): a quantized backbone, the low-rank part of its error, and sparse outliers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kivi.grids import encode, fit
from kivi.packing import join_bits, of_bytes, split_bits
from kivi.quantizer import KVQuantizer
from kivi.spec import KVSpec, OpaqueSpec, QuantSpec, check_count
from kivi.transforms import random_matrix

STEPS = 3
"""Rounds of the power iteration."""
MOST = (16, 512)
"""The largest rank, and the longest vector."""


def low_rank(x: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A `[..., n, r]` and B `[..., d, r]` of which `A B^T` is about the best for `x [..., n, d]`.

    The power iteration of the paper (its appendix), from a fixed start; A is orthonormal. In
    float64, so that what is stored hardly depends on the order of sums.
    """
    x = x.double()
    b = random_matrix(MOST[0], MOST[1], False, x.device)[:rank, : x.shape[-1]].T.double()
    for _ in range(STEPS):
        columns: list[Tensor] = []
        for a in (x @ b).unbind(-1):
            for one in columns:
                a = a - (one * a).sum(-1, keepdim=True) * one
            columns.append(a / a.norm(dim=-1, keepdim=True).clamp_min(1e-30))
        found = torch.stack(columns, -1)
        b = x.transpose(-1, -2) @ found
    return found, b


@dataclass(frozen=True)
class Recipe(OpaqueSpec):
    """128 tokens of a head: vectors are channels (keys, `by_channel`) or tokens (values).

    Stored are codes, scale and zero of each group of a vector, A and B of the low-rank part, and
    the largest and smallest `sparsity / 2` of each vector with their places.
    """

    bits: int
    by_channel: bool
    group_size: int | None
    rank: int
    sparsity: float
    unit = 128
    stable = False  # the low-rank part of what was rounded is another one

    def __post_init__(self) -> None:
        QuantSpec(self.bits, "channel" if self.by_channel else "token", self.group_size)
        check_count("rank", self.rank)
        if self.rank > MOST[0]:
            raise ValueError(f"rank={self.rank} is not allowed; it must be 0 to {MOST[0]}")
        if type(self.sparsity) not in (int, float) or not 0 <= self.sparsity <= 0.5:
            raise ValueError(f"sparsity={self.sparsity!r} is not allowed; it must be 0 to 0.5")

    def _shape(self, head_dim: int) -> tuple[int, int, int, int]:
        """Vectors, elements of one, elements of a group, and outliers at each end of a vector."""
        rows, n = (head_dim, self.unit) if self.by_channel else (self.unit, head_dim)
        group = QuantSpec(self.bits, "token", min(self.group_size or n, n, 128)).group(n)
        group = n if self.group_size is None else group
        return rows, n, group, 0 if self.sparsity == 0 else max(1, round(n * self.sparsity / 2))

    def _floats(self, head_dim: int) -> list[int]:
        """How many there are of what is stored in 16 bit."""
        rows, n, group, ends = self._shape(head_dim)
        meta = rows * n // group
        return [meta, meta, self.rank * rows, self.rank * n, 2 * rows * ends]

    def _sizes(self, head_dim: int) -> list[int]:
        """Bytes of codes, floats and places."""
        rows, n, _, ends = self._shape(head_dim)
        floats = 2 * sum(self._floats(head_dim))
        return [self.bits * rows * n // 8, floats, (1 + (n > 256)) * 2 * rows * ends]

    def nbytes(self, head_dim: int) -> int:
        """See OpaqueSpec."""
        if head_dim % 8 or head_dim > MOST[1]:
            raise ValueError(
                f"head_dim={head_dim} is not allowed; choose a multiple of 8 up to {MOST[1]}"
            )
        return sum(self._sizes(head_dim))

    def encode(self, x: Tensor, valid: Tensor) -> tuple[Tensor, ...]:
        """See OpaqueSpec."""
        _, n, group, ends = self._shape(x.shape[-1])
        x = x.nan_to_num(0.0, 0.0, 0.0)
        mask = valid.unsqueeze(-1).expand_as(x)
        if self.by_channel:
            x, mask = x.transpose(-1, -2), mask.transpose(-1, -2)
        high = torch.where(mask, x, -torch.inf).topk(ends, -1).indices
        low = torch.where(mask, x, torch.inf).topk(ends, -1, largest=False).indices
        place = torch.cat([high, low], -1)
        inside = mask & ~torch.zeros_like(mask).scatter(-1, place, True)
        groups, within = x.unflatten(-1, (-1, group)), inside.unflatten(-1, (-1, group))
        scale, zero = fit(groups, within, self.bits, "asymmetric", torch.float16)
        codes = torch.where(within, encode(groups, scale, zero, self.bits), 0.0)
        rest = torch.where(within, groups - (codes * scale + zero), 0.0).flatten(-2)
        parts = [scale, zero]
        if self.rank:
            parts += low_rank(rest, self.rank)
        parts.append(torch.where(mask, x, 0.0).gather(-1, place))
        stored = [part.clamp(-65504, 65504).half().flatten(-2) for part in parts]
        stored[:2] = [part.flatten(-2) for part in stored[:2]]
        index = place.flatten(-2).to(torch.uint8 if n <= 256 else torch.int16)
        return (join_bits(codes.flatten(-3), self.bits), *stored, index)

    def decode(self, data: Tensor, head_dim: int) -> Tensor:
        """See OpaqueSpec."""
        rows, n, group, ends = self._shape(head_dim)
        packed, floats, index = data.split(self._sizes(head_dim), -1)
        floats = of_bytes(floats, torch.float16).float()
        scale, zero, a, b, values = floats.split(self._floats(head_dim), -1)
        codes = split_bits(packed, self.bits).unflatten(-1, (rows, n // group, group))
        shape = (rows, n // group, 1)
        x: Tensor = (codes * scale.unflatten(-1, shape) + zero.unflatten(-1, shape)).flatten(-2)
        if self.rank:
            x = x + a.unflatten(-1, (rows, -1)) @ b.unflatten(-1, (n, -1)).transpose(-1, -2)
        if ends:
            place = of_bytes(index, torch.uint8 if n <= 256 else torch.int16).long()
            x = x.scatter(-1, place.unflatten(-1, (rows, -1)), values.unflatten(-1, (rows, -1)))
        return x.transpose(-1, -2) if self.by_channel else x


@dataclass(frozen=True, kw_only=True)
class GEAR(KVQuantizer, name="gear", paper="2403.05527"):
    """X = D + L + S (section 3): KIVI's axes in groups of 64, each head's low-rank error, outliers.

    2 % of each channel of keys and of each token of values, half at either end, stay in 16 bit and
    out of the backbone's ranges. Tokens are compressed 128 at a time, as the paper's streaming
    buffer does (algorithm 1), with the rank of its generation phase, 2; it gives a prompt rank 4
    over all of its tokens. `group_size=None` is its other backbone, one group for each vector.
    """

    bits: int = 2
    key_bits: int | None = None
    value_bits: int | None = None
    group_size: int | None = 64
    rank: int = 2
    sparsity: float = 0.02
    residual_length: int = 0
    sink_length: int = 0

    def spec(self, layer_idx: int | None = None) -> KVSpec:
        """See KVQuantizer.spec."""
        key, value = (
            Recipe(
                self.bits if bits is None else bits,
                by_channel,
                self.group_size,
                self.rank,
                self.sparsity,
            )
            for bits, by_channel in ((self.key_bits, True), (self.value_bits, False))
        )
        return KVSpec(key, value, self.residual_length, self.sink_length)
