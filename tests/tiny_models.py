"""Small random models of many architectures, with weights large enough to have opinions."""

from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    FalconConfig,
    FalconForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

WINDOW = 48
VOCABULARY = 96
MIXED = ["sliding_attention", "full_attention"]
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
FALCON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "bias": False,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}

Config = Callable[..., Any]
MODELS: dict[str, tuple[Config, Callable[[Any], PreTrainedModel], dict[str, Any]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM, SHAPE),
    "mistral": (MistralConfig, MistralForCausalLM, {**SHAPE, "sliding_window": WINDOW}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {k: v for k, v in SHAPE.items() if k != "head_dim"}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, SHAPE),
    "phi3": (Phi3Config, Phi3ForCausalLM, {**SHAPE, "sliding_window": WINDOW}),
    "gemma2": (
        Gemma2Config,
        Gemma2ForCausalLM,
        {**SHAPE, "sliding_window": WINDOW, "attn_logit_softcapping": 2.0, "layer_types": MIXED},
    ),
    "gemma3": (
        Gemma3TextConfig,
        Gemma3ForCausalLM,
        {**SHAPE, "sliding_window": WINDOW, "layer_types": MIXED},
    ),
    "gpt_oss": (
        GptOssConfig,
        GptOssForCausalLM,
        {
            **SHAPE,
            "sliding_window": WINDOW,
            "layer_types": MIXED,
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
        },
    ),
    "falcon": (FalconConfig, FalconForCausalLM, {**FALCON, "multi_query": True}),
    "falcon_new": (
        FalconConfig,
        FalconForCausalLM,
        {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2},
    ),
    "falcon_alibi": (FalconConfig, FalconForCausalLM, {**FALCON, "alibi": True}),
}


def tiny(name: str, **changes: Any) -> PreTrainedModel:
    """A model by its name in `MODELS`, always with the same weights, in evaluation mode."""
    config, model_class, options = MODELS[name]
    torch.manual_seed(0)
    model = model_class(config(**{**options, **changes})).eval()
    for parameter_name, parameter in model.named_parameters():
        if parameter.dim() > 1 or "sinks" in parameter_name:
            parameter.data.normal_(0, 0.1 if "embed" in parameter_name else 0.2)
    if "attn_logit_softcapping" in options:
        model.set_attn_implementation("eager")  # older releases default to SDPA, which ignores it
    return model


def prompt(
    batch: int = 2, tokens: int = 70, padding: int = 0, seed: int = 0
) -> dict[str, torch.Tensor]:
    """Tokens `[B, T]` and their mask; the first row begins with padding."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, VOCABULARY, (batch, tokens), generator=generator)
    mask = torch.ones_like(ids)
    ids[0, :padding], mask[0, :padding] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}
