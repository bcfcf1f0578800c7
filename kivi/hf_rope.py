"""A model's own rotary embedding, to turn queries and keys with. Torch only."""

from __future__ import annotations

import inspect
import sys
from typing import Any

import torch
from torch import Tensor

from kivi.sinks import Rotate


def rotation(model: Any, layer_idx: int) -> Rotate:
    """What turns vectors of a layer on by positions, negative ones as well, by its cos and sin.

    Args:
        model: a decoder of transformers.
        layer_idx: the layer; kinds of layers may have frequencies of their own.

    Raises:
        ValueError: for a model or layer that has no rotary embedding, or one whose frequencies
            change with the length of the text.
    """
    name = type(model).__name__
    config = model.config.get_text_config(decoder=True)
    named = ((type(m).__name__, m) for m in model.get_decoder().modules())
    module: Any = next((m for kind, m in named if kind.endswith("RotaryEmbedding")), None)
    apply = getattr(sys.modules[type(module).__module__], "apply_rotary_pos_emb", None)
    without = getattr(config, "no_rope_layers", None)
    alibi = getattr(config, "alibi", False)
    if module is None or apply is None or alibi or (without and not without[layer_idx]):
        raise ValueError(
            f"model={name} has no rotary embedding in layer {layer_idx} that its module applies "
            "with apply_rotary_pos_emb; schemes that drop tokens need one"
        )
    types = getattr(config, "layer_types", None)
    layer_type = types[layer_idx] if types else None
    kind = getattr(module, "rope_type", None)
    kind = kind.get(layer_type) if isinstance(kind, dict) else kind
    if kind in ("dynamic", "longrope"):
        raise ValueError(f"model={name} has rope_type={kind!r}, whose frequencies change")
    each = "layer_type" in inspect.signature(module.forward).parameters
    options = {"layer_type": layer_type} if each else {}

    def rotate(x: Tensor, positions: Tensor) -> Tensor:
        cos, sin = module(x, positions, **options)
        length = torch.hypot(cos, sin)  # some embeddings scale as well
        turned: Tensor = apply(x, x, cos / length, sin / length)[0]
        return turned

    return rotate
