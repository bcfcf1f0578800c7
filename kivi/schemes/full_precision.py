"""Nothing quantized: the same pages, window and operators in the model's own dtype, lossless."""

from __future__ import annotations

from dataclasses import dataclass

from kivi.quantizer import KVQuantizer
from kivi.spec import KVSpec


@dataclass(frozen=True, kw_only=True)
class FullPrecision(KVQuantizer, name="full_precision"):
    """Keys and values as they are: the baseline of every ablation."""

    residual_length: int = 128
    sink_length: int = 0

    def spec(self, layer_idx: int | None = None) -> KVSpec:
        """See KVQuantizer.spec."""
        return KVSpec(None, None, self.residual_length, self.sink_length)
