"""decode_attention alone: one query token over packed pages and the exact window of 128 tokens.

`python bench/bench_attention.py [--out FILE] [--impls triton,compile,eager] [--plot FILE.png]`,
on a GPU. Pages hold random codes and scales; every row has the same length. "ms" is the median of
`triton.testing.do_bench` (cold L2), "graph ms" that of CUDA-graph replays. The ratios are to the
fastest fp16 attention of PyTorch in the same run.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
import typer
from measure import copy_bandwidth, report
from rich.progress import track
from torch.nn.attention import SDPBackend, sdpa_kernel
from triton.testing import do_bench, do_bench_cudagraph

from kivi import KVSpec, QuantSpec
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
FORMATS = {"2 bit G=32": (2, 32), "2 bit G=128": (2, 128), "4 bit G=32": (4, 32)}
CONTEXTS = [2**i for i in range(10, 18)]
CURVE = "context, GQA 32/8 B=8"
SDPA = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION)


def random_pages(spec: QuantSpec, count: int, heads: int, d: int, dtype: torch.dtype) -> Pages:
    """Pages of random codes with scales and zeros of a plausible size."""
    pages = empty_pages(spec, count, heads, d, dtype, "cuda")
    words = torch.randint(-(2**15), 2**15, pages.words.shape, dtype=torch.int16, device="cuda")
    assert pages.scale is not None and pages.zero is not None
    pages.words.copy_(words)
    pages.scale.uniform_(0.1, 0.6)
    pages.zero.normal_()
    return pages


def random_view(
    spec: KVSpec, batch: int, heads: int, tokens: int, d: int, dtype: torch.dtype
) -> CacheView:
    """A layer that holds `tokens` tokens in each row, its pages in random order."""
    assert spec.key is not None and spec.value is not None
    columns = tokens // 512
    count = batch * columns + 1
    ring = spec.residual_length + spec.unit + 32
    exact = [torch.randn(batch, heads, ring + 1, d, device="cuda").to(dtype) for _ in "kv"]
    packed = max(0, tokens - spec.residual_length) // spec.unit * spec.unit
    table = torch.randperm(count - 1, device="cuda").view(batch, columns) + 1
    return CacheView(
        random_pages(spec.key, count, heads, d, dtype),
        random_pages(spec.value, count, heads, d, dtype),
        table,
        torch.full((batch,), packed, device="cuda"),
        exact[0],
        exact[1],
        torch.full((batch,), tokens, device="cuda"),
    )


def fp16(
    batch: int, heads: int, ratio: int, tokens: int, d: int, dtype: torch.dtype
) -> list[float]:
    """Milliseconds of the fastest SDPA backend, by do_bench and by graph replay."""
    q = torch.randn(batch, heads * ratio, 1, d, device="cuda").to(dtype)
    k, v = (torch.randn(batch, heads, tokens, d, device="cuda").to(dtype) for _ in "kv")

    def run() -> object:
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=ratio > 1)

    best = []
    for backend in SDPA:
        with sdpa_kernel(backend):
            best.append([f(run, return_mode="median") for f in (do_bench, do_bench_cudagraph)])
    return [min(times) for times in zip(*best, strict=True)]


def measure(
    impl: str, spec: KVSpec, case: tuple[int, int, int, int], d: int, dtype: torch.dtype
) -> tuple[list[float], float]:
    """Milliseconds (do_bench, graph; the latter NaN where it cannot be captured), bytes read."""
    batch, heads, ratio, tokens = case
    view = random_view(spec, batch, heads, tokens, d, dtype)
    q = torch.randn(batch, heads * ratio, 1, d, device="cuda").to(dtype)
    position = (view.length - 1)[:, None].contiguous()
    op = get_ops(impl, spec, (d, d), dtype, q.device).decode_attention

    def run() -> object:
        return op(q, view, spec, position, d**-0.5)

    run()
    graph = do_bench_cudagraph(run, return_mode="median") if impl == "triton" else float("nan")
    packed = sum(pages.nbytes for pages in view[:2]) * int(view.packed[0]) / tokens
    window = 4 * batch * heads * d * (tokens - int(view.packed[0]))
    return [do_bench(run, return_mode="median"), graph], packed + window


def rows_of(
    cases: dict[str, tuple[int, int, int, int]], impls: list[str], d: int, dtype: torch.dtype
) -> list[dict[str, object]]:
    """A row for each case, format and implementation."""
    copy, rows = copy_bandwidth(), []
    for name, case in track(cases.items(), description="cases"):
        base = fp16(*case, d, dtype)
        for format_name, (bits, group) in FORMATS.items():
            spec = KVSpec(
                QuantSpec(bits, "channel", group), QuantSpec(bits, "token", min(group, d))
            )
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
) -> None:
    """Measure every case; with --plot also draw speed-up against context length."""
    kind = getattr(torch, dtype)
    rows: list[dict[str, object]] = rows_of(CASES, impls.split(","), head_dim, kind)
    if plot is not None:
        cases = {f"{CURVE} {n // 1024}K": (8, 8, 4, n) for n in CONTEXTS}
        curve = rows_of(cases, ["triton"], head_dim, kind)
        draw(plot, curve, head_dim)
        rows += curve
    report(f"decode_attention, head dim {head_dim}, {dtype}", rows, out)


if __name__ == "__main__":
    typer.run(main)
