"""QJL (2406.03482): keys as the signs of a random projection and their norm."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kivi.packing import join_bits, of_bytes, split_bits
from kivi.quantizer import KVQuantizer
from kivi.spec import KVSpec, OpaqueSpec, QuantSpec, check_count
from kivi.transforms import precise, random_matrix


@dataclass(frozen=True)
class Sketch(OpaqueSpec):
    """`sign(S k)` and `|k|`; the score is `sqrt(pi/2) / m |k| <S q, sign(S k)>` (definition 3.1).

    S is Gaussian with orthogonal blocks of D rows (section 4.1), of norm sqrt(D); `size` is m / D.
    The score is linear in q, so a key decodes to `sqrt(pi/2) / m |k| S^T sign(S k)`.
    """

    size: int
    bits = 1
    stable = False

    def nbytes(self, head_dim: int) -> int:
        """See OpaqueSpec."""
        if head_dim % 8:
            raise ValueError(f"head_dim={head_dim} is not allowed; it must be a multiple of 8")
        return self.size * head_dim // 8 + 2

    def encode(self, x: Tensor, valid: Tensor) -> tuple[Tensor, ...]:
        """See OpaqueSpec."""
        x = x.squeeze(-2).nan_to_num(0.0, 0.0, 0.0).double()
        d, norm = x.shape[-1], x.norm(dim=-1, keepdim=True)
        sign = precise(x, random_matrix(self.size * d, d, True, x.device).T) >= 0
        return join_bits(sign, 1), norm.clamp_max(65504).float().half()

    def decode(self, data: Tensor, head_dim: int) -> Tensor:
        """See OpaqueSpec."""
        sketch, norm = data[..., :-2], of_bytes(data[..., -2:], torch.float16)
        rows = self.size * head_dim
        projection = random_matrix(rows, head_dim, True, data.device)
        back: Tensor = (2.0 * split_bits(sketch, 1) - 1) @ projection
        return (math.sqrt(math.pi / 2 * head_dim) / rows * norm.float() * back).unsqueeze(-2)


@dataclass(frozen=True, kw_only=True)
class QJL(KVQuantizer, name="qjl", paper="2406.03482"):
    """Sketched keys (algorithm 1), asymmetric per-token values (section 3.2).

    `key_bits` is the sketch's size for each channel: 3, the bits that the paper reports. Its code
    has 4 in the first 15 layers and 2 in the others, and sketches eight outlier channels apart
    (section 4.1); here there is one sketch for all. Values and window are those of its code.
    """

    key_bits: int = 3
    value_bits: int = 2
    group_size: int | None = 32
    residual_length: int = 128
    sink_length: int = 0

    def spec(self, layer_idx: int | None = None) -> KVSpec:
        """See KVQuantizer.spec."""
        check_count("key_bits", self.key_bits, 1)
        value = QuantSpec(self.value_bits, "token", self.group_size)
        return KVSpec(Sketch(self.key_bits), value, self.residual_length, self.sink_length)
