"""OScaR (2605.19660): KIVI with keys rotated and divided by their token's norm."""

from __future__ import annotations

from dataclasses import dataclass

from kivi.quantizer import KVQuantizer
from kivi.spec import KVSpec, QuantSpec


@dataclass(frozen=True, kw_only=True)
class OScaR(KVQuantizer, name="oscar_omni", paper="2605.19660"):
    """Canalized rotation, then omni-token scaling, then KIVI's axes. Not OSCAR: `oscar_cov`.

    Keys after RoPE: a Hadamard map over the head, each token divided by its norm, per-channel
    groups of G tokens. Values: a Hadamard map, per-token groups. One thing differs: the paper
    divides by the norm over all KV heads of a token, here each head has its own (16 bits for each
    head of each token), so that heads stay independent.
    """

    bits: int = 2
    key_bits: int | None = None
    value_bits: int | None = None
    group_size: int | None = 32
    residual_length: int = 128
    sink_length: int = 0

    def spec(self, layer_idx: int | None = None) -> KVSpec:
        """See KVQuantizer.spec."""
        key = QuantSpec(
            self.bits if self.key_bits is None else self.key_bits,
            "channel",
            self.group_size,
            transform="hadamard",
            token_norm=True,
        )
        value = QuantSpec(
            self.bits if self.value_bits is None else self.value_bits,
            "token",
            self.group_size,
            transform="hadamard",
        )
        return KVSpec(key, value, self.residual_length, self.sink_length)
