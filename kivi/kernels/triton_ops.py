"""The Triton operators together, and what they can serve."""

from __future__ import annotations

import torch

from kivi.kernels import triton_decode
from kivi.kernels.triton_decode import INTERPRETED, decode_attention
from kivi.kernels.triton_extend import extend_attention
from kivi.kernels.triton_quantize import quantize_pack
from kivi.spec import KVSpec

__all__ = ["decode_attention", "extend_attention", "quantize_pack", "supports"]


def supports(
    spec: KVSpec, head_dims: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> str | None:
    """What keeps the kernels from serving a cache, or None.

    Args:
        spec: how it is packed.
        head_dims: of keys and values.
        dtype: of keys, values and queries.
        device: where it lives.
    """
    if device.type != "cuda" and not INTERPRETED:
        return f"device={str(device)!r} is not a GPU"
    return triton_decode.supports(spec.key, spec.value, *head_dims, dtype)
