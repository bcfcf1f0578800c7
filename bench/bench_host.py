"""Host time of eager steps: Python and the driver's launches, the GPU never waited for.

Short contexts, so that the GPU is done before the host is: `python bench/bench_host.py [--out
FILE]`. "us" is the host's time for a call (operators), or for a layer of a step (models). An
operator's "cold us" is what `triton.testing.do_bench` says; "hidden us" is the same with the GPU
kept busy before, so long that the host is done when it begins: what is left is the GPU's.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
import typer
from measure import DEVICE, report
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from kivi import KVQuantizer, KVSpec, QuantSpec
from kivi.attention import get_ops
from kivi.cache import LayerCache
from kivi.hf import KVCache

DTYPE = torch.bfloat16
SPECS = {
    "kivi": KVSpec(QuantSpec(2, "channel", 32), QuantSpec(2, "token", 32)),
    "kivi, G=128": KVSpec(QuantSpec(2, "channel", 128), QuantSpec(2, "token", 128)),
    "plumb": KVQuantizer.get("plumb").spec(),
}


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


def cold_us(run: Callable[[], object], rounds: int = 100) -> tuple[float, float]:
    """Microseconds on the GPU with a cold cache: by do_bench, and with the host out of the way."""
    if DEVICE != "cuda":
        return float("nan"), float("nan")
    from triton.runtime import driver
    from triton.testing import do_bench

    flush, times = driver.active.get_empty_cache_for_benchmark(), []
    for _ in range(rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in "se")
        torch.cuda._sleep(2_000_000)  # about a millisecond
        flush.zero_()
        start.record()
        run()
        end.record()
        wait()
        times.append(start.elapsed_time(end) * 1e3)
    return do_bench(run, return_mode="median") * 1e3, statistics.median(times)


@torch.no_grad()
def operators(batch: int, tokens: int) -> list[dict[str, object]]:
    """decode_attention and SDPA, 32 query heads on 8, head dimension 128."""
    k = torch.randn(batch, 8, tokens, 128, device=DEVICE).to(DTYPE)
    q = torch.randn(batch, 32, 1, 128, device=DEVICE).to(DTYPE)
    runs: dict[str, Callable[[], object]] = {"full precision": lambda: _sdpa(q, k)}
    for name, spec in SPECS.items():
        layer = LayerCache(spec, batch, 8, 128, dtype=DTYPE, device=DEVICE)
        layer.prefill(k, k)
        op = get_ops("auto", spec, (128, 128), DTYPE, k.device).decode_attention
        state = q, layer._view(), spec, (layer._length - 1)[:, None].contiguous(), 0.09
        runs[name] = partial(op, *state)
    rows: list[dict[str, object]] = []
    for name, run in runs.items():
        case: dict[str, object] = {"what": "operator", "batch": batch, "tokens": tokens, "by": name}
        cold, hidden = cold_us(run)
        rows.append(case | {"us": host_us(run, 200), "cold us": cold, "hidden us": hidden})
    return rows


def _sdpa(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, k, enable_gqa=True)


@torch.no_grad()
def models(batch: int, tokens: int, layers: int = 16) -> list[dict[str, object]]:
    """A layer's share of a prompt and a step of a small Llama, whose products take no time."""
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
    for by in ("full precision", "kivi", "plumb"):
        model.set_attn_implementation("sdpa")

        def make(by: str = by) -> Any:
            return DynamicCache(config=config) if by == "full precision" else KVCache(model, by)

        cache = make()
        model(ids, past_key_values=cache, logits_to_keep=1)

        def step(cache: object = cache) -> None:
            model(ids[:, :1], past_key_values=cache)

        case: dict[str, object] = {"batch": batch, "tokens": tokens, "by": by}
        prompts = []
        for _ in range(9):
            fresh = make()
            wait()
            start = time.perf_counter()
            model(ids, past_key_values=fresh, logits_to_keep=1)
            prompts.append((time.perf_counter() - start) / layers * 1e6)
        us = {"step": host_us(step, calls=32) / layers, "prompt": statistics.median(prompts[2:])}
        nothing = {"cold us": float("nan"), "hidden us": float("nan")}
        rows += [{"what": what} | case | {"us": x} | nothing for what, x in us.items()]
    return rows


def main(out: str | None = None) -> None:
    """Measure small cases."""
    cases = ((1, 1024), (8, 1024), (8, 4096))
    rows = [row for case in cases for row in (*operators(*case), *models(*case))]
    report("host time of eager steps", rows, out)


if __name__ == "__main__":
    typer.run(main)
