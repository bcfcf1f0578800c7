"""QuaRot's cache (2404.00456): rotated heads, asymmetric per-token groups, a little clipped."""

from __future__ import annotations

from dataclasses import dataclass

from kivi.quantizer import KVQuantizer
from kivi.spec import KVSpec, QuantSpec


@dataclass(frozen=True, kw_only=True)
class QuaRot(KVQuantizer, name="quarot", paper="2404.00456"):
    """A Hadamard map of keys after RoPE (eq. 14) and of values (eq. 7), asymmetric groups of 128.

    Ranges are shrunk to 95 % (section 5, setup). The paper folds the values' map into weights, here
    the cache undoes it: the stored numbers are the same. The paper keeps no exact window.
    """

    bits: int = 4
    key_bits: int | None = None
    value_bits: int | None = None
    group_size: int | None = 128
    clip: float = 0.95
    residual_length: int = 0
    sink_length: int = 0

    def spec(self, layer_idx: int | None = None) -> KVSpec:
        """See KVQuantizer.spec."""
        key, value = (
            QuantSpec(
                self.bits if bits is None else bits,
                "token",
                self.group_size,
                clip=self.clip,
                transform="hadamard",
            )
            for bits in (self.key_bits, self.value_bits)
        )
        return KVSpec(key, value, self.residual_length, self.sink_length)
