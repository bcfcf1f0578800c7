"""KVTuner (2502.04420): keys and values with bits of their own in every layer, from a file."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from kivi.quantizer import KVQuantizer
from kivi.spec import BITS, Axis, KVSpec, QuantSpec, check_choice


def read_pairs(file: str) -> tuple[tuple[int, int], ...]:
    """Bits of keys and values for each layer, from `{"layers": [[8, 4], [4, 2], ...]}`.

    Raises:
        ValueError: for a file that cannot be read or says something else.
    """
    try:
        pairs = json.loads(Path(file).read_text(encoding="utf-8"))["layers"]
        found = tuple((key, value) for key, value in pairs)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f'file={file!r} must hold {{"layers": [[key bits, value bits], ...]}}: {error}'
        ) from error
    if not found:
        raise ValueError(f"file={file!r} has no layers")
    for bits in (b for pair in found for b in pair):
        check_choice(f"bits in file={file!r}", bits, BITS)
    return found


@dataclass(frozen=True, kw_only=True)
class KVTuner(KVQuantizer, name="kvtuner", paper="2502.04420"):
    """Pairs of key and value bits searched offline, layer by layer, over KIVI or per-token keys.

    `kivi tune --out bits.json` finds them for a model and a text.

    Without a file every layer has `key_bits` and `value_bits`. More than the file's layers get its
    last pair.
    """

    file: str | None = None
    key_bits: int = 4
    value_bits: int = 2
    key_axis: Axis = "channel"
    group_size: int | None = 32
    residual_length: int = 128
    sink_length: int = 0

    def spec(self, layer_idx: int | None = None) -> KVSpec:
        """See KVQuantizer.spec; of any layer, None, it is the widest."""
        bits = (self.key_bits, self.value_bits)
        if self.file is not None:
            pairs = read_pairs(self.file)
            bits = max(pairs) if layer_idx is None else pairs[min(layer_idx, len(pairs) - 1)]
        key = QuantSpec(bits[0], self.key_axis, self.group_size)
        value = QuantSpec(bits[1], "token", self.group_size)
        return KVSpec(key, value, self.residual_length, self.sink_length)

    def bits_per_element(self, head_dim: int = 128) -> float:
        """Mean over the layers of the file."""
        layers = range(len(read_pairs(self.file))) if self.file is not None else (None,)
        each = [self.spec(layer).bits_per_element(head_dim) for layer in layers]
        return sum(each) / len(each)
