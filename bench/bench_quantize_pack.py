"""quantize_pack: eager, what torch.compile makes of it, and Triton, against a plain copy.

`python bench/bench_quantize_pack.py [--out FILE] [--match TEXT] [--impls eager,compile,triton]`
prints one table: time, time of a CUDA-graph replay, GB/s (what must be read plus what must be
written, over the time), share of this machine's copy bandwidth, how many kernels inductor
generated, which implementation is fastest in the case, and for plumb the time over KIVI's (the mean
of keys and values) at the same bits. Cases: *prefill*, whole pages of a prompt of 32K tokens in 8
rows; *flush*, one unit of each row of a batch, as a decode step packs it: every unit is due, or
none is (the others of a step go to the bin, page 0). `nox -s bench` runs the same cases under
pytest-benchmark.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import typer
from measure import DEVICE, copy_bandwidth, environment, median_ms, report
from torch import Tensor
from torch._inductor import metrics

from kivi import KVQuantizer, KVSpec, QuantSpec, store
from kivi.attention import get_ops
from kivi.quantize import Pages, empty_pages
from kivi.spec import PAGE_TOKENS
from kivi.view import CacheView

GPU = DEVICE == "cuda"
HEADS, HEAD_DIM = 8, 128
DTYPE = torch.bfloat16 if GPU else torch.float32
ROWS, TOKENS = (8, 32768) if GPU else (2, 4096)
BATCH = 32 if GPU else 4
SHAPES = ("prefill", "flush, due", "flush, not due")


def plumb(bits: int) -> QuantSpec:
    """The format of keys and of values alike."""
    spec = KVQuantizer.get("plumb", bits=bits).spec().key
    assert isinstance(spec, QuantSpec)
    return spec


SPECS = {
    "K per-channel, 2 bit": QuantSpec(2, "channel", 32),
    "V per-token, 2 bit": QuantSpec(2, "token", 32),
    "K per-channel, 2 bit, G=128": QuantSpec(2, "channel", 128),
    "V per-token, 2 bit, G=128": QuantSpec(2, "token", 128),
    "K per-channel, 2 bit, least squares": QuantSpec(2, "channel", 32, "least_squares"),
    "K per-channel, 4 bit": QuantSpec(4, "channel", 32),
    "V per-token, 4 bit": QuantSpec(4, "token", 32),
    "plumb, 2 bit": plumb(2),
    "plumb, 4 bit": plumb(4),
}
IMPLS = ("eager", "compile", "triton") if GPU else ("eager", "compile")


class Case(NamedTuple):
    """A call and the bytes that it must read and write."""

    run: Callable[[], object]
    nbytes: int
    kernels: int


def prefill(spec: QuantSpec) -> tuple[Callable[..., None], Pages, int]:
    """All pages of a prompt, as `store.store` passes them; elements."""
    n = TOKENS // PAGE_TOKENS
    x = torch.randn(ROWS, HEADS, TOKENS, HEAD_DIM, device=DEVICE).to(DTYPE)
    run = x.unflatten(2, (n, PAGE_TOKENS)).transpose(1, 2)
    page = torch.arange(ROWS * n, device=DEVICE).view(ROWS, n) + 1
    pages = empty_pages(spec, ROWS * n + 1, HEADS, HEAD_DIM, DTYPE, DEVICE)
    smooth = torch.ones(ROWS, HEADS, HEAD_DIM, device=DEVICE) if spec.smooth else None

    def call(op: Callable[..., None], *tensors: Tensor | None) -> None:
        op(Pages(*tensors), spec, run, page, page * 0, None, smooth)

    return call, pages, x.numel()


def flush(spec: QuantSpec, due: bool) -> tuple[Callable[..., None], Pages, int]:
    """One unit of each row through the predicate of a decode step; elements."""
    kv = KVSpec(spec, None)
    pages = empty_pages(spec, BATCH + 1, HEADS, HEAD_DIM, DTYPE, DEVICE)
    x = torch.randn(BATCH, HEADS, 1, kv.unit, HEAD_DIM, device=DEVICE).to(DTYPE)
    table = torch.arange(BATCH, device=DEVICE)[:, None] + 1
    first = torch.zeros(BATCH, 1, dtype=torch.int64, device=DEVICE)
    asked = torch.full((BATCH, 1), due, device=DEVICE)

    def call(op: Callable[..., None], *tensors: Tensor | None) -> None:
        exact = torch.empty(BATCH, HEADS, 1, HEAD_DIM, device=DEVICE)
        smooth = torch.ones(BATCH, HEADS, HEAD_DIM if spec.smooth else 0, device=DEVICE)
        view = CacheView(Pages(*tensors), pages, table, first, exact, exact, first, smooth)

        def key_only(written: Pages, one: QuantSpec | None, *arguments: Tensor) -> None:
            if one is not None:
                op(written, one, *arguments)

        store.pack_units(view, kv, (x, x), first, asked, key_only)

    return call, pages, x.numel() * due


def make(shape: str, spec: QuantSpec, impl: str) -> Case:
    """Set a case up; compiled ones have run once."""
    torch._dynamo.reset()
    metrics.reset()
    if shape == "prefill":
        call, pages, elements = prefill(spec)
    else:
        call, pages, elements = flush(spec, shape == "flush, due")
    kind = KVSpec(spec, None)
    sizes = ((HEAD_DIM, HEAD_DIM), DTYPE, torch.device(DEVICE))
    op = get_ops("triton" if impl == "triton" else "eager", kind, *sizes).quantize_pack

    def step(*tensors: Tensor | None) -> None:
        call(op, *tensors)

    run = torch.compile(step, fullgraph=True) if impl == "compile" else step
    run(*pages)
    written = int(elements * spec.bits_per_element(HEAD_DIM) / 8)
    nbytes = elements * DTYPE.itemsize + written
    return Case(lambda: run(*pages), nbytes, metrics.generated_kernel_count)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("shape", SHAPES)
def test_quantize_pack(benchmark, shape: str, name: str, impl: str) -> None:
    case = make(shape, SPECS[name], impl)

    def run() -> None:
        case.run()
        if GPU:
            torch.cuda.synchronize()

    benchmark(run)
    benchmark.extra_info.update(environment(), nbytes=case.nbytes, kernels=case.kernels)


def graph_ms(run: Callable[[], object]) -> float:
    """Median time of a replay; NaN without a GPU."""
    if not GPU:
        return float("nan")
    from triton.testing import do_bench_cudagraph

    return float(do_bench_cudagraph(run, return_mode="median"))


def rows_of(shape: str, name: str, impls: list[str], copy: float) -> list[dict[str, object]]:
    """A row for each implementation of a case; the fastest is named in the last column."""
    spec, rows, times = SPECS[name], [], {}
    for impl in impls:
        case = make(shape, spec, impl)
        ms, replay = median_ms(case.run), graph_ms(case.run)
        # A flush is shorter than its launches: in a decode step it is part of a graph.
        times[impl] = replay if GPU and shape != "prefill" else ms
        rate = case.nbytes / times[impl] * 1e3
        rows.append(
            {
                "case": shape,
                "what": name,
                "impl": impl,
                "ms": ms,
                "graph ms": replay,
                "GB/s": rate / 1e9,
                "share of copy": rate / copy,
                "bits/elem": spec.bits_per_element(HEAD_DIM),
                "generated kernels": case.kernels if impl == "compile" else "-",
            }
        )
    fastest = min(times, key=lambda impl: times[impl])
    return [row | {"fastest": fastest} for row in rows]


def over_kivi(row: dict[str, object], rows: list[dict[str, object]]) -> object:
    """plumb's time over the mean of KIVI's for keys and values at the same bits."""
    name, _, bits = str(row["what"]).partition(", ")
    time = "graph ms" if GPU and row["case"] != "prefill" else "ms"
    kivi = [
        float(str(other[time]))
        for other in rows
        if (other["case"], other["impl"]) == (row["case"], row["impl"])
        and other["what"] in (f"K per-channel, {bits}", f"V per-token, {bits}")
    ]
    if name != "plumb" or len(kivi) != 2:
        return "-"
    return float(str(row[time])) / statistics.mean(kivi)


def main(out: str | None = None, match: str = "", impls: str = ",".join(IMPLS)) -> None:
    """Measure every case, or those whose shape and spec contain `match`."""
    copy, rows = copy_bandwidth(), []
    for shape in SHAPES:
        for name in SPECS:
            if match in f"{shape}: {name}":
                rows += rows_of(shape, name, impls.split(","), copy)
    for row in rows:
        row["over KIVI"] = over_kivi(row, rows)
    report(f"quantize_pack, copy {copy / 1e9:.0f} GB/s", rows, out)


if __name__ == "__main__":
    typer.run(main)
