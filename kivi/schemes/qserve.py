"""QServe's cache (2405.04532): KV4 with smoothed keys, one group for each head of each token."""

from __future__ import annotations

from dataclasses import dataclass

from kivi.quantizer import KVQuantizer
from kivi.spec import KVSpec, QuantSpec, Smooth


@dataclass(frozen=True, kw_only=True)
class QServe(KVQuantizer, name="qserve", paper="2405.04532"):
    """Asymmetric 4-bit keys and values, per head and dynamic, after SmoothAttention (section 4.2).

    Keys are divided and queries multiplied by `max|K_c|^0.5`, the larger maximum of the channels c
    and c + D/2 that RoPE mixes; scale and zero are 16 bit. The paper calibrates the factors and
    folds them into weights. Here a sequence's first 32 packed tokens give them, rounded to powers
    of two, and the cache applies them. No window.
    """

    bits: int = 4
    key_bits: int | None = None
    value_bits: int | None = None
    smooth: Smooth | None = "sqrt"
    residual_length: int = 0
    sink_length: int = 0

    def spec(self, layer_idx: int | None = None) -> KVSpec:
        """See KVQuantizer.spec."""
        bits = self.bits if self.key_bits is None else self.key_bits
        key = QuantSpec(bits, "token", None, smooth=self.smooth)
        bits = self.bits if self.value_bits is None else self.value_bits
        return KVSpec(key, QuantSpec(bits, "token", None), self.residual_length, self.sink_length)
