"""What the masks of transformers say of new tokens, read once for all layers. Torch only."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from kivi.cache import LayerCache
from kivi.checks import tracing
from kivi.steps import Steps

# Elements of a piece of a mask that may be compared at a time.
BLOCK_MASK = 2**24


class Reading(NamedTuple):
    """What a mask says of T new columns; None where it says nothing unusual.

    `valid [B, T]`: False for padding. `block [B, 1, T, T]`: what new tokens see of each other.
    `before`: columns before them.
    """

    before: int | Tensor
    valid: Tensor | None = None
    block: Tensor | None = None


def stand_in(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Tensors `[B, Hkv, N, D]` and `[B, Hkv, N, Dv]` without memory; `shape`: all five."""
    one = torch.empty((), dtype=dtype, device=device)
    return one.expand(shape[:4]), one.expand(*shape[:3], shape[4])


class Shared:
    """What the layers of a cache share: masks and steps, worked out once for all; one warning."""

    def __init__(self) -> None:
        # Weak: a mask of a long prompt is large, and must not outlive its forward.
        self._known = WeakTensorKeyDictionary()
        self._stand_in: tuple[Any, tuple[Tensor, Tensor]] | None = None
        self.steps = Steps()
        self.warned = False

    def __reduce__(self) -> tuple[type[Shared], tuple[()]]:
        return Shared, ()  # a copy starts without what was read

    def stand_in(
        self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """What `stand_in` makes, for all layers that ask for the same."""
        kind = shape, dtype, device
        if self._stand_in is None or self._stand_in[0] != kind:
            with torch.inference_mode(False):  # it outlives that mode
                self._stand_in = kind, stand_in(*kind)
        return self._stand_in[1]

    def read(
        self,
        mask: Tensor | None,
        cache: LayerCache,
        seen: int | Tensor,
        t: int,
        window: int | None,
    ) -> Reading | None:
        """Read a mask; None where packed attention cannot do what it says.

        It can where a query sees all tokens of the past, or those of the window, and anything among
        the new tokens. A compiled call trusts that the mask is of this kind.

        Args:
            mask: which columns each query sees, padding not, `[B or 1, 1, T, N]` bool.
            cache: the layer's tokens.
            seen: columns before the new ones.
            t: T, new columns.
            window: a query sees only so many tokens; None if all.
        """
        b = cache.batch_size
        if mask is None:
            return Reading(seen)
        fits = mask.dtype == torch.bool and mask.dim() == 4 and mask.shape[1:3] == (1, t)
        if not fits or mask.shape[0] not in (1, b):
            return None
        if tracing():
            column = seen + torch.arange(t, device=mask.device)
            block = mask.index_select(-1, column).expand(b, -1, -1, -1)
            valid = block.diagonal(dim1=-2, dim2=-1)[:, 0]
            return Reading(seen, valid, block if t > 1 else None)
        # Masks are also written in place, and lengths change from step to step.
        lengths = cache.lengths()
        state = (None if mask.is_inference() else mask._version, lengths, window)
        if mask not in self._known or self._known[mask][0] != state:
            reading = _read(mask.expand(b, -1, -1, -1), int(seen), lengths, window)
            self._known[mask] = (state, reading)
        return self._known[mask][1]  # type: ignore[no-any-return]


def _read(mask: Tensor, before: int, lengths: list[int], window: int | None) -> Reading | None:
    """`Shared.read` of a mask `[B, 1, T, N]`, with one look at the device."""
    t = mask.shape[2]
    if mask.shape[3] < before + t:
        return None
    block = mask[..., before : before + t]
    valid = block.diagonal(dim1=-2, dim2=-1)[:, 0]
    length = torch.tensor(lengths, device=mask.device)[:, None]
    position = length + valid.cumsum(1) - 1
    reach = max(lengths) + t if window is None else window
    fits, plain, step = [], [], max(1, BLOCK_MASK // (t * len(lengths)))
    for start in range(0, t, step):
        rows = slice(start, start + step)
        query, padding = position[:, rows], ~valid[:, rows]
        past = (length - (query - reach + 1).clamp_min(0)).clamp_min(0)
        fits.append(((mask[:, 0, rows, :before].sum(-1) == past) | padding).all())
        fits.append(~(block[:, 0, rows] & ~valid[:, None, :]).any())
        distance = query[:, :, None] - position[:, None, :]
        near = (distance >= 0) & (distance < reach) & valid[:, None, :]
        plain.append(((block[:, 0, rows] == near) | padding[:, :, None]).all())
    fit, causal, full = torch.stack(
        [torch.stack(fits).all(), torch.stack(plain).all(), valid.all()]
    ).tolist()
    if not fit:
        return None
    # Clones: a view would keep the mask alive.
    return Reading(before, None if full else valid.clone(), None if causal else block.clone())
