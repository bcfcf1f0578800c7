"""extend_attention: new tokens over a packed past, against dense 16-bit attention in the same run.

`python bench/bench_extend.py [--variants LIST] [--cases TEXT] [--formats TEXT] [--flex] [--out F]`,
on a GPU. Pages hold random codes and scales. A variant is `auto`,
`hopper:CONSUMER/PRODUCER/STAGES` (registers, tiles) or
`portable:ROWS/PLANES/WARPS/STAGES[/REGISTERS]`, each with `@SPLITS` behind it if the number of
splits is not to be chosen. "ms" is the median of `triton.testing.do_bench`; "flash" is
SDPA's flash kernel with the same causal order, "cudnn" that of cuDNN without a mask (it has none
for queries at the end), which is a little more work; ratios above 1 are slower than these. "diff"
is the largest difference to the first variant's result, relative to its largest element.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
import typer
from bench_attention import FORMATS, random_view
from measure import report
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from triton.testing import do_bench

from kivi import KVSpec
from kivi.kernels import triton_extend_hopper, triton_extend_portable
from kivi.kernels.triton_extend import extend_attention

# batch, kv heads, query heads a kv head, new tokens, past tokens
CASES = {
    f"{kind} {new} over {past}": (1, heads, ratio, new, past)
    for kind, heads, ratio in (("GQA 32/8", 8, 4), ("MHA 32/32", 32, 1))
    for new, past in ((2048, 32768), (512, 32768), (2048, 2048), (128, 32768))
}


def median(run: Callable[[], object]) -> float:
    return float(do_bench(run, warmup=30, rep=120, return_mode="median"))


def dense(
    case: tuple[int, int, int, int, int], d: int, dtype: torch.dtype, flex: bool
) -> dict[str, float]:
    """Milliseconds of dense kernels over past and new tokens."""
    batch, heads, ratio, new, past = case
    q = torch.randn(batch, heads * ratio, new, d, device="cuda").to(dtype)
    k, v = (torch.randn(batch, heads, past + new, d, device="cuda").to(dtype) for _ in "kv")
    bias = causal_lower_right(new, past + new)
    times = {}
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        times["flash"] = median(
            lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=bias, enable_gqa=ratio > 1)
        )
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        times["cudnn"] = median(
            lambda: F.scaled_dot_product_attention(q, k, v, enable_gqa=ratio > 1)
        )
    if flex:
        mask = create_block_mask(
            lambda b, h, i, j: j <= i + past, None, None, new, past + new, device="cuda"
        )
        compiled = torch.compile(flex_attention, dynamic=False)
        times["flex"] = median(lambda: compiled(q, k, v, block_mask=mask, enable_gqa=ratio > 1))
    return times


@contextmanager
def chosen(variant: str) -> Iterator[None]:
    """The kernels as a variant says."""
    kind, _, numbers = variant.partition("@")[0].partition(":")
    values = [int(x) for x in numbers.split("/")] if numbers else []
    splits = variant.partition("@")[2]
    places = [
        (triton_extend_portable, "division"),
        (triton_extend_hopper, "serves"),
        (triton_extend_hopper, "tuning"),
        (triton_extend_portable, "tuning"),
    ]
    before = [getattr(module, name) for module, name in places]
    try:
        if splits:
            triton_extend_portable.division = lambda *_: int(splits)
        if kind == "hopper":
            triton_extend_hopper.tuning = triton_extend_hopper.Tuning(*values)
        elif kind == "portable":
            triton_extend_hopper.serves = lambda *_: False
            resident = 8 // values[2] if values else 1
            if values:
                plan = triton_extend_portable.Tuning(*values[:4], max(1, resident), *values[4:])
                triton_extend_portable.tuning = lambda *_: plan
        elif kind != "auto":
            raise typer.BadParameter(f"{variant!r} is not a variant")
        yield
    finally:
        for (module, name), value in zip(places, before, strict=True):
            setattr(module, name, value)


def rows_of(
    name: str,
    case: tuple[int, int, int, int, int],
    formats: dict[str, KVSpec],
    variants: list[str],
    d: int,
    dtype: torch.dtype,
    flex: bool,
) -> Iterator[dict[str, object]]:
    """A row for each format and variant."""
    batch, heads, ratio, new, past = case
    base = dense(case, d, dtype, flex)
    work = 4 * d * batch * heads * ratio * (new * past + new * (new + 1) // 2)
    for format_name, spec in formats.items():
        view = random_view(spec, batch, heads, past, d, dtype)
        q = torch.randn(batch, heads * ratio, new, d, device="cuda").to(dtype)
        k, v = (torch.randn(batch, heads, new, d, device="cuda").to(dtype) for _ in "kv")
        position = (view.length[:, None] + torch.arange(new, device="cuda")).contiguous()
        first = None

        def run(
            q: torch.Tensor = q,
            k: torch.Tensor = k,
            v: torch.Tensor = v,
            view: object = view,
            spec: KVSpec = spec,
            position: torch.Tensor = position,
        ) -> torch.Tensor:
            return extend_attention(q, k, v, view, spec, position, d**-0.5)[0]

        for variant in variants:
            row: dict[str, object] = {"case": name, "format": format_name, "variant": variant}
            with chosen(variant):
                try:
                    out = run().float()
                    ms = median(run)
                except Exception as error:  # a variant that does not fit is a result
                    print(name, format_name, variant, str(error)[:200])
                    continue
            first = out if first is None else first
            row |= {"ms": ms, "TFLOP/s": work / ms / 1e9}
            row |= {f"/ {other}": ms / time for other, time in base.items()}
            row |= {f"{other} TFLOP/s": work / time / 1e9 for other, time in base.items()}
            row["diff"] = float((out - first).abs().max() / first.abs().max())
            yield row


def main(
    out: str | None = None,
    variants: str = "auto,portable",
    cases: str = "",
    formats: str = "",
    head_dim: int = 128,
    dtype: str = "float16",
    flex: bool = False,
) -> None:
    """Measure the cases and formats whose names contain the given texts."""
    kinds = {name: spec for name, spec in FORMATS.items() if formats in name}
    rows = [
        row
        for name, case in CASES.items()
        if cases in name
        for row in rows_of(
            name, case, kinds, variants.split(","), head_dim, getattr(torch, dtype), flex
        )
    ]
    report(f"extend_attention, head dim {head_dim}, {dtype}", rows, out)


if __name__ == "__main__":
    typer.run(main)
