"""Atom's cache (2310.19102): asymmetric min-max, one group for each head of each token."""

from __future__ import annotations

from dataclasses import dataclass

from kivi.quantizer import KVQuantizer
from kivi.spec import KVSpec, QuantSpec


@dataclass(frozen=True, kw_only=True)
class Atom(KVQuantizer, name="atom", paper="2310.19102"):
    """Asymmetric 4-bit keys and values at the granularity of attention heads (section 4.4).

    Ranges are not clipped, as in the authors' scripts (`kv_clip_ratio` 1). lmdeploy's int4 cache
    stores the same numbers. There is no exact window.
    """

    bits: int = 4
    key_bits: int | None = None
    value_bits: int | None = None
    residual_length: int = 0
    sink_length: int = 0

    def spec(self, layer_idx: int | None = None) -> KVSpec:
        """See KVQuantizer.spec."""
        key, value = (
            QuantSpec(self.bits if bits is None else bits, "token", None)
            for bits in (self.key_bits, self.value_bits)
        )
        return KVSpec(key, value, self.residual_length, self.sink_length)
