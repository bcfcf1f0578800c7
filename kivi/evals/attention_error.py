"""How far attention over a quantized cache is from exact attention, layer by layer.

Queries, keys and values come from a full-precision run, so that a layer's error is its own and
not what earlier layers passed on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from kivi.evals.feeding import Model, check_chunk


@dataclass(frozen=True, eq=False)
class AttentionInputs:
    """One layer's attention in a full-precision run.

    Args:
        q: `[B, Hq, T, D]`, after RoPE.
        k: `[B, Hkv, T, D]`, after RoPE.
        v: `[B, Hkv, T, Dv]`.
        out: `[B, Hq, T, Dv]`, exact.
        scale: factor of the scores.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    scale: float


class Layer(Protocol):
    """What is needed of a layer's cache; LayerCache has it."""

    def prefill(self, k: Tensor, v: Tensor, /) -> None:
        """Store a prompt."""

    def decode(self, q: Tensor, k: Tensor, v: Tensor, /, scale: float | None) -> Tensor:
        """Attend over what is stored and the new tokens, then store these."""


MakeLayer = Callable[[int, AttentionInputs], Layer]
"""Makes an empty cache for a layer, given its index and inputs."""


class Recorder(TorchFunctionMode):
    """Keeps the arguments and the result of every scaled_dot_product_attention."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[dict[str, Any], Tensor]] = []

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is F.scaled_dot_product_attention:
            names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
            self.calls.append(({**dict(zip(names, args, strict=False)), **(kwargs or {})}, out))
        return out


@torch.inference_mode()
def record_attention(model: Model, ids: Tensor) -> list[AttentionInputs]:
    """Every layer's attention over tokens `[B, T]`, from one exact forward.

    Raises:
        ValueError: for a model whose attention is not plain causal `scaled_dot_product_attention`.
    """
    with Recorder() as recorder:
        model(input_ids=ids.to(model.device), use_cache=False)
    heads = model.config.get_text_config().num_key_value_heads
    layers = []
    for call, out in recorder.calls:
        if call.get("attn_mask") is not None or not call.get("is_causal", False):
            raise ValueError(
                "model: attention with a mask can't be recorded, only plain causal one"
            )
        q, k, v = call["query"], call["key"], call["value"]
        repeats = k.shape[1] // heads  # some models repeat key and value heads themselves
        scale = call.get("scale")
        scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
        layers.append(AttentionInputs(q, k[:, ::repeats], v[:, ::repeats], out, scale))
    if not layers:
        raise ValueError("model: its attention does not call scaled_dot_product_attention")
    return layers


@torch.inference_mode()
def attention_errors(
    layers: Sequence[AttentionInputs], make_layer: MakeLayer, *, prefill: int, chunk: int = 32
) -> tuple[float, ...]:
    """Relative error of each layer's attention output, `|out - exact| / |exact|` (Frobenius).

    Args:
        layers: from `record_attention`.
        make_layer: makes an empty layer cache.
        prefill: tokens stored at once; their attention is exact and does not count.
        chunk: tokens fed at a time afterwards.

    Raises:
        ValueError: for a chunk below 1 or a prefill that leaves no token to compare.
    """
    check_chunk(chunk)
    return tuple(_layer_error(x, make_layer(i, x), prefill, chunk) for i, x in enumerate(layers))


def _layer_error(x: AttentionInputs, layer: Layer, prefill: int, chunk: int) -> float:
    tokens = x.q.shape[2]
    if not 1 <= prefill < tokens:
        raise ValueError(f"prefill={prefill} is not allowed; it must be 1 to {tokens - 1}")
    layer.prefill(x.k[:, :, :prefill], x.v[:, :, :prefill])
    pieces = []
    for start in range(prefill, tokens, chunk):
        part = slice(start, min(start + chunk, tokens))
        new = (x.q[:, :, part], x.k[:, :, part], x.v[:, :, part])
        pieces.append(layer.decode(*new, scale=x.scale))
    exact = x.out[:, :, prefill:].double()
    difference = torch.cat(pieces, dim=2).double() - exact
    return float(difference.norm() / exact.norm())
