"""Models of random weights, and the caches that `bench_generate.py` compares."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from measure import DEVICE
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Cache,
    DynamicCache,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    QuantizedCache,
    StaticCache,
)

from kivi import KVQuantizer
from kivi.cli_schemes import choose_schemes
from kivi.hf import KVCache

SEVEN = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32}
LONG = 2**21  # positions: more than any case has
MODELS: dict[str, Callable[[], Any]] = {
    "llama-2-7b": lambda: LlamaConfig(
        **SEVEN, vocab_size=32000, intermediate_size=11008, max_position_embeddings=LONG
    ),
    "llama-3.1-8b": lambda: LlamaConfig(
        **SEVEN,
        vocab_size=128256,
        intermediate_size=14336,
        num_key_value_heads=8,
        max_position_embeddings=LONG,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    ),
    "mistral-7b": lambda: MistralConfig(  # v0.3: full attention
        **SEVEN,
        vocab_size=32768,
        intermediate_size=14336,
        num_key_value_heads=8,
        sliding_window=None,
        max_position_embeddings=LONG,
    ),
    "tiny": lambda: LlamaConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=LONG,
    ),
}
COMPILED = "-compiled"
CACHES = ("dynamic", "static", "quanto-2", "quanto-4", "hqq-2", "hqq-4")
"""Caches of transformers. Others are a scheme and its bits, `kivi-2`, or `kivi-2-compiled`, or one
with an option, `plumb:value_bits=1-compiled`."""
CHUNK = 2**18
"""Tokens of all rows that are filled in at a time."""


def new_model(name: str, layers: int | None) -> PreTrainedModel:
    """A model of random weights in bfloat16."""
    config = MODELS[name]()
    config.num_hidden_layers = layers or config.num_hidden_layers
    with torch.device(DEVICE):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def check_cache(name: str) -> str:
    """The name of a cache.

    Raises:
        ValueError: if there is no such cache.
    """
    label = name.removesuffix(COMPILED)
    scheme, _, bits = label.rpartition("-")
    if ":" in label:
        choose_schemes(None, [label])
    elif name not in CACHES and not (scheme in KVQuantizer.available() and bits.isdigit()):
        allowed = ", ".join((*CACHES, "kivi-2", "kivi-2" + COMPILED))
        raise ValueError(f"cache {name!r}: choose from {allowed}, or another scheme's")
    return name


def new_cache(name: str, model: PreTrainedModel, length: int, options: dict[str, Any]) -> Cache:
    """An empty cache for `length` tokens; sets the attention that goes with it.

    Args:
        name: see `check_cache`.
        model: what it is for.
        length: tokens that a static one must hold.
        options: of schemes; those that a scheme does not have are left out.
    """
    kind, _, rest = name.removesuffix(COMPILED).rpartition("-")
    model.set_attn_implementation("sdpa")
    if name == "dynamic":
        return DynamicCache(config=model.config)
    if name == "static":
        return StaticCache(config=model.config, max_cache_len=length)
    if kind in ("quanto", "hqq"):
        axes = (
            {"axis_key": 0, "axis_value": 0}
            if kind == "quanto"
            else {"axis_key": 1, "axis_value": 1}
        )
        return QuantizedCache(
            backend=kind,
            config=model.config,
            nbits=int(rest),
            residual_length=128,
            q_group_size=64,
            **axes,
        )
    static = length if name.endswith(COMPILED) else None
    if ":" in name:
        (scheme,) = choose_schemes(None, [name.removesuffix(COMPILED)]).values()
        return KVCache(model, scheme, max_length=static)
    has = KVQuantizer.options(kind)
    chosen = {key: value for key, value in options.items() if key in has and value is not None}
    return KVCache(model, kind, bits=int(rest), max_length=static, **chosen)


def compiles(name: str) -> bool:
    return name == "static" or name.endswith(COMPILED)


def fill(cache: Cache, model: PreTrainedModel, batch: int, tokens: int) -> None:
    """Random keys and values in all layers, as a prompt would leave them."""
    config, like = model.config, {"device": DEVICE, "dtype": torch.bfloat16}
    heads = config.num_key_value_heads
    d = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    k, v = (torch.randn(batch, heads, tokens, d, **like) for _ in "kv")
    layers: list[Any] = cache.layers
    for i in range(config.num_hidden_layers):
        if isinstance(cache, KVCache):  # its update would wait for attention over the tokens
            layers[i].lazy_initialization(k, v)
            for part in zip(k.split(CHUNK // batch, 2), v.split(CHUNK // batch, 2), strict=True):
                layers[i].cache.append(*part)
            layers[i].columns.advance(tokens)
        else:
            cache.update(k, v, i)


def cache_bytes(cache: Cache) -> int:
    """Bytes of all tensors that a cache holds."""
    if isinstance(cache, KVCache):
        return cache.nbytes().allocated
    found: dict[int, int] = {}

    def look(x: Any) -> None:
        if isinstance(x, Tensor) and type(x) in (Tensor, torch.nn.Parameter):
            found[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        elif isinstance(x, dict | list | tuple):
            for part in x.values() if isinstance(x, dict) else x:
                look(part)
        elif isinstance(x, Tensor):  # quanto's tensors hold others
            look([getattr(x, name) for name in ("_data", "_scale", "_shift") if hasattr(x, name)])

    look([vars(layer) for layer in cache.layers])
    return sum(found.values())
