"""NVFP4 keys and values: E2M1 elements, an E4M3 scale for 16 of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kivi.packing import join_bits, of_bytes, split_bits
from kivi.quantizer import KVQuantizer
from kivi.spec import KVSpec, OpaqueSpec

LEVELS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
GROUP = 16


@dataclass(frozen=True)
class E2M1(OpaqueSpec):
    """Groups of 16 channels: `scale = max|x| / 6` as E4M3, elements as sign and one of 8 levels."""

    bits = 4

    def nbytes(self, head_dim: int) -> int:
        """See OpaqueSpec."""
        if head_dim % GROUP:
            raise ValueError(f"head_dim={head_dim} is not allowed; choose a multiple of {GROUP}")
        return head_dim // 2 + head_dim // GROUP

    def encode(self, x: Tensor, valid: Tensor) -> tuple[Tensor, ...]:
        """See OpaqueSpec."""
        groups = x.nan_to_num(0.0, 0.0, 0.0).flatten(-2).unflatten(-1, (-1, GROUP))
        scale = (groups.abs().amax(-1) / LEVELS[-1]).clamp(2.0**-9, 448).to(torch.float8_e4m3fn)
        levels = torch.tensor(LEVELS, device=x.device)
        place = groups / scale.float().unsqueeze(-1)
        middle = (levels[1:] + levels[:-1]) / 2
        codes = torch.bucketize(place.abs().contiguous(), middle)
        codes = codes + len(LEVELS) * (place < 0)
        return join_bits(codes.flatten(-2), 4), scale

    def decode(self, data: Tensor, head_dim: int) -> Tensor:
        """See OpaqueSpec."""
        codes, scale = data.split([head_dim // 2, head_dim // GROUP], -1)
        levels = torch.tensor([*LEVELS, *(-x for x in LEVELS)], device=data.device)
        groups = levels[split_bits(codes, 4)].unflatten(-1, (-1, GROUP))
        scale = of_bytes(scale, torch.float8_e4m3fn).float()
        x: Tensor = (groups * scale.unsqueeze(-1)).flatten(-2)
        return x.unsqueeze(-2)


@dataclass(frozen=True, kw_only=True)
class NVFP4(KVQuantizer, name="nvfp4", paper="2509.25149"):
    """E2M1 in groups of 16 with E4M3 scales; the second, per-tensor scale is 1. No window."""

    residual_length: int = 0
    sink_length: int = 0

    def spec(self, layer_idx: int | None = None) -> KVSpec:
        """See KVQuantizer.spec."""
        return KVSpec(E2M1(), E2M1(), self.residual_length, self.sink_length)
