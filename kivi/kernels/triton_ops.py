"""The Triton operators together, and what they can serve."""

from __future__ import annotations

import torch

from kivi.kernels import triton_formats, triton_mapped
from kivi.kernels.triton_decode import decode_attention
from kivi.kernels.triton_extend import extend_attention
from kivi.kernels.triton_portable import INTERPRETED
from kivi.kernels.triton_prompt import store_pages
from kivi.kernels.triton_quantize import quantize_pack
from kivi.kernels.triton_write import write_new
from kivi.spec import KVSpec

__all__ = [
    "decode_attention",
    "extend_attention",
    "packs",
    "prepare",
    "quantize_pack",
    "store_pages",
    "supports",
    "write_new",
]

prepare = triton_mapped.prepare


def supports(
    spec: KVSpec, head_dims: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> str | None:
    """What keeps attention from serving a cache, or None.

    Args:
        spec: how it is packed.
        head_dims: of keys and values.
        dtype: of keys, values and queries.
        device: where it lives.
    """
    if device.type != "cuda" and not INTERPRETED:
        return f"device={str(device)!r} is not a GPU"
    return triton_formats.supports(spec.key, spec.value, *head_dims, dtype)


def packs(spec: KVSpec, head_dims: tuple[int, int]) -> bool:
    """Whether quantization has a kernel too."""
    pairs = zip((spec.key, spec.value), head_dims, strict=True)
    return all(triton_formats.packs(one, size) for one, size in pairs)
