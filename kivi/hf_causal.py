"""The handle of a mask that says no more than "causal". Torch only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

_PROPERTIES = ("shape", "dtype", "device", "ndim", "layout", "requires_grad", "is_cuda", "is_cpu")
METADATA = [getattr(Tensor, name).__get__ for name in (*_PROPERTIES, "is_meta", "is_sparse")] + [
    *(Tensor.size, Tensor.dim, Tensor.ndimension, Tensor.numel, Tensor.nelement, Tensor.__len__),
    *(Tensor.is_floating_point, Tensor.element_size, Tensor.get_device, Tensor.__hash__),
]
"""What is asked of a handle without making what it stands for."""


class CausalMask(torch.Tensor):
    """Handle for a mask `[B, 1, T, N]` with which T new tokens see all before them: no memory.

    For a chunk of a long prompt the mask itself, and what it takes to make it, would be larger than
    all else that the chunk needs. Attention over packed pages knows what is causal; any other use
    makes the mask.
    """

    make: Callable[[], Tensor]

    @classmethod
    def of(
        cls, make: Callable[[], Tensor], shape: Sequence[int], device: torch.device | str
    ) -> CausalMask:
        """The handle of what `make` makes."""
        one = torch.empty((), dtype=torch.bool, device=device)
        handle = one.expand(tuple(shape)).as_subclass(cls)
        handle.make = make
        return handle

    @staticmethod
    def made(mask: Tensor | None) -> Tensor | None:
        """The mask that a handle stands for; anything else as it is."""
        return mask.make() if isinstance(mask, CausalMask) else mask

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Metadata as it is, anything else of the mask itself."""
        kwargs = kwargs or {}
        if func in METADATA:
            return super().__torch_function__(func, types, args, kwargs)  # type: ignore[no-untyped-call]
        made_args, made_kwargs = tree_map(cls.made, (args, kwargs))
        return func(*made_args, **made_kwargs)
