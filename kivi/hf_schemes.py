"""Which scheme each layer of a model gets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kivi.quantizer import KVQuantizer

Scheme = str | KVQuantizer
Schemes = Scheme | Sequence[Scheme] | Mapping[int | str, Scheme]


def layer_schemes(scheme: Schemes, layers: int, options: dict[str, Any]) -> list[KVQuantizer]:
    """One scheme for each layer.

    Args:
        scheme: a scheme or its name, a list with one for each layer, or a dict from layer numbers
            (negative from the end) to schemes with a "default".
        layers: how many layers there are.
        options: of a scheme given by name alone.

    Raises:
        ValueError: for an unknown scheme or option, or schemes that do not fit the layers.
    """
    if options and not isinstance(scheme, str):
        raise ValueError(f"options {sorted(options)} need a scheme's name; got scheme={scheme!r}")
    if isinstance(scheme, Mapping):
        wrong = [n for n in scheme if n != "default" and n not in range(-layers, layers)]
        chosen = {n % layers: s for n, s in scheme.items() if isinstance(n, int) and not wrong}
        if wrong or ("default" not in scheme and len(chosen) < layers):
            raise ValueError(
                f"scheme has layers {sorted(map(str, scheme))}; allowed are {-layers} to "
                f"{layers - 1}, and 'default' unless every layer is named"
            )
        each = [chosen[i] if i in chosen else scheme["default"] for i in range(layers)]
    else:
        each = [scheme] * layers if isinstance(scheme, str | KVQuantizer) else list(scheme)
    if len(each) != layers:
        raise ValueError(f"scheme has {len(each)} entries; the model has {layers} layers")
    found = [KVQuantizer.get(s, **options) if isinstance(s, str) else s for s in each]
    for one in found:
        if not isinstance(one, KVQuantizer):
            raise ValueError(f"scheme={one!r} is not allowed; give a scheme or its name")
    return found
