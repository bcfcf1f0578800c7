"""KIVI (2402.02750): keys per-channel, values per-token, the recent tokens exact."""

from __future__ import annotations

from dataclasses import dataclass

from kivi.quantizer import KVQuantizer
from kivi.spec import Grid, KVSpec, QuantSpec


@dataclass(frozen=True, kw_only=True)
class Kivi(KVQuantizer, name="kivi", paper="2402.02750"):
    """Tuning-free asymmetric quantization: eq. 1 (grid), sections 3.2 and 3.3 (axes, window).

    Keys share a scale over G tokens of a channel, values over G channels of a token. The original
    flushes its window a whole residual at a time; here at least R tokens stay exact, always.
    """

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
            "token",
            self.group_size,
            self.grid,
        )
        return KVSpec(key, value, self.residual_length, self.sink_length)
