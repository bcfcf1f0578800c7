"""TurboQuant (2504.19874): a random rotation, then the best scalar codebook of a Gaussian."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kivi.packing import join_bits, of_bytes, split_bits
from kivi.quantizer import KVQuantizer
from kivi.spec import KVSpec, OpaqueSpec, check_choice
from kivi.transforms import precise, random_matrix

# Lloyd and Max's levels of a standard Gaussian (Max, 1960, table I), positive half.
LEVELS = {
    1: (0.7979,),
    2: (0.4528, 1.510),
    3: (0.2451, 0.7560, 1.344, 2.152),
    4: (0.1284, 0.3881, 0.6568, 0.9424, 1.256, 1.618, 2.069, 2.733),
}


@dataclass(frozen=True)
class Turbo(OpaqueSpec):
    """Algorithm 1 (`product=False`) or 2, on the direction of each vector; its norm in 16 bit."""

    bits: int
    product: bool

    @property
    def stable(self) -> bool:  # type: ignore[override]
        """See OpaqueSpec."""
        return not self.product

    def nbytes(self, head_dim: int) -> int:
        """See OpaqueSpec."""
        if head_dim % 8:
            raise ValueError(f"head_dim={head_dim} is not allowed; it must be a multiple of 8")
        return self.bits * head_dim // 8 + 2 + 2 * self.product

    def _levels(self, device: torch.device) -> Tensor:
        half = LEVELS[self.bits - self.product]
        return torch.tensor([*(-x for x in reversed(half)), *half], device=device)

    def encode(self, x: Tensor, valid: Tensor) -> tuple[Tensor, ...]:
        """See OpaqueSpec."""
        x = x.squeeze(-2).nan_to_num(0.0, 0.0, 0.0).double()
        d, norm = x.shape[-1], x.norm(dim=-1, keepdim=True)
        unit = x / norm.clamp_min(1e-30)
        rotation, levels = random_matrix(d, d, True, x.device), self._levels(x.device)
        place = precise(unit, rotation.T) * math.sqrt(d)
        codes = torch.bucketize(place.contiguous(), (levels[1:] + levels[:-1]).double() / 2)
        stored = norm.clamp_max(65504).float().half()
        parts = [join_bits(codes, self.bits - self.product), stored]
        if self.product:
            rest = (place - levels[codes]) / math.sqrt(d)  # rotated, which keeps its length
            projection = precise(rotation, random_matrix(d, d, False, x.device).T)
            sketch = precise(rest, projection) >= 0
            parts += [join_bits(sketch, 1), rest.norm(dim=-1, keepdim=True).float().half()]
        return tuple(parts)

    def decode(self, data: Tensor, head_dim: int) -> Tensor:
        """See OpaqueSpec."""
        bits = self.bits - self.product
        sizes = [bits * head_dim // 8, 2, *([head_dim // 8, 2] if self.product else [])]
        codes, norm, *others = data.split(sizes, -1)
        levels = self._levels(data.device)
        rotation = random_matrix(head_dim, head_dim, True, data.device)
        unit: Tensor = levels[split_bits(codes, bits)] @ rotation / math.sqrt(head_dim)
        if self.product:
            sign = 2.0 * split_bits(others[0], 1) - 1
            back = sign @ random_matrix(head_dim, head_dim, False, data.device)
            length = of_bytes(others[1], torch.float16).float()
            unit += math.sqrt(math.pi / 2) / head_dim * length * back
        unit = unit * of_bytes(norm, torch.float16).float()
        return unit.unsqueeze(-2)


@dataclass(frozen=True, kw_only=True)
class TurboQuant(KVQuantizer, name="turboquant", paper="2504.19874"):
    """Keys and values by algorithm 1 ("mse", section 3.1) or 2 ("prod": a bit is a QJL sketch).

    The paper's 2.5 and 3.5 bits give more bits to outlier channels; here all have the same. No
    window: the paper quantizes what is generated, too.
    """

    bits: int = 3
    variant: Literal["mse", "prod"] = "mse"
    residual_length: int = 0
    sink_length: int = 0

    def spec(self, layer_idx: int | None = None) -> KVSpec:
        """See KVQuantizer.spec."""
        check_choice("variant", self.variant, ("mse", "prod"))
        product = self.variant == "prod"
        check_choice("bits", self.bits, (2, 3, 4) if product else (1, 2, 3, 4))
        both = Turbo(self.bits, product)
        return KVSpec(both, both, self.residual_length, self.sink_length)
