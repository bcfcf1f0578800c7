"""Formats of their own in pages: what a unit is told beside its tokens, and its bytes."""

from __future__ import annotations

import torch
from torch import Tensor

from kivi.packing import of_bytes
from kivi.spec import PLACE_BYTES, OpaqueSpec, Spec
from kivi.transforms import turn


def is_told(one: Spec | None) -> bool:
    """Whether `quantize_pack` is told more of runs than their tokens.

    That is their positions, and their weights if there are any.
    """
    return isinstance(one, OpaqueSpec) and (one.pre_rope or one.weighs_tokens)


def encode_opaque(
    words: Tensor,
    spec: OpaqueSpec,
    x: Tensor,
    index: Tensor,
    first: Tensor,
    valid: Tensor | None,
    position: Tensor | None,
    weight: Tensor | None,
) -> None:
    """`quantize.quantize_pack` for a format of its own."""
    if valid is None:
        valid = torch.ones(x.shape[2], dtype=torch.bool, device=x.device)
    units = x.float().unflatten(2, (-1, spec.unit))
    parts: list[Tensor] = []
    number = torch.arange(units.shape[2], device=x.device)
    if spec.pre_rope:
        assert position is not None
        place = (position[:, None] + number * spec.unit)[:, None, :, None].to(torch.int32)
        if spec.rope is not None:
            each = place + torch.arange(spec.unit, device=x.device)
            units = turn(units, each, spec.rope, back=True)
        parts.append(place.expand(*units.shape[:3], 1))
    if weight is not None:
        weight = weight.squeeze(-1).unflatten(-1, (-1, spec.unit))
    parts += spec.encode_weighted(units, valid.unflatten(-1, (-1, spec.unit)), weight)
    data = torch.cat([part.contiguous().view(torch.uint8) for part in parts], -1)
    row = first[:, None] // spec.unit + number
    words[index, :, row] = data.transpose(1, 2)


def decode_opaque(words: Tensor, spec: OpaqueSpec, head_dim: int) -> Tensor:
    """What `encode_opaque` wrote, `[N, Hkv, 512/U, U, D]` float32."""
    place, data = words.split([skip := PLACE_BYTES * spec.pre_rope, words.shape[-1] - skip], -1)
    x = spec.decode(data, head_dim)
    if spec.rope is None:
        return x
    place = of_bytes(place, torch.int32)
    return turn(x, place + torch.arange(spec.unit, device=words.device), spec.rope)
