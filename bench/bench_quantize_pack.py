"""quantize_pack: what torch.compile makes of the reference, against eager and a plain copy.

`python bench/bench_quantize_pack.py [--out FILE] [--match TEXT]` prints one table: time, GB/s (what
must be read plus what must be written, over the time), share of this machine's copy bandwidth, and
how many kernels inductor generated. `nox -s bench` runs the same cases under pytest-benchmark.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import typer
from measure import DEVICE, copy_bandwidth, environment, median_ms, report
from torch import Tensor
from torch._inductor import metrics

from kivi.kernels.reference import quantize_pack
from kivi.quantize import Pages, empty_pages
from kivi.spec import PAGE_TOKENS, QuantSpec

HEADS, HEAD_DIM = 8, 128
# Prefill: whole pages of a long prompt. Flush: one group of each row of a batch.
SHAPES = {"prefill": (256 if DEVICE == "cuda" else 8, PAGE_TOKENS), "flush": (32, 32)}
SPECS = {
    "K per-channel, 2 bit": QuantSpec(2, "channel", 32),
    "V per-token, 2 bit": QuantSpec(2, "token", 32),
    "K per-channel, 2 bit, least squares": QuantSpec(2, "channel", 32, "least_squares"),
    "K per-channel, 4 bit": QuantSpec(4, "channel", 32),
}


class Case(NamedTuple):
    """A call and the bytes that it must read and write."""

    run: Callable[[], None]
    nbytes: int
    kernels: int


def make(shape: str, spec: QuantSpec, impl: str) -> Case:
    """Set a case up; compiled ones have run once."""
    n, tokens = SHAPES[shape]
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float32
    x = torch.randn(n, HEADS, tokens, HEAD_DIM, dtype=dtype, device=DEVICE)
    pages = empty_pages(spec, n, HEADS, HEAD_DIM, dtype, DEVICE)
    page = torch.arange(n, device=DEVICE)
    first = torch.zeros(n, dtype=torch.int64, device=DEVICE)

    def call(words: Tensor, scale: Tensor | None, zero: Tensor | None) -> None:
        quantize_pack(Pages(words, scale, zero), spec, x, page, first)

    torch._dynamo.reset()
    metrics.reset()
    op = torch.compile(call, fullgraph=True) if impl == "compile" else call
    op(*pages)
    written = int(x.numel() * spec.bits_per_element(HEAD_DIM) / 8)
    return Case(lambda: op(*pages), x.nbytes + written, metrics.generated_kernel_count)


@pytest.mark.parametrize("impl", ["eager", "compile"])
@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("shape", SHAPES)
def test_quantize_pack(benchmark, shape: str, name: str, impl: str) -> None:
    case = make(shape, SPECS[name], impl)

    def run() -> None:
        case.run()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark(run)
    benchmark.extra_info.update(environment(), nbytes=case.nbytes, kernels=case.kernels)


def main(out: str | None = None, match: str = "") -> None:
    """Measure every case, or those whose shape and spec contain `match`."""
    copy, rows = copy_bandwidth(), []
    for shape in SHAPES:
        for name, spec in SPECS.items():
            if match not in f"{shape}: {name}":
                continue
            for impl in ("eager", "compile"):
                case = make(shape, spec, impl)
                ms = median_ms(case.run)
                rate = case.nbytes / ms * 1e3
                rows.append(
                    {
                        "case": shape,
                        "what": name,
                        "impl": impl,
                        "ms": ms,
                        "GB/s": rate / 1e9,
                        "share of copy": rate / copy,
                        "bits/elem": spec.bits_per_element(HEAD_DIM),
                        "generated kernels": case.kernels if impl == "compile" else "-",
                    }
                )
    report(f"quantize_pack, copy {copy / 1e9:.0f} GB/s", rows, out)


if __name__ == "__main__":
    typer.run(main)
