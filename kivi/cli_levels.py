"""Levels of a non-uniform format for each layer of a model, for `kivi tune`."""

from __future__ import annotations

import json
from pathlib import Path

from torch import Tensor

from kivi.cli_model import LoadedModel
from kivi.evals.sensitivity import record_sensitivity
from kivi.hf_rope import find_rope
from kivi.schemes.kvquant import KVQuant, NonUniform


def write_levels(out: Path, loaded: LoadedModel, ids: Tensor, bits: float) -> int:
    """Find levels of keys and values on tokens `[B, T]`, and write the file that the scheme reads.

    Returns:
        how many layers there are.

    Raises:
        ValueError: for bits that the scheme does not take, too few tokens for a unit, or a model
            whose attention cannot be recorded.
    """
    scheme = KVQuant(bits=bits)  # type: ignore[arg-type]  # checked by spec()
    spec = scheme.spec()
    if ids.shape[1] < spec.sink_length + spec.unit:
        raise ValueError(
            f"context={ids.shape[1]} is not allowed; it must be >= {spec.sink_length + spec.unit}"
        )
    document: dict[str, list[tuple[float, ...]]] = {"key": [], "value": []}
    for i, x in enumerate(record_sensitivity(loaded.model, ids)):
        own, first = spec.with_rope(find_rope(loaded.model, i)), spec.sink_length
        pairs = (("key", own.key, x.k, x.k_gradient), ("value", own.value, x.v, x.v_gradient))
        for name, one, tokens, gradient in pairs:
            assert isinstance(one, NonUniform)
            found = one.fitted(tokens[:, :, first:], gradient[:, :, first:], first)
            document[name].append(found)
    out.write_text(json.dumps(document) + "\n", encoding="utf-8")
    return len(document["key"])
