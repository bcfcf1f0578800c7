"""FlexGen's compressed cache (2303.06865, section 5)."""

from __future__ import annotations

from dataclasses import dataclass

from kivi.quantizer import KVQuantizer
from kivi.spec import KVSpec, QuantSpec


@dataclass(frozen=True, kw_only=True)
class FlexGen(KVQuantizer, name="flexgen", paper="2303.06865"):
    """Asymmetric min-max per-token, 4 bit, groups of 64 along the hidden dimension, no window."""

    bits: int = 4
    group_size: int | None = 64
    residual_length: int = 0
    sink_length: int = 0

    def spec(self, layer_idx: int | None = None) -> KVSpec:
        """See KVQuantizer.spec."""
        both = QuantSpec(self.bits, "token", self.group_size)
        return KVSpec(both, both, self.residual_length, self.sink_length)
