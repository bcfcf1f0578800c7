"""Kitty (2511.18643): KIVI whose largest key channels have 4 bits, as two planes of 2."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kivi.grids import encode, fit
from kivi.packing import join_bits, of_bytes, split_bits
from kivi.quantizer import KVQuantizer
from kivi.spec import KVSpec, OpaqueSpec, QuantSpec


@dataclass(frozen=True)
class Boosted(OpaqueSpec):
    """Keys per-channel over 128 tokens: 4 bits for the channels of largest mean |k|, 2 for others.

    The low 2 bits of all channels lie in one plane, the high 2 bits of boosted ones in another,
    with a 16-bit scale, zero, and number of each boosted channel. Mean |k|: eq. 2.
    """

    ratio: float
    bits = 2
    unit = 128

    def _boosted(self, head_dim: int) -> int:
        """How many channels, at least one."""
        return max(1, int(self.ratio * head_dim + 1e-6))

    def nbytes(self, head_dim: int) -> int:
        """See OpaqueSpec."""
        boosted = self._boosted(head_dim)
        return (head_dim + boosted) * self.unit // 4 + 4 * head_dim + 2 * boosted

    def encode(self, x: Tensor, valid: Tensor) -> tuple[Tensor, ...]:
        """See OpaqueSpec."""
        keys, mask = x.transpose(-1, -2), valid.unsqueeze(-2)
        size = torch.where(mask & keys.isfinite(), keys.abs(), 0.0).sum(-1)
        channel = size.topk(self._boosted(x.shape[-1]), -1).indices
        boost = torch.zeros_like(size, dtype=torch.bool).scatter(-1, channel, True).unsqueeze(-1)
        fits = [fit(keys, mask, bits, "asymmetric", torch.float16) for bits in (4, 2)]
        scale, zero = (torch.where(boost, a, b) for a, b in zip(*fits, strict=True))
        codes = torch.where(boost, encode(keys, scale, zero, 4), encode(keys, scale, zero, 2))
        codes = torch.where(mask, codes, 0.0).long()
        where = channel.unsqueeze(-1).expand(*channel.shape, self.unit)
        planes = (codes % 4, (codes // 4).gather(-2, where))
        words = (join_bits(plane.flatten(-2), 2) for plane in planes)
        return (*words, scale.squeeze(-1).half(), zero.squeeze(-1).half(), channel.to(torch.int16))

    def decode(self, data: Tensor, head_dim: int) -> Tensor:
        """See OpaqueSpec."""
        d, boosted, plane = head_dim, self._boosted(head_dim), self.unit // 4
        low, high, *others = data.split([d * plane, boosted * plane, 2 * d, 2 * d, 2 * boosted], -1)
        scale, zero = (of_bytes(e, torch.float16).float().unsqueeze(-1) for e in others[:2])
        channel = of_bytes(others[2], torch.int16).long().unsqueeze(-1)
        codes = split_bits(low, 2).unflatten(-1, (d, self.unit))
        more = split_bits(high, 2).unflatten(-1, (boosted, self.unit))
        codes = codes.scatter_add(-2, channel.expand(*channel.shape[:-1], self.unit), 4 * more)
        x: Tensor = codes * scale + zero
        return x.transpose(-1, -2)


@dataclass(frozen=True, kw_only=True)
class Kitty(KVQuantizer, name="kitty", paper="2511.18643"):
    """2-bit keys and values in groups of 128, dynamic channel-wise precision boost, 32 sinks.

    `boost` is the part of the key channels with 4 bits, chosen anew for each 128 tokens of a head:
    an eighth in Kitty, a quarter in "Kitty-Pro" and the authors' kernels. They store a byte for
    every channel of a page in place of the boosted ones' numbers.
    """

    boost: float = 0.125
    residual_length: int = 128
    sink_length: int = 32

    def spec(self, layer_idx: int | None = None) -> KVSpec:
        """See KVQuantizer.spec."""
        if type(self.boost) not in (int, float) or not 0 < self.boost <= 1:
            raise ValueError(f"boost={self.boost!r} is not allowed; it must lie in (0, 1]")
        value = QuantSpec(2, "token", 128)
        return KVSpec(Boosted(self.boost), value, self.residual_length, self.sink_length)
