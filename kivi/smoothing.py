"""What the channels of a layer's packed tokens are divided by, found when the first ones leave."""

from __future__ import annotations

import torch
from torch import Tensor

from kivi.spec import KVSpec
from kivi.transforms import smooth_factor
from kivi.view import CacheView


def find_smooth(view: CacheView, spec: KVSpec, body: list[Tensor], packed: Tensor) -> None:
    """What channels of leaving tokens will be divided by; the first unit of a row says it."""
    if view.smooth is None or not view.smooth.shape[2]:
        return
    pairs = [(x, one.smooth) for x, one in zip(body, (spec.key, spec.value), strict=True) if one]
    every = torch.ones(spec.unit, dtype=torch.bool, device=view.length.device)
    new = torch.cat([smooth_factor(x, every, smooth) for x, smooth in pairs if smooth], -1)
    first = ((view.packed == 0) & (packed > 0))[:, None, None]
    view.smooth.copy_(torch.where(first, new, view.smooth))


def new_smooth(spec: KVSpec, key: Tensor, value: Tensor) -> Tensor:
    """`CacheView.smooth` of empty rows, for exact slots `[B, Hkv, E, D]` of keys and values."""
    pairs = ((spec.key, key), (spec.value, value))
    channels = sum(x.shape[3] for one, x in pairs if one is not None and one.smooth)
    return torch.ones(*key.shape[:2], channels, device=key.device)
