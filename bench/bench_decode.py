"""One decode step of one layer: the reference, eager and compiled, against PyTorch's fp16 SDPA.

`python bench/bench_decode.py [--out FILE]`. The step is `LayerCache.decode`: append, attention over
pages and window, flush. These are the numbers before any Triton kernel; they show what the kernels
must replace.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
import typer
from measure import DEVICE, copy_bandwidth, environment, median_ms, report
from torch.nn.attention import SDPBackend, sdpa_kernel

from kivi import KVQuantizer

DTYPE = torch.float16 if DEVICE == "cuda" else torch.float32
# batch, query heads, key/value heads, tokens
SHAPES = (
    {"GQA 32/8 B=1 8K": (1, 32, 8, 8192), "GQA 32/8 B=32 4K": (32, 32, 8, 4096)}
    if DEVICE == "cuda"
    else {"GQA 8/2 B=1 2K": (1, 8, 2, 2048)}
)
IMPLS = ("sdpa", "eager", "compile", *(["cuda graph"] if DEVICE == "cuda" else []))
HEAD_DIM = 128


def fastest_sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Callable[[], object]:
    """The fastest SDPA backend that takes these tensors."""
    backends = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION] if DEVICE == "cuda" else []
    runs: list[Callable[[], object]] = []
    for backend in backends or [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]:

        def run(backend: SDPBackend = backend) -> object:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)

        try:
            run()
        except RuntimeError:
            continue
        runs.append(run)
    return min(runs, key=median_ms)


def make(name: str, impl: str) -> tuple[Callable[[], object], float]:
    """A step and the bits per element that it reads."""
    b, hq, hkv, tokens = SHAPES[name]
    new = [torch.randn(b, h, 1, HEAD_DIM, dtype=DTYPE, device=DEVICE) for h in (hq, hkv, hkv)]
    k, v = (torch.randn(b, hkv, tokens, HEAD_DIM, dtype=DTYPE, device=DEVICE) for _ in "kv")
    if impl == "sdpa":
        return fastest_sdpa(new[0], k, v), torch.finfo(DTYPE).bits
    scheme = KVQuantizer.get("kivi", bits=2)
    layer = scheme.new_layer(
        batch_size=b,
        num_kv_heads=hkv,
        head_dim=HEAD_DIM,
        max_length=tokens + 2048,  # room for the steps of a measurement, no more
        dtype=DTYPE,
        device=DEVICE,
    )
    layer.prefill(k, v)
    step = layer.decode
    if impl != "eager":
        torch._dynamo.reset()
        mode = "reduce-overhead" if impl == "cuda graph" else "default"
        step = torch.compile(layer.decode, fullgraph=True, mode=mode)
    for _ in range(3):
        step(*new)
    return lambda: step(*new), scheme.bits_per_element(HEAD_DIM)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", SHAPES)
def test_decode(benchmark, name: str, impl: str) -> None:
    step, bits = make(name, impl)

    def run() -> None:
        step()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(run, rounds=20, warmup_rounds=3)
    benchmark.extra_info.update(environment(), bits_per_element=bits)


def main(out: str | None = None) -> None:
    """Measure every case."""
    copy, rows = copy_bandwidth(), []
    for name, (b, _, hkv, tokens) in SHAPES.items():
        base = None
        for impl in IMPLS:
            step, bits = make(name, impl)
            ms = median_ms(step)
            base = base or ms
            rate = 2 * b * hkv * tokens * HEAD_DIM * bits / 8 / ms * 1e3
            rows.append(
                {
                    "case": name,
                    "impl": impl,
                    "ms": ms,
                    "GB/s": rate / 1e9,
                    "share of copy": rate / copy,
                    "bits/elem": bits,
                    "speed-up over SDPA": base / ms,
                }
            )
            del step
    report(f"decode, head dim {HEAD_DIM}, copy {copy / 1e9:.0f} GB/s", rows, out)


if __name__ == "__main__":
    typer.run(main)
