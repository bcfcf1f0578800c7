"""AsymKV (2410.13212): 2 bits for the keys of early layers, 1 bit for what attention needs less."""

from __future__ import annotations

from dataclasses import dataclass

from kivi.quantizer import KVQuantizer
from kivi.spec import KVSpec, QuantSpec, check_count


@dataclass(frozen=True, kw_only=True)
class AsymKV(KVQuantizer, name="asymkv", paper="2410.13212"):
    """KIVI's axes and grid with 2-bit keys in the first layers, 1 bit elsewhere.

    "AsymKV-k/v" in the paper: keys have `high_bits` in the first k layers (`key_layers`), values in
    the first v (`value_layers`), and `low_bits` after them; None is all layers. The default is its
    AsymKV-L/0, keys of 2 bits and values of 1 bit in all L layers: 1.5 bits, scales and zeros not
    counted. The paper also halves k (16/0 of 32 layers); for long contexts it keeps 512 tokens
    exact. Of any layer, None, the spec is the widest, and so is the size told.
    """

    key_layers: int | None = None
    value_layers: int | None = 0
    high_bits: int = 2
    low_bits: int = 1
    group_size: int | None = 32
    residual_length: int = 128
    sink_length: int = 0

    def spec(self, layer_idx: int | None = None) -> KVSpec:
        """See KVQuantizer.spec."""
        bits = []
        for name in ("key_layers", "value_layers"):
            layers = getattr(self, name)
            if layers is not None:
                check_count(name, layers)
            high = layers is None or (layer_idx or 0) < layers
            bits.append(self.high_bits if high else self.low_bits)
        key = QuantSpec(bits[0], "channel", self.group_size)
        value = QuantSpec(bits[1], "token", self.group_size)
        return KVSpec(key, value, self.residual_length, self.sink_length)
