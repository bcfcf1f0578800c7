"""SKVQ (2405.06219): channels in groups of their like, clipped ranges, metadata in FP8."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kivi.packing import join_bits, of_bytes, split_bits
from kivi.quantizer import KVQuantizer
from kivi.spec import KVSpec, OpaqueSpec, QuantSpec, Rope

CLIPS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)
"""The parts of a range that are tried."""


def e4m3(x: Tensor) -> Tensor:
    """Saturated and rounded to FP8."""
    return x.clamp(-448, 448).to(torch.float8_e4m3fn)


@dataclass(frozen=True)
class Reordered(OpaqueSpec):
    """32 tokens, whose channels form groups by size; a group of a token has scale and zero in FP8.

    Stored are codes, the group of each channel (none for a single group), scales and zeros.
    """

    bits: int
    group_size: int | None
    pre_rope: bool = False
    rope: Rope | None = None
    unit = 32
    stable = False  # a clipped range shrinks anew

    def __post_init__(self) -> None:
        QuantSpec(self.bits, "token", self.group_size)  # raises for what is not allowed

    def _groups(self, head_dim: int) -> tuple[int, int]:
        """Groups of a token, and bits that name one."""
        count = head_dim // QuantSpec(self.bits, "token", self.group_size).group(head_dim)
        return count, (count - 1).bit_length()

    def _sizes(self, head_dim: int) -> list[int]:
        count, name = self._groups(head_dim)
        scales = self.unit * count
        return [self.bits * self.unit * head_dim // 8, -(-name * head_dim // 8), scales, scales]

    def nbytes(self, head_dim: int) -> int:
        """See OpaqueSpec."""
        if head_dim % 8:
            raise ValueError(f"head_dim={head_dim} is not allowed; it must be a multiple of 8")
        return sum(self._sizes(head_dim))

    def encode(self, x: Tensor, valid: Tensor) -> tuple[Tensor, ...]:
        """See OpaqueSpec."""
        x = torch.where(valid.unsqueeze(-1), x.nan_to_num(0.0, 0.0, 0.0), 0.0)
        count, name = self._groups(x.shape[-1])
        order = x.abs().amax(-2).argsort(dim=-1, stable=True)
        place = order.unsqueeze(-2).expand_as(x)
        groups = x.gather(-1, place).unflatten(-1, (count, -1))
        low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
        top = 2**self.bits - 1

        def clipped(clip: float | Tensor) -> tuple[Tensor, Tensor, Tensor]:
            scale = e4m3(((high - low) * clip / top).clamp_min(2.0**-9))
            zero = e4m3(low * clip)
            codes = ((groups - zero.float()) / scale.float()).round().clamp(0, top)
            return codes, scale, zero

        errors = []
        for clip in CLIPS:
            codes, scale, zero = clipped(clip)
            rest = codes * scale.float() + zero.float() - groups
            errors.append(rest.square().sum(-1, keepdim=True))
        best = torch.tensor(CLIPS, device=x.device)[torch.stack(errors).argmin(0)]
        codes, scale, zero = clipped(best)
        codes = torch.zeros_like(x).scatter(-1, place, codes.flatten(-2))
        parts = [join_bits(codes.flatten(-2), self.bits)]
        if name:
            number = torch.arange(count, device=x.device).repeat_interleave(x.shape[-1] // count)
            parts.append(join_bits(number[order.argsort(-1)], name))
        return (*parts, scale.flatten(-3), zero.flatten(-3))

    def decode(self, data: Tensor, head_dim: int) -> Tensor:
        """See OpaqueSpec."""
        codes, group, *others = data.split(self._sizes(head_dim), -1)
        count, name = self._groups(head_dim)
        x = split_bits(codes, self.bits).unflatten(-1, (self.unit, head_dim)).float()
        scale, zero = (
            of_bytes(e, torch.float8_e4m3fn).float().unflatten(-1, (self.unit, count))
            for e in others
        )
        if name:
            index = split_bits(group, name).unsqueeze(-2).expand_as(x)
            scale, zero = scale.gather(-1, index), zero.gather(-1, index)
        back: Tensor = x * scale + zero
        return back


@dataclass(frozen=True, kw_only=True)
class SKVQ(KVQuantizer, name="skvq", paper="2405.06219"):
    """2-bit keys before RoPE and values, per-token groups of 128, a window of 128 and 5 sinks.

    Channel reorder and clipped dynamic quantization (section 3): groups hold channels alike, and a
    group's range is shrunk to the part that leaves the least squared error. The paper finds order
    and clipping offline, by the error of attention, and lets groups span heads. Here 32 tokens give
    their own order (sorted by magnitude into equal groups, where it clusters), each group of a
    token its clipping, and a group stays in its head, so that order matters where G is less than
    the head dimension.
    """

    bits: int = 2
    key_bits: int | None = None
    value_bits: int | None = None
    group_size: int | None = 128
    residual_length: int = 128
    sink_length: int = 5

    def spec(self, layer_idx: int | None = None) -> KVSpec:
        """See KVQuantizer.spec."""
        key, value = (
            Reordered(self.bits if bits is None else bits, self.group_size, pre_rope)
            for bits, pre_rope in ((self.key_bits, True), (self.value_bits, False))
        )
        return KVSpec(key, value, self.residual_length, self.sink_length)
