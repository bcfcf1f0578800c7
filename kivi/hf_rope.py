"""How a model turns its keys: its rotary embedding, found by what it does to each channel."""

from __future__ import annotations

import inspect
import sys
from typing import Any

import torch

from kivi.spec import Rope


@torch.no_grad()
def find_rope(model: Any, layer_idx: int) -> Rope | None:
    """The rotary embedding of a layer's keys; None where there is none that can be found.

    The model's own cos and sin of position 1 and its own function turn each channel alone. That
    says which channels make a pair and by what angle they turn, whatever their order, and holds for
    parts of a head that are turned. A scaling of its own drops out: keys keep it. Frequencies that
    grow with the length of the text ("dynamic") are taken as they are now.
    """
    decoder = model.get_decoder()
    rotary, config = (
        getattr(decoder, "rotary_emb", None),
        model.config.get_text_config(decoder=True),
    )
    apply = getattr(sys.modules[type(decoder).__module__], "apply_rotary_pos_emb", None)
    used = getattr(config, "no_rope_layers", None)  # 1 where a layer has one
    # Biases in place of turns; keys of which a part is turned that is not their first.
    other = getattr(config, "alibi", False) or hasattr(config, "qk_rope_head_dim")
    if rotary is None or apply is None or other or (used and not used[layer_idx]):
        return None
    options = {}
    if "layer_type" in inspect.signature(rotary.forward).parameters:
        options["layer_type"] = config.layer_types[layer_idx]
    place = torch.ones(1, 1, dtype=torch.int64, device=model.device)
    cos, sin = rotary(torch.zeros(1, 1, 1, device=model.device), place, **options)
    for size in (cos.shape[-1], 2 * cos.shape[-1]):
        each = torch.eye(size, device=model.device).view(size, 1, 1, size)
        try:
            turned = apply(each, each, cos, sin)[1].view(size, size).T.double().cpu()
        except RuntimeError:  # not as wide as its cos and sin
            continue
        # Row i: what channel i gets of each other.
        off = turned - torch.diag(turned.diagonal())
        other, partner = off.abs().max(1)
        own = torch.arange(size)
        partner = torch.where(other > 0, partner, own)
        angle = torch.atan2(-off[own, partner], turned.diagonal())
        return Rope(tuple(angle.tolist()), tuple(partner.tolist()))
    return None
