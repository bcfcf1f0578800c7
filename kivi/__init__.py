"""kivi: KV-cache quantization for PyTorch."""

from kivi.cache import CacheBytes, LayerCache
from kivi.quantize import PackedTensor
from kivi.quantizer import KVQuantizer
from kivi.spec import KVSpec, QuantSpec

__all__ = ["CacheBytes", "KVQuantizer", "KVSpec", "LayerCache", "PackedTensor", "QuantSpec"]
__version__ = "0.1.0"
