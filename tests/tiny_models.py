"""Small random models of many architectures, with opinions, and what tests do with them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import (
    Cache,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
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
    MixtralConfig,
    MixtralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from kivi import KVQuantizer
from kivi.hf import KVCache

LOSSLESS = KVQuantizer.get("full_precision", residual_length=0, sink_length=2)
TWO_BIT = KVQuantizer.get("kivi", bits=2, residual_length=16)
BOS = "<|bos|>"
NEW = 24
"""Tokens that `generate` adds."""
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
    "llama2": (LlamaConfig, LlamaForCausalLM, {**SHAPE, "num_key_value_heads": 4}),
    "llama3": (
        LlamaConfig,
        LlamaForCausalLM,
        {
            **SHAPE,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        },
    ),
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
    "mixtral": (
        MixtralConfig,
        MixtralForCausalLM,
        {**SHAPE, "num_local_experts": 2, "num_experts_per_tok": 1},
    ),
    "deepseek_v3": (  # keys of 24 channels, values of 16
        DeepseekV3Config,
        DeepseekV3ForCausalLM,
        {
            **{k: v for k, v in SHAPE.items() if k not in ("head_dim", "num_key_value_heads")},
            "num_key_value_heads": 4,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 16,
            "v_head_dim": 16,
            "first_k_dense_replace": 1,
            "moe_intermediate_size": 32,
            "n_routed_experts": 4,
            "n_group": 2,
            "topk_group": 1,
            "num_experts_per_tok": 2,
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
    model = opinionated(model_class(config(**{**options, **changes})))
    if "attn_logit_softcapping" in options:
        model.set_attn_implementation("eager")  # older releases default to SDPA, which ignores it
    return model


def opinionated(model: PreTrainedModel) -> PreTrainedModel:
    """Weights so large that a random model prefers some tokens clearly, in evaluation mode."""
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 or name.endswith(("sinks", "bias")):
            parameter.data.normal_(0, 0.1 if "embed" in name else 0.2)
    return model.eval()


def prompt(batch: int = 2, tokens: int = 70, padding: int = 0, seed: int = 0) -> dict[str, Tensor]:
    """Tokens `[B, T]` and their mask; the first row begins with padding."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, VOCABULARY, (batch, tokens), generator=generator)
    mask = torch.ones_like(ids)
    ids[0, :padding], mask[0, :padding] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each byte, so that digits are single."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {BOS: 0} | {char: i + 1 for i, char in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, pad_token=BOS)


def tiny_bytes() -> PreTrainedModel:
    """A Llama for `tiny_tokenizer`, with heads of 32."""
    return tiny("llama", vocab_size=257, head_dim=32, bos_token_id=0)


def save_tiny(folder: Path) -> Path:
    """Write model, tokenizer and a text `text.txt` of 12 000 bytes into a folder."""
    tiny_bytes().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    generator = torch.Generator().manual_seed(1)
    letters = torch.randint(97, 123, (12_000,), generator=generator).tolist()
    (folder / "text.txt").write_bytes(bytes(letters))
    return folder


@torch.no_grad()
def forward(model: PreTrainedModel, cache: Cache | None, ids: Tensor, **inputs: Any) -> Tensor:
    return model(input_ids=ids, past_key_values=cache, **inputs).logits


def generate(
    model: PreTrainedModel, cache: Cache, inputs: dict[str, Tensor], **options: Any
) -> Any:
    options = {"max_new_tokens": NEW, "do_sample": False, **options}
    return model.generate(**inputs, past_key_values=cache, **options)


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def state(cache: KVCache) -> list[Any]:
    """All that a cache holds."""
    held: list[Any] = [int(cache.get_seq_length())]
    for layer in (layer for layer in cache.packed_layers if layer.is_initialized):
        held += [layer.cache.lengths(), layer.cache.packed_lengths(), *layer.cache.dequantize()]
    return held
