"""FP8 (E4M3, 2209.05433) keys and values without a scale, as inference engines store them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kivi.quantizer import KVQuantizer
from kivi.spec import KVSpec, OpaqueSpec


@dataclass(frozen=True)
class E4M3(OpaqueSpec):
    """A byte for each element: sign, 4 exponent and 3 mantissa bits, saturated at 448."""

    bits = 8

    def nbytes(self, head_dim: int) -> int:
        """See OpaqueSpec."""
        return head_dim

    def encode(self, x: Tensor, valid: Tensor) -> tuple[Tensor, ...]:
        """See OpaqueSpec."""
        return (x.nan_to_num(0.0).clamp(-448, 448).flatten(-2).to(torch.float8_e4m3fn),)

    def decode(self, data: Tensor, head_dim: int) -> Tensor:
        """See OpaqueSpec."""
        return data.view(torch.float8_e4m3fn).float().unsqueeze(-2)


@dataclass(frozen=True, kw_only=True)
class FP8(KVQuantizer, name="fp8", paper="2209.05433"):
    """E4M3 with a scale of 1 (section 3), no window."""

    residual_length: int = 0
    sink_length: int = 0

    def spec(self, layer_idx: int | None = None) -> KVSpec:
        """See KVQuantizer.spec."""
        return KVSpec(E4M3(), E4M3(), self.residual_length, self.sink_length)
