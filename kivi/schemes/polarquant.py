"""PolarQuant (2502.02617): a random rotation, then 16 channels as one radius and 15 angles."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from kivi.codebooks import k_means
from kivi.packing import join_bits, of_bytes, split_bits
from kivi.quantizer import KVQuantizer
from kivi.spec import KVSpec, OpaqueSpec
from kivi.transforms import precise, random_matrix

BITS = (4, 2, 2, 2)
"""Bits of an angle at each level of the recursion (section 4.1)."""
BLOCK = 2 ** len(BITS)


@cache
def _codebook(level: int) -> tuple[float, ...]:
    """The angles that stand for codes: even at the first level, then the 1-D k-means of a density.

    Of a Gaussian vector the angles at level l > 1 have the density `sin(2 x)^(2^(l-1) - 1)` on
    [0, pi/2] (lemma 2), at level 1 they are uniform on [0, 2 pi).
    """
    count = 2 ** BITS[level]
    if level == 0:
        return tuple((i + 0.5) / count * 2 * math.pi for i in range(count))
    fine = [(i + 0.5) / 4096 * math.pi / 2 for i in range(4096)]
    weight = [math.sin(2 * x) ** (2**level - 1) for x in fine]
    return k_means(fine, weight, [(i + 0.5) / count * math.pi / 2 for i in range(count)])


def codebook(level: int) -> tuple[float, ...]:
    """See `_codebook`."""
    return _codebook(level)


# Dynamo looks through a cache and would trace every step of the search; see kivi.transforms.
codebook._dynamo_marked_constant = True  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Polar(OpaqueSpec):
    """Algorithm 1: pairs become radius and angle, radii pair up again, four times."""

    bits = 4

    def _sizes(self, head_dim: int) -> list[int]:
        """Bytes of the codes of each level."""
        return [-(-b * head_dim // 2 ** (level + 1) // 8) for level, b in enumerate(BITS)]

    def nbytes(self, head_dim: int) -> int:
        """See OpaqueSpec."""
        if head_dim % BLOCK:
            raise ValueError(f"head_dim={head_dim} is not allowed; choose a multiple of {BLOCK}")
        return int(sum(self._sizes(head_dim)) + 2 * head_dim // BLOCK)

    def encode(self, x: Tensor, valid: Tensor) -> tuple[Tensor, ...]:
        """See OpaqueSpec."""
        d = x.shape[-1]
        x = x.squeeze(-2).nan_to_num(0.0, 0.0, 0.0)
        radius = precise(x, random_matrix(d, d, True, x.device).T)
        parts = []
        for level, bits in enumerate(BITS):
            a, b = radius.unflatten(-1, (-1, 2)).unbind(-1)
            angle = torch.atan2(b, a)
            angles = torch.tensor(codebook(level), dtype=torch.float64, device=x.device)
            if level == 0:
                angle = torch.where(angle < 0, angle + 2 * math.pi, angle)
            codes = torch.bucketize(angle.contiguous(), (angles[1:] + angles[:-1]) / 2)
            fill = -codes.shape[-1] % (8 // bits)  # a whole number of bytes
            parts.append(join_bits(F.pad(codes, (0, fill)), bits))
            radius = (a.square() + b.square()).sqrt()
        return (*parts, radius.clamp_max(65504).float().half())

    def decode(self, data: Tensor, head_dim: int) -> Tensor:
        """See OpaqueSpec."""
        *packed, rest = data.split([*self._sizes(head_dim), 2 * head_dim // BLOCK], -1)
        x: Tensor = of_bytes(rest, torch.float16).float()
        for level in reversed(range(len(BITS))):
            angles = torch.tensor(codebook(level), device=data.device)
            angle = angles[split_bits(packed[level], BITS[level])[..., : x.shape[-1]]]
            x = torch.stack([x * angle.cos(), x * angle.sin()], -1).flatten(-2)
        x = x @ random_matrix(head_dim, head_dim, True, data.device)
        return x.unsqueeze(-2)


@dataclass(frozen=True, kw_only=True)
class PolarQuant(KVQuantizer, name="polarquant", paper="2502.02617"):
    """62 bits for 16 channels: angles of 4, 2, 2 and 2 bits by level, a 16-bit radius.

    That is section 4.1; the codebook is the paper's offline one. No window.
    """

    residual_length: int = 0
    sink_length: int = 0

    def spec(self, layer_idx: int | None = None) -> KVSpec:
        """See KVQuantizer.spec."""
        return KVSpec(Polar(), Polar(), self.residual_length, self.sink_length)
