"""KIVI with symmetric key grids, as an article describes it; the paper's are asymmetric."""

from __future__ import annotations

from dataclasses import dataclass

from kivi.quantizer import KVQuantizer
from kivi.spec import Grid, KVSpec, QuantSpec


@dataclass(frozen=True, kw_only=True)
class KiviSymmetric(KVQuantizer, name="kivi_symmetric", paper="2402.02750"):
    """An ablation of KIVI's asymmetric grid (2402.02750, eq. 1): keys without a zero."""

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
            "symmetric",
        )
        value = QuantSpec(
            self.bits if self.value_bits is None else self.value_bits,
            "token",
            self.group_size,
            self.grid,
        )
        return KVSpec(key, value, self.residual_length, self.sink_length)
