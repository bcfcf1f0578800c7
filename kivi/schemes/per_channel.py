"""Keys and values per-channel: KIVI's ablation, Table 1."""

from __future__ import annotations

from dataclasses import dataclass

from kivi.quantizer import KVQuantizer
from kivi.spec import Grid, KVSpec, QuantSpec


@dataclass(frozen=True, kw_only=True)
class PerChannel(KVQuantizer, name="per_channel", paper="2402.02750"):
    """Keys and values share a scale over G tokens of a channel (2402.02750, Table 1)."""

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
            "channel",
            self.group_size,
            self.grid,
        )
        value = QuantSpec(
            self.bits if self.value_bits is None else self.value_bits,
            "channel",
            self.group_size,
            self.grid,
        )
        return KVSpec(key, value, self.residual_length, self.sink_length)
