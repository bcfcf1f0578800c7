"""The quantized cache of ExLlamaV3: Hadamard blocks of 32 channels, levels around zero."""

from __future__ import annotations

from dataclasses import dataclass

from kivi.quantizer import KVQuantizer
from kivi.spec import KVSpec, QuantSpec


@dataclass(frozen=True, kw_only=True)
class ExLlamaV3(KVQuantizer, name="exllamav3"):
    """Every 32 channels of a token: a Hadamard map, absolute maximum, midpoint grid, no window.

    With s the largest magnitude, code q stands for `s * ((2 q + 1) / 2^b - 1)`: that is a midpoint
    grid over `1 - 2^-b` of the range. From the documentation and the formats of
    github.com/turboderp-org/exllamav3; its cache has no paper.
    """

    bits: int = 4
    key_bits: int | None = None
    value_bits: int | None = None
    residual_length: int = 0
    sink_length: int = 0

    def spec(self, layer_idx: int | None = None) -> KVSpec:
        """See KVQuantizer.spec."""
        key, value = (
            QuantSpec(b, "token", 32, "midpoint", clip=1 - 2.0**-b, transform="hadamard_32")
            for b in (
                self.bits if self.key_bits is None else self.key_bits,
                self.bits if self.value_bits is None else self.value_bits,
            )
        )
        return KVSpec(key, value, self.residual_length, self.sink_length)
