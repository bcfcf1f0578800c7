"""decode_attention alone: one query token over packed pages and the exact window of 128 tokens.

`python bench/bench_attention.py [--out FILE] [--impls triton,compile,eager] [--plot FILE.png]
[--dense cudnn,flash,flex,flashinfer]`, on a GPU. Pages hold random codes and scales; every row has
the same length. "ms" is the median of `triton.testing.do_bench` (cold L2), "graph ms" that of
CUDA-graph replays. The ratios are to the fastest 16-bit attention in the same run: PyTorch's SDPA
on cuDNN and on FlashAttention, compiled FlexAttention, and FlashInfer where it is installed. What
cannot serve a case is left out of it, and named.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
import typer
from measure import copy_bandwidth, report
from rich.progress import track
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention
from triton.testing import do_bench, do_bench_cudagraph

from kivi import KVQuantizer, KVSpec, QuantSpec
from kivi.attention import get_ops
from kivi.quantize import Pages, empty_pages
from kivi.view import CacheView

# batch, kv heads, query heads a kv head, tokens
CASES = {
    "GQA 32/8 B=32 16K": (32, 8, 4, 16384),
    "MHA 32/32 B=16 8K": (16, 32, 1, 8192),
    "GQA 32/8 B=1 128K": (1, 8, 4, 131072),
    "GQA 32/8 B=8 4K": (8, 8, 4, 4096),
    "GQA 32/8 B=1 1K": (1, 8, 4, 1024),
}
FORMATS = {
    f"{bits} bit G={group}": KVSpec(
        QuantSpec(bits, "channel", group), QuantSpec(bits, "token", group)
    )
    for bits, group in ((2, 32), (2, 128), (4, 32))
} | {"plumb, 2 bit": KVQuantizer.get("plumb").spec()}
CONTEXTS = [2**i for i in range(10, 18)]
CURVE = "context, GQA 32/8 B=8"


def random_pages(spec: QuantSpec, count: int, heads: int, d: int, dtype: torch.dtype) -> Pages:
    """Pages of random codes with scales and zeros of a plausible size."""
    pages = empty_pages(spec, count, heads, d, dtype, "cuda")
    words = torch.randint(-(2**15), 2**15, pages.words.shape, dtype=torch.int16, device="cuda")
    assert pages.scale is not None
    pages.words.copy_(words)
    pages.scale.uniform_(0.1, 0.6)
    for x in (pages.zero, pages.center):
        if x is not None:
            x.normal_()
    return pages


def random_view(
    spec: KVSpec, batch: int, heads: int, tokens: int, d: int, dtype: torch.dtype
) -> CacheView:
    """A layer that holds `tokens` tokens in each row, its pages in random order."""
    assert spec.key is not None and spec.value is not None
    columns = tokens // 512
    count = batch * columns + 1
    slots = spec.sink_length + spec.residual_length + spec.unit + 32
    exact = [torch.randn(batch, heads, slots + 1, d, device="cuda").to(dtype) for _ in "kv"]
    own = spec.sink_length + spec.residual_length
    packed = max(0, tokens - own) // spec.unit * spec.unit
    smoothed = sum(d for x in (spec.key, spec.value) if x.smooth)
    table = torch.randperm(count - 1, device="cuda").view(batch, columns) + 1
    return CacheView(
        random_pages(spec.key, count, heads, d, dtype),
        random_pages(spec.value, count, heads, d, dtype),
        table,
        torch.full((batch,), packed, device="cuda"),
        exact[0],
        exact[1],
        torch.full((batch,), tokens, device="cuda"),
        torch.ones(batch, heads, smoothed, device="cuda") if smoothed else None,
    )


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Callable[[], object]:
    """PyTorch's attention, on the backend of the context."""
    return lambda: F.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] > k.shape[1])


def flex(q: Tensor, k: Tensor, v: Tensor) -> Callable[[], object]:
    """FlexAttention, compiled for these shapes."""
    torch._dynamo.reset()  # it compiles a function for few shapes only
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda: compiled(q, k, v, enable_gqa=q.shape[1] > k.shape[1])


