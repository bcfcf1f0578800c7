"""Models that packed attention cannot serve, or not in all layers: correct, and one warning."""

import warnings
from typing import Any

import pytest
import torch
from one_thread import one_thread  # noqa: F401
from tiny_models import LOSSLESS, NEW, SHAPE, TWO_BIT, generate, opinionated, prompt, tiny
from transformers import (
    DynamicCache,
    FalconH1Config,
    FalconH1ForCausalLM,
    Lfm2Config,
    Lfm2ForCausalLM,
    PreTrainedModel,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

from kivi.hf import KVCache

LINEAR = ["linear_attention", "full_attention"]
HYBRIDS: dict[str, tuple[type[PreTrainedModel], Any, int]] = {
    "lfm2": (  # convolutions and attention by turns
        Lfm2ForCausalLM,
        Lfm2Config(**{**SHAPE, "layer_types": ["conv", "full_attention"]}),
        1,
    ),
    "qwen3_next": (  # gated delta rule and attention by turns
        Qwen3NextForCausalLM,
        Qwen3NextConfig(
            **{**SHAPE, "layer_types": LINEAR},
            linear_num_key_heads=2,
            linear_num_value_heads=2,
            linear_key_head_dim=16,
            linear_value_head_dim=16,
            num_experts=2,
            num_experts_per_tok=1,
            moe_intermediate_size=32,
            shared_expert_intermediate_size=32,
        ),
        1,
    ),
    "falcon_h1": (  # both in each layer
        FalconH1ForCausalLM,
        FalconH1Config(**SHAPE, mamba_d_ssm=32, mamba_n_heads=2, mamba_d_head=16, mamba_d_state=16),
        0,
    ),
}


def test_latent_attention() -> None:
    """DeepSeek-V3 caches latents and makes keys and values of them, so it needs them dense."""
    model, inputs = tiny("deepseek_v3"), prompt(padding=30)
    theirs = generate(model, DynamicCache(config=model.config), inputs)
    cache = KVCache(model, LOSSLESS)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        mine = generate(model, cache, inputs)
        inputs = {"input_ids": mine, "attention_mask": (mine != 0).long()}
        inputs["attention_mask"][:, :30] = torch.tensor([[0], [1]])
        inputs["attention_mask"][:, 30:] = 1
        second = generate(model, cache, inputs, max_new_tokens=3)
    assert torch.equal(mine, theirs)
    assert len(mine[:, 70:].unique()) > 10
    assert (cache.packed_calls, cache.dense_calls) == ([0, 0], [NEW + 3, NEW + 3])
    assert sum("needs dense keys and values" in str(w.message) for w in caught) == 1
    assert torch.equal(second, generate(model, DynamicCache(config=model.config), inputs)[:, :97])
    # What it caches is packed all the same.
    packed = KVCache(model, TWO_BIT)
    with pytest.warns(UserWarning, match="needs dense"):
        generate(model, packed, prompt())
    assert packed.nbytes().used < 0.8 * cache.nbytes().used


@pytest.mark.parametrize("name", HYBRIDS)
def test_hybrids(name: str) -> None:
    """Layers with a recurrent state keep transformers' own cache, the others are packed."""
    model_class, config, packs = HYBRIDS[name]
    torch.manual_seed(0)
    model, inputs = opinionated(model_class(config)), prompt(padding=30)
    theirs = generate(model, DynamicCache(config=config), inputs)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        cache = KVCache(model, LOSSLESS)
        mine = generate(model, cache, inputs)
    assert torch.equal(mine, theirs)
    assert len(mine[:, 70:].unique()) > 5
    assert sum("keep their own cache" in str(w.message) for w in caught) == 1
    assert (cache.packed_calls, cache.dense_calls) == ([NEW] * packs, [0] * packs)
