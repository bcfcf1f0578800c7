"""Symmetric per-token int8, in the style of LLM.int8() (2208.07339, section 2.1)."""

from __future__ import annotations

from dataclasses import dataclass, replace

from kivi.quantizer import KVQuantizer
from kivi.spec import KVSpec, QuantSpec, Smooth


@dataclass(frozen=True, kw_only=True)
class Int8(KVQuantizer, name="int8", paper="2208.07339"):
    """One absolute-maximum scale for each token and head, 8 bit, no window.

    `smooth="max"` moves the keys' channel magnitudes to the queries first, as SmoothQuant does
    (2211.10438, eq. 4, all of the difficulty moved), with magnitudes of the first packed tokens in
    place of calibration.
    """

    bits: int = 8
    group_size: int | None = None
    smooth: Smooth | None = None
    residual_length: int = 0
    sink_length: int = 0

    def spec(self, layer_idx: int | None = None) -> KVSpec:
        """See KVQuantizer.spec."""
        value = QuantSpec(self.bits, "token", self.group_size, "symmetric")
        key = replace(value, smooth=self.smooth)
        return KVSpec(key, value, self.residual_length, self.sink_length)
