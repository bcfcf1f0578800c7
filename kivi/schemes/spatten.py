"""SpAtten (2012.09852): keys as two bit planes, of which attention reads the second if unsure."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kivi.grids import encode, fit
from kivi.packing import join_bits, of_bytes, split_bits
from kivi.quantizer import KVQuantizer
from kivi.spec import KVSpec, OpaqueSpec, Sparse, check_count


@dataclass(frozen=True)
class Planes(OpaqueSpec):
    """Linear symmetric codes of a token and head, their `low` least significant bits apart.

    `read`: whether these count; without them a code is cut off as in two's complement.
    """

    bits: int
    low: int = 0
    read: bool = True

    def nbytes(self, head_dim: int) -> int:
        """See OpaqueSpec."""
        if head_dim % 8:
            raise ValueError(f"head_dim={head_dim} is not allowed; it must be a multiple of 8")
        return self.bits * head_dim // 8 + 2

    def encode(self, x: Tensor, valid: Tensor) -> tuple[Tensor, ...]:
        """See OpaqueSpec."""
        x = x.squeeze(-2)
        scale, zero = fit(x, valid, self.bits, "symmetric", torch.float16)
        codes = torch.where(valid, encode(x, scale, zero, self.bits), 0.0).long()
        high = join_bits(codes // 2**self.low, self.bits - self.low)
        low = [join_bits(codes % 2**self.low, self.low)] if self.low else []
        return (high, *low, scale.half())

    def coarse(self) -> OpaqueSpec:
        """See OpaqueSpec."""
        return replace(self, read=False)

    def decode(self, data: Tensor, head_dim: int) -> Tensor:
        """See OpaqueSpec."""
        sizes = [bits * head_dim // 8 for bits in (self.bits - self.low, self.low)]
        high, low, scale = data.split([*sizes, 2], -1)
        codes = split_bits(high, self.bits - self.low) * 2**self.low
        if self.low and self.read:
            codes = codes + split_bits(low, self.low)
        x: Tensor = (codes - 2 ** (self.bits - 1)) * of_bytes(scale, torch.float16).float()
        return x.unsqueeze(-2)


@dataclass(frozen=True, kw_only=True)
class SpAtten(KVQuantizer, name="spatten", paper="2012.09852"):
    """Progressive quantization and local value pruning, in the attention of generated tokens.

    Keys are read by their `key_high` most significant bits. Where the largest probability that a
    query and head then find is below `threshold`, they are read again with `key_low` more. Of the
    values, the part `values` with the largest probabilities is read. The defaults are those of the
    authors' released workload of GPT-2 on WikiText-2: 6 + 4 bits, 0.05, 6-bit values, a fifth.

    What deviates: more than 32 new tokens at once read all bits and values; a scale serves one head
    of a token. Cascade pruning of tokens and heads is left out: the attention of all earlier layers
    and steps decides which tokens and heads later layers do without, while a layer of a cache sees
    its own queries only and must answer every head. Plain torch reads all bits and then chooses:
    this shows the quality, not the traffic that is saved.
    """

    key_high: int = 6
    key_low: int = 4
    value_bits: int = 6
    threshold: float = 0.05
    values: float = 0.2
    residual_length: int = 0
    sink_length: int = 0

    def spec(self, layer_idx: int | None = None) -> KVSpec:
        """See KVQuantizer.spec."""
        for name, least in (("key_high", 1), ("key_low", 0), ("value_bits", 1)):
            check_count(name, getattr(self, name), least)
        if self.key_high + self.key_low > 16 or self.value_bits > 16:
            raise ValueError(
                f"key_high={self.key_high}, key_low={self.key_low} and value_bits={self.value_bits}"
                " are not allowed; keys and values have at most 16 bits"
            )
        return KVSpec(
            Planes(self.key_high + self.key_low, self.key_low),
            Planes(self.value_bits),
            self.residual_length,
            self.sink_length,
            sparse=Sparse(self.threshold, self.values),
        )