def flashinfer(q: Tensor, k: Tensor, v: Tensor) -> Callable[[], object]:
    """FlashInfer's paged decode, on pages of 16 tokens."""
    from flashinfer import BatchDecodeWithPagedKVCacheWrapper  # type: ignore[import-not-found]

    (b, hkv, t, d), page = k.shape, 16
    cache = [x.transpose(1, 2).reshape(b * t // page, page, hkv, d) for x in (k, v)]
    workspace = torch.empty(2**27, dtype=torch.uint8, device=q.device)
    wrapper = BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=True)
    counts = torch.arange(b + 1, dtype=torch.int32, device=q.device) * (t // page)
    indices = torch.arange(b * t // page, dtype=torch.int32, device=q.device)
    last = torch.full((b,), page, dtype=torch.int32, device=q.device)
    heads = (q.shape[1], hkv, d, page)
    wrapper.plan(counts, indices, last, *heads, q_data_type=q.dtype, kv_data_type=k.dtype)
    return lambda: wrapper.run(q[:, :, 0], tuple(cache))


DENSE = {"cudnn": sdpa, "flash": sdpa, "flex": flex, "flashinfer": flashinfer}
BACKENDS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}


def dense_ms(
    names: list[str], case: tuple[int, int, int, int], d: int, dtype: torch.dtype
) -> dict[str, list[float]]:
    """Milliseconds of each 16-bit attention that serves a case, by do_bench and by graph replay."""
    batch, heads, ratio, tokens = case
    q = torch.randn(batch, heads * ratio, 1, d, device="cuda").to(dtype)
    k, v = (torch.randn(batch, heads, tokens, d, device="cuda").to(dtype) for _ in "kv")
    want, times = sdpa(q, k, v)(), {}
    for name in names:
        try:
            with sdpa_kernel(BACKENDS.get(name, list(BACKENDS.values()))):
                run = DENSE[name](q, k, v)
                torch.testing.assert_close(run().view_as(want), want, atol=2e-3, rtol=2e-2)
                times[name] = [f(run, return_mode="median") for f in (do_bench, do_bench_cudagraph)]
        except (RuntimeError, torch._dynamo.exc.TorchDynamoException) as error:
            print(f"{name} does not serve {case}, head dim {d}: {str(error).splitlines()[0]}")
    return times


def measure(
    impl: str, spec: KVSpec, case: tuple[int, int, int, int], d: int, dtype: torch.dtype
) -> tuple[list[float], float]:
    """Milliseconds (do_bench, graph; the latter NaN where it cannot be captured), bytes read."""
    batch, heads, ratio, tokens = case
    view = random_view(spec, batch, heads, tokens, d, dtype)
    q = torch.randn(batch, heads * ratio, 1, d, device="cuda").to(dtype)
    position = (view.length - 1)[:, None].contiguous()
    kind = "auto" if impl == "triton" else impl
    op = get_ops(kind, spec, (d, d), dtype, q.device).decode_attention

    def run() -> object:
        return op(q, view, spec, position, d**-0.5)

    run()
    graph = do_bench_cudagraph(run, return_mode="median") if impl == "triton" else float("nan")
    packed = sum(pages.nbytes for pages in view[:2]) * int(view.packed[0]) / tokens
    window = 4 * batch * heads * d * (tokens - int(view.packed[0]))
    return [do_bench(run, return_mode="median"), graph], packed + window


def rows_of(
    cases: dict[str, tuple[int, int, int, int]],
    impls: list[str],
    dense: list[str],
    d: int,
    dtype: torch.dtype,
) -> list[dict[str, object]]:
    """A row for each case, format and implementation."""
    copy, rows = copy_bandwidth(), []
    for name, case in track(cases.items(), description="cases"):
        times = dense_ms(dense, case, d, dtype)
        fastest = min(times, key=lambda dense_name: times[dense_name][0])
        base = [min(pair) for pair in zip(*times.values(), strict=True)]
        for format_name, spec in FORMATS.items():
            for impl in impls:
                (ms, graph), nbytes = measure(impl, spec, case, d, dtype)
                rows.append(
                    {
                        "case": name,
                        "format": format_name,
                        "impl": impl,
                        "bits/elem": spec.bits_per_element(d),
                        "ms": ms,
                        "graph ms": graph,
                        "GB/s": nbytes / ms / 1e6,
                        "share of copy": nbytes / ms * 1e3 / copy,
                        "fp16 ms": base[0],
                        "fp16 by": fastest,
                        "ratio": base[0] / ms,
                        "graph ratio": base[1] / graph,
                    }
                )
    return rows


def draw(path: Path, rows: list[dict[str, object]], d: int) -> None:
    """Speed-up by graph replays against the context length."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    ticks = [n // 1024 for n in CONTEXTS]
    _, axes = plt.subplots(figsize=(6, 3.6))
    for name in FORMATS:
        ratios = [float(str(row["graph ratio"])) for row in rows if row["format"] == name]
        axes.plot(ticks, ratios, marker="o", label=name)
    axes.axhline(1, color="black", linewidth=0.8, linestyle="--", label="fastest fp16 attention")
    axes.set(xscale="log", xlabel="context, K tokens", ylabel="speed-up", ylim=(0, None))
    axes.set_xticks(ticks, [str(n) for n in ticks])
    axes.minorticks_off()
    axes.set_title(f"Decode attention, 32/8 heads of {d}, batch 8, H200", fontsize=10)
    axes.legend(fontsize=8)
    plt.tight_layout()
    plt.savefig(path, dpi=150)


def main(
    out: str | None = None,
    impls: str = "triton,compile,eager",
    head_dim: int = 128,
    dtype: str = "float16",
    plot: Path | None = None,
    dense: str = ",".join(DENSE),
) -> None:
    """Measure every case; with --plot also draw speed-up against context length."""
    kind, names = getattr(torch, dtype), dense.split(",")
    if importlib.util.find_spec("flashinfer") is None and "flashinfer" in names:
        names.remove("flashinfer")
        print("flashinfer is not installed")
    rows: list[dict[str, object]] = rows_of(CASES, impls.split(","), names, head_dim, kind)
    if plot is not None:
        cases = {f"{CURVE} {n // 1024}K": (8, 8, 4, n) for n in CONTEXTS}
        curve = rows_of(cases, ["triton"], names, head_dim, kind)
        draw(plot, curve, head_dim)
        rows += curve
    report(f"decode_attention, head dim {head_dim}, {dtype}", rows, out)


if __name__ == "__main__":
    typer.run(main)
