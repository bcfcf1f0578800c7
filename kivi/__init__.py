"""kivi: KV-cache quantization for PyTorch."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kivi.cache import LayerCache
    from kivi.pages import CacheBytes
    from kivi.quantize import PackedTensor
    from kivi.quantizer import KVQuantizer
    from kivi.spec import KVSpec, QuantSpec

__all__ = ["CacheBytes", "KVQuantizer", "KVSpec", "LayerCache", "PackedTensor", "QuantSpec"]
__version__ = "0.1.0"

_HOME = {
    "CacheBytes": "kivi.pages",
    "KVQuantizer": "kivi.quantizer",
    "KVSpec": "kivi.spec",
    "LayerCache": "kivi.cache",
    "PackedTensor": "kivi.quantize",
    "QuantSpec": "kivi.spec",
}


def __getattr__(name: str) -> object:
    # On first use: the command line's --help then needs no torch.
    if name not in _HOME:
        raise AttributeError(f"module 'kivi' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
