"""generate_loop: the shortest fast decode loop over a compiled step, an example to copy from."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor

from kivi.checks import check_at_least, check_token_ids
from kivi.hf import KVCache
from kivi.spec import check_choice, check_count


def _choose(logits: Tensor, temperature: float, top_k: int | None) -> Tensor:
    """Tokens `[B, 1]` for logits `[B, V]`: the best, or samples drawn without the host."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    logits = logits.float() / temperature
    if top_k is not None:
        least = logits.topk(min(top_k, logits.shape[1])).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    p = logits.softmax(-1)
    return (p / torch.empty_like(p).exponential_(1)).argmax(-1, keepdim=True)


def _step(model: Any, kv: KVCache, said: Tensor, at: Tensor, *sampling: Any) -> None:
    """Feed token `at` of `said [B, N]` to the model and write the next one: one CUDA graph."""
    logits = model(said.index_select(1, at), past_key_values=kv).logits[:, -1]
    said.index_copy_(1, at.add_(1), _choose(logits, *sampling))


@cache
def _compiled(backend: str) -> Callable[..., None]:
    mode = "reduce-overhead" if backend == "inductor" else None
    return torch.compile(_step, backend=backend, mode=mode, fullgraph=True)


@lru_cache(maxsize=1)  # graphs know addresses: the same ones again for the next conversation
@torch.inference_mode(False)
def _buffers(shape: tuple[int, int], device: torch.device) -> tuple[Tensor, Tensor]:
    said, at = (torch.zeros(s, dtype=torch.int64, device=device) for s in (shape, (1,)))
    for tensor in (said, at):
        torch._dynamo.mark_static_address(tensor)
    return said, at


@torch.no_grad()
def generate_loop(
    model: Any,
    kv: KVCache,
    input_ids: Tensor,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    backend: str | None = "inductor",
) -> Tensor:
    """Continue `input_ids [B, T]`, rows without padding, by `[B, max_new_tokens]` tokens.

    Args: `kv` has a `max_length` and what came before; `temperature` 0 takes the best token, else
    one of the `top_k` best is drawn; `backend`: torch.compile's, or None. Raises a ValueError.
    """
    check_count("max_new_tokens", max_new_tokens, 1)
    check_count("top_k", 1 if top_k is None else top_k, 1)
    check_choice("backend", backend, (None, *torch._dynamo.list_backends(None)))
    check_token_ids("input_ids", input_ids)
    need = int(kv.get_seq_length()) + input_ids.shape[1] + max_new_tokens - 1
    if kv.max_length is None or kv.max_length < need:
        raise ValueError(f"kv.max_length={kv.max_length} is not allowed; it must be >= {need}")
    check_at_least("temperature", temperature, 0)
    logits = model(input_ids, past_key_values=kv, logits_to_keep=1).logits[:, -1]
    said, at = _buffers((len(input_ids), kv.max_length), input_ids.device)
    said[:, :1] = _choose(logits, temperature, top_k)
    at.zero_()
    step = _step if backend is None else _compiled(backend)
    for _ in range(max_new_tokens - 1):
        step(model, kv, said, at, temperature, top_k)
    return said[:, :max_new_tokens].clone()
