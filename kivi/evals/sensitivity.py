"""How much the loss of a text depends on each element of its keys and values."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kivi.evals.attention_error import Recorder
from kivi.evals.feeding import Model


class Sensitive(NamedTuple):
    """A layer's keys (after RoPE) and values `[B, Hkv, T, D]`, and the loss' gradients by them."""

    k: Tensor
    v: Tensor
    k_gradient: Tensor
    v_gradient: Tensor


def record_sensitivity(model: Model, ids: Tensor) -> list[Sensitive]:
    """Every layer's keys and values in tokens `[B, T]`, from one exact forward and a backward.

    Raises:
        ValueError: for a model that does not call `scaled_dot_product_attention`, or whose weights
            take no gradient.
    """
    ids = ids.to(model.device)
    with torch.enable_grad(), Recorder() as recorder:
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    if not recorder.calls:
        raise ValueError("model: its attention does not call scaled_dot_product_attention")
    if not loss.requires_grad:
        raise ValueError("model: its weights take no gradient")
    both = [(call["key"], call["value"]) for call, _ in recorder.calls]
    gradients = torch.autograd.grad(loss, [x for pair in both for x in pair])
    heads = model.config.get_text_config().num_key_value_heads
    layers = []
    for i, (k, v) in enumerate(both):
        # Some models repeat key and value heads themselves: a head's gradient is the sum.
        own = [x.detach()[:, :: x.shape[1] // heads] for x in (k, v)]
        each = [g.unflatten(1, (heads, -1)).sum(2) for g in gradients[2 * i : 2 * i + 2]]
        layers.append(Sensitive(*own, *each))
    return layers
