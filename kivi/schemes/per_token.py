"""Keys and values per-token, as most earlier caches: KIVI's first row of Table 1."""

from __future__ import annotations

from dataclasses import dataclass

from kivi.quantizer import KVQuantizer
from kivi.spec import Grid, KVSpec, QuantSpec


@dataclass(frozen=True, kw_only=True)
class PerToken(KVQuantizer, name="per_token", paper="2402.02750"):
    """Keys and values share a scale over G channels of a token (2402.02750, Table 1)."""

    bits: int = 2
    key_bits: int | None = None
    value_bits: int | None = None
    group_size: int | None = 32
    residual_length: int = 128
    sink_length: int = 0
    grid: Grid = "asymmetric"

    def spec(self, layer_idx: int | None = None) -> KVSpec:
        """See KVQuantizer.spec."""
        key = QuantSpec(
            self.bits if self.key_bits is None else self.key_bits,
            "token",
            self.group_size,
            self.grid,
        )
        value = QuantSpec(
            self.bits if self.value_bits is None else self.value_bits,
            "token",
            self.group_size,
            self.grid,
        )
        return KVSpec(key, value, self.residual_length, self.sink_length)
