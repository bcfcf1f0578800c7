"""Host time of eager decoding: Python and the driver's launches, the GPU never waited for.

Short contexts, so that the GPU is done before the host is: `python bench/bench_host.py`.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import typer
from measure import DEVICE, report
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from kivi import KVSpec, QuantSpec
from kivi.attention import get_ops
from kivi.cache import LayerCache
from kivi.hf import KVCache

DTYPE = torch.bfloat16
KIVI = KVSpec(QuantSpec(2, "channel", 32), QuantSpec(2, "token", 32))


def wait() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def host_us(run: Callable[[], object], calls: int, rounds: int = 9) -> float:
    """Microseconds until a call returns: the median of rounds that begin with an idle GPU."""
    times, calls = [], calls if DEVICE == "cuda" else 2
    for _ in range(rounds):
        wait()
        start = time.perf_counter()
        for _ in range(calls):
            run()
        times.append((time.perf_counter() - start) / calls * 1e6)
    wait()
    return statistics.median(times[1:])


@torch.no_grad()
def operators(batch: int, tokens: int) -> list[dict[str, object]]:
    """decode_attention and SDPA, 32 query heads on 8, head dimension 128."""
    k = torch.randn(batch, 8, tokens, 128, device=DEVICE).to(DTYPE)
    q = torch.randn(batch, 32, 1, 128, device=DEVICE).to(DTYPE)
    layer = LayerCache(KIVI, batch, 8, 128, dtype=DTYPE, device=DEVICE)
    layer.prefill(k, k)
    view, position = layer._view(), (layer._length - 1)[:, None].contiguous()
    op = get_ops("auto", KIVI, (128, 128), DTYPE, k.device).decode_attention
    case = {"what": "operator", "batch": batch, "tokens": tokens}
    return [
        case | {"by": "kivi", "us": host_us(lambda: op(q, view, KIVI, position, 0.09), 200)},
        case | {"by": "full precision", "us": host_us(lambda: _sdpa(q, k), 200)},
    ]


def _sdpa(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, k, enable_gqa=True)


@torch.no_grad()
def models(batch: int, tokens: int, layers: int = 16) -> list[dict[str, object]]:
    """A layer's share of a decode step of a small Llama, whose products take the GPU no time."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=128,
        vocab_size=128,
    )
    model: Any = LlamaForCausalLM(config)
    model.eval().to(DEVICE, DTYPE)
    ids = torch.randint(128, (batch, tokens), device=DEVICE)
    rows: list[dict[str, object]] = []
    for by in ("full precision", "kivi"):
        model.set_attn_implementation("sdpa")
        dynamic = by == "full precision"
        cache = DynamicCache(config=config) if dynamic else KVCache(model, "kivi", bits=2)
        model(ids, past_key_values=cache, logits_to_keep=1)

        def step(cache: object = cache) -> None:
            model(ids[:, :1], past_key_values=cache)

        us = host_us(step, calls=32) / layers
        rows.append({"what": "layer", "batch": batch, "tokens": tokens, "by": by, "us": us})
    return rows


def main(out: str | None = None) -> None:
    """Measure small cases."""
    cases = ((1, 1024), (8, 1024))
    rows = [row for case in cases for row in (*operators(*case), *models(*case))]
    report("host time of eager decoding", rows, out)


if __name__ == "__main__":
    typer.run(main)
