"""ZipCache (2405.14256): more bits for the tokens that attention looks at."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kivi.grids import encode, fit
from kivi.packing import join_bits, of_bytes, split_bits
from kivi.quantizer import KVQuantizer
from kivi.spec import BITS, KVSpec, OpaqueSpec, check_choice


@dataclass(frozen=True)
class Mixed(OpaqueSpec):
    """128 tokens, of which a part has more bits: keys per-channel, values channel-separable.

    Keys (`by_channel`): scale and zero of each channel for the salient tokens, and for the others.
    Values (algorithm 1): channels are divided by `sqrt(max|x|)`, then each token has scale and
    zero. All of these are in 16 bit; a bit for each token says which it is.
    """

    bits: int
    salient_bits: int
    ratio: float
    by_channel: bool
    unit = 128
    weighs_tokens = True

    def __post_init__(self) -> None:
        check_choice("bits", self.bits, BITS)
        check_choice("salient_bits", self.salient_bits, BITS)
        if type(self.ratio) not in (int, float) or not 0 < self.ratio < 1:
            raise ValueError(f"ratio={self.ratio!r} is not allowed; it must lie between 0 and 1")

    def _parts(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Tokens and bits of the salient part and of the other one."""
        count = min(max(round(self.ratio * self.unit), 1), self.unit - 1)
        return (count, self.salient_bits), (self.unit - count, self.bits)

    def _floats(self, head_dim: int) -> list[int]:
        each = [head_dim] * 2 if self.by_channel else [tokens for tokens, _ in self._parts()]
        return [each[0], each[0], each[1], each[1], 0 if self.by_channel else head_dim]

    def _sizes(self, head_dim: int) -> list[int]:
        codes = [tokens * bits * head_dim // 8 for tokens, bits in self._parts()]
        return [self.unit // 8, *codes, 2 * sum(self._floats(head_dim))]

    def nbytes(self, head_dim: int) -> int:
        """See OpaqueSpec."""
        if head_dim % 8:
            raise ValueError(f"head_dim={head_dim} is not allowed; it must be a multiple of 8")
        return sum(self._sizes(head_dim))

    def encode(self, x: Tensor, valid: Tensor) -> tuple[Tensor, ...]:
        """See OpaqueSpec."""
        return self.encode_weighted(x, valid, None)

    def encode_weighted(
        self, x: Tensor, valid: Tensor, weight: Tensor | None
    ) -> tuple[Tensor, ...]:
        """See OpaqueSpec; without weights the first tokens count as salient."""
        x, valid = x.nan_to_num(0.0, 0.0, 0.0), valid.expand(x.shape[:-1])
        weight = x.new_zeros(x.shape[:-1]) if weight is None else weight
        rank = torch.where(valid, weight, -1.0).argsort(dim=-1, descending=True, stable=True)
        (count, _), _ = parts = self._parts()
        salient = torch.zeros_like(valid).scatter(-1, rank[..., :count], True)
        place = (~salient).int().argsort(dim=-1, stable=True)
        x, valid = x.gather(-2, place.unsqueeze(-1).expand_as(x)), valid.gather(-1, place)
        floats: list[Tensor] = []
        if not self.by_channel:
            peak = torch.where(valid.unsqueeze(-1), x.abs(), 0.0).amax(-2)
            channel = torch.where(peak > 0, peak.sqrt(), 1.0).clamp_min(2.0**-14)
            floats, x = [channel.half()], x / channel.unsqueeze(-2)
        data, start = [join_bits(salient, 1)], 0
        meta: list[Tensor] = []
        for tokens, bits in parts:
            part = x[..., start : start + tokens, :]
            inside = valid[..., start : start + tokens, None].expand_as(part)
            if self.by_channel:
                part, inside = part.transpose(-1, -2), inside.transpose(-1, -2)
            scale, zero = fit(part, inside, bits, "asymmetric", torch.float16)
            codes = torch.where(inside, encode(part, scale, zero, bits), 0.0)
            data.append(join_bits(codes.flatten(-2), bits))
            meta += [scale.squeeze(-1).half(), zero.squeeze(-1).half()]
            start += tokens
        return (*data, *meta, *floats)

    def decode(self, data: Tensor, head_dim: int) -> Tensor:
        """See OpaqueSpec."""
        salient, *packed, rest = data.split(self._sizes(head_dim), -1)
        *meta, channel = of_bytes(rest, torch.float16).float().split(self._floats(head_dim), -1)
        found = []
        for i, (tokens, bits) in enumerate(self._parts()):
            shape = (head_dim, tokens) if self.by_channel else (tokens, head_dim)
            codes = split_bits(packed[i], bits).unflatten(-1, shape)
            part = codes * meta[2 * i].unsqueeze(-1) + meta[2 * i + 1].unsqueeze(-1)
            found.append(part.transpose(-1, -2) if self.by_channel else part)
        x = torch.cat(found, -2)
        if not self.by_channel:
            x = x * channel.unsqueeze(-2)
        place = (1 - split_bits(salient, 1)).argsort(dim=-1, stable=True)
        return torch.zeros_like(x).scatter(-2, place.unsqueeze(-1).expand_as(x), x)


@dataclass(frozen=True, kw_only=True)
class ZipCache(KVQuantizer, name="zipcache", paper="2405.14256"):
    """4 bits for the 60 % of tokens with the most normalized attention, 2 for the others.

    Attention is that of probe queries (sections 4.2, 4.3): 5 % of a step's queries are the most
    recent ones, 5 % lie evenly over it where the paper draws them. As in its decoding phase, which
    compresses every 100 tokens, 128 at a time leave the window and are ranked among themselves, in
    each head; the paper ranks a prompt's tokens together. In decoding the probe is the step's own
    query. Tokens that are stored without queries are not told apart.
    """

    bits: int = 2
    salient_bits: int = 4
    ratio: float = 0.6
    residual_length: int = 0
    sink_length: int = 0

    def spec(self, layer_idx: int | None = None) -> KVSpec:
        """See KVQuantizer.spec."""
        key, value = (
            Mixed(self.bits, self.salient_bits, self.ratio, by_channel)
            for by_channel in (True, False)
        )
        return KVSpec(key, value, self.residual_length, self.sink_length)
