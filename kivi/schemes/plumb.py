"""plumb: 2-bit keys and values that stay upright: rotated, centred and unbiased."""

from __future__ import annotations

from dataclasses import dataclass

from kivi.quantizer import KVQuantizer
from kivi.spec import Grid, KVSpec, QuantSpec, Smooth, Transform


@dataclass(frozen=True, kw_only=True)
class Plumb(KVQuantizer, name="plumb"):
    """kivi's own tuning-free scheme, found by ablation (`kivi ablate --preset flagship`).

    Keys and values alike: a Hadamard map over the head spreads outliers; the channels' means over
    C tokens are subtracted, which takes what a bias or a slow rotary channel adds; and what is left
    of a token shares one scale. It is not the scale of least squared error, with which the
    quantized token is too short and its attention score too small, but the one with which it is
    unbiased: `<x^, x> = <x, x>` (EDEN, 2108.08842, shows it for one vector). Channels that vary
    much more than the median one are scaled down first, so that their error does not spread.
    Sinks stay exact.
    """

    bits: int = 2
    key_bits: int | None = None
    value_bits: int | None = None
    grid: Grid = "unbiased"
    transform: Transform | None = "hadamard"
    center: int | None = 128
    smooth: Smooth | None = "outliers"
    residual_length: int = 128
    sink_length: int = 4

    def spec(self, layer_idx: int | None = None) -> KVSpec:
        """See KVQuantizer.spec."""
        key, value = (
            QuantSpec(
                self.bits if bits is None else bits,
                "token",
                None,
                self.grid,
                transform=self.transform,
                center=self.center,
                smooth=self.smooth,
            )
            for bits in (self.key_bits, self.value_bits)
        )
        return KVSpec(key, value, self.residual_length, self.sink_length)
