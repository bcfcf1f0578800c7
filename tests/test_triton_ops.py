"""The Triton operators as operators: compiled for every target, compiled once, captured, guarded.

What needs no GPU runs `kernels_without_gpu.py`, because Triton here is its interpreter.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kivi import KVSpec, LayerCache, QuantSpec
from kivi.quantize import empty_pages

pytest.importorskip("triton")
KIVI = KVSpec(QuantSpec(2, "channel", 32), QuantSpec(2, "token", 32), 32, 4)
PORTABLE = {"attend", "extend", "combine", "quantize_tiles", "quantize_mapped", "copy_tokens"}
PORTABLE |= {"write_tokens"}
NVIDIA = PORTABLE | {"decode_kernel", "combine_kernel"}
HOPPER = NVIDIA - {"extend"} | {"extend_hopper"}


def without_gpu(*arguments: str, cache: Path) -> dict:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    script = Path(__file__).parent / "kernels_without_gpu.py"
    done = subprocess.run(
        [sys.executable, str(script), *arguments],
        env=environment | {"TRITON_CACHE_DIR": str(cache)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[:2000]
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    ("target", "kernels", "shared"),
    [
        ("sm_80", NVIDIA, 163),
        ("sm_90", HOPPER, 227),
        ("gfx942", PORTABLE, 64),
    ],
)
def test_kernels_compile(target: str, kernels: set[str], shared: int, tmp_path: Path) -> None:
    """All of them, and for AMD the portable ones, within the shared memory (KiB) that there is."""
    built = without_gpu("compile", target, cache=tmp_path)
    assert set(built) == kernels
    assert max(memory for memory, *_ in built.values()) <= shared * 1024
    _, accesses, layouts = built["quantize_mapped"]
    if target != "gfx942":  # each takes the compiler up to a second
        assert accesses <= 24
    assert layouts == ["8, 4"] * (target == "sm_90")


def test_no_size_compiles_a_kernel_again(tmp_path: Path) -> None:
    """Lengths, batches, pages and tokens choose among few constants; none is compiled in itself."""
    variants = without_gpu("variants", cache=tmp_path)
    assert set(variants) == HOPPER
    for name, (keys, constants) in variants.items():
        assert keys == constants <= 5, name


# ---------------------------------------------------------------- where there is a GPU


def filled(device: str, spec: KVSpec, d: int, dtype: torch.dtype, rows: int = 2) -> LayerCache:
    layer = LayerCache(spec, rows, 2, d, dtype=dtype, device=device, impl="triton", max_length=2000)
    k, v = tokens(rows, 2, 700, d, device, dtype), tokens(rows, 2, 700, d, device, dtype)
    layer.prefill(k, v)
    return layer


def tokens(b: int, h: int, t: int, d: int, device: str, dtype: torch.dtype) -> Tensor:
    """The same on every device."""
    generator = torch.Generator().manual_seed(b + h + t)
    return torch.randn(b, h, t, d, generator=generator).to(device, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("d", [128, 96])  # Gluon, portable
def test_second_gpu(d: int) -> None:
    """A cache on cuda:1 while cuda:0 is current: prefill, flushes, decoding, a second turn."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    results = []
    for device in ("cuda:0", "cuda:1"):
        layer = filled(device, KIVI, d, torch.float16)
        for t in (1, 40, 1, 3, 1):
            q, k, v = (tokens(2, h, t, d, device, torch.float16) for h in (8, 2, 2))
            out = layer.decode(q, k, v)
            assert out.device == torch.device(device)
        results.append([out, *(x for x in (*layer._view().key, *layer._view().value))])
        assert torch.cuda.current_device() == 0
    for a, b in zip(*results, strict=True):
        assert torch.equal(a[1:].cpu(), b[1:].cpu())


@pytest.mark.gpu
@pytest.mark.parametrize("d", [128, 96])
@pytest.mark.parametrize("options", [{}, {"sliding_window": 100, "softcap": 20.0}], ids=str)
def test_captured_steps(d: int, options: dict) -> None:
    """One graph of a whole decode step, flush included, replayed over several flushes."""
    layer, other = (filled("cuda", KIVI, d, torch.bfloat16) for _ in range(2))
    q, k, v = (torch.zeros(2, h, 1, d, device="cuda", dtype=torch.bfloat16) for h in (8, 2, 2))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        layer.fork().decode(q, k, v, **options)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = layer.decode(q, k, v, **options)
    for step in range(70):
        for x in (q, k, v):
            x.copy_(tokens(2, x.shape[1], 1 + step, d, "cuda", torch.bfloat16)[:, :, -1:])
        graph.replay()
        assert torch.equal(out, other.decode(q, k, v, **options))
    assert layer.packed_lengths() == other.packed_lengths()
    for a, b in zip(layer._view()[:2], other._view()[:2], strict=True):
        for x, y in zip(a, b, strict=True):
            assert torch.equal(x[1:].view(torch.uint8), y[1:].view(torch.uint8))


@pytest.mark.gpu
@pytest.mark.parametrize("d", [128, 96])
def test_operators_on_a_gpu_are_registered_soundly(d: int) -> None:
    from kivi.kernels import triton_formats

    layer, q = filled("cuda", KIVI, d, torch.float16), tokens(2, 8, 1, d, "cuda", torch.float16)
    view = layer._view()
    formats = [x for s in (KIVI.key, KIVI.value) for x in triton_formats.flat(s, d)]
    position = (view.length - 1)[:, None].contiguous()
    tensors = (
        q,
        *view.key[:3],
        *view.value[:3],
        *view[2:7],
        position,
        torch.zeros(8, device="cuda"),
    )
    torch.library.opcheck(
        torch.ops.kivi.decode_attention.default,
        (*tensors, *formats, KIVI.sink_length, 0.1, None, 20.0),
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
    )


@pytest.mark.gpu
@pytest.mark.parametrize("d", [128, 96])
def test_lengths_and_batches_compile_nothing_again(d: int) -> None:
    """On the GPU what kernels_without_gpu.py counts."""
    from triton import knobs

    def steps(rows: int, length: int) -> None:
        layer = LayerCache(KIVI, rows, 2, d, dtype=torch.float16, device="cuda", impl="triton")
        k = tokens(rows, 2, length, d, "cuda", torch.float16)
        layer.prefill(k, k)
        for _ in range(33):
            q, k, v = (tokens(rows, h, 1, d, "cuda", torch.float16) for h in (8, 2, 2))
            layer.decode(q, k, v)

    compiled: dict[str, list[str]] = {}

    def hook(*, fn, compile, **_):
        compiled.setdefault(fn.name, []).append(f"{compile['constants']} {compile['num_warps']}")

    knobs.runtime.jit_cache_hook = hook
    try:
        for rows in (1, 2, 3, 16, 32):
            for length in (1, 16, 17, 512, 513, 1024, 8192):
                steps(rows, length)
    finally:
        knobs.runtime.jit_cache_hook = None
    for name, constants in compiled.items():
        assert len(constants) == len(set(constants)) <= 4, name


@pytest.mark.gpu
@pytest.mark.parametrize("d", [128, 96])  # Gluon, portable
def test_above_2_31_elements(d: int) -> None:
    """Pages at the end of a pool of more than 2^31 words give what they give in a small pool."""
    spec = KVSpec(QuantSpec(8, "channel", 32), QuantSpec(8, "token", 32), 0)
    heads, rows, columns = 8, 2, 3
    count = 2**31 // (heads * 8 * 32 * d) + 40
    if torch.cuda.mem_get_info()[0] < 3 * 2**32:
        pytest.skip("needs 12 GiB of GPU memory")
    big = empty_pages(spec.key, count, heads, d, torch.float16, "cuda")
    assert big.words.numel() > 2**31
    value = empty_pages(spec.value, count, heads, d, torch.float16, "cuda")
    small = [empty_pages(s, 8, heads, d, torch.float16, "cuda") for s in (spec.key, spec.value)]
    from kivi.kernels import triton_ops
    from kivi.view import CacheView

    far = torch.arange(count - rows * columns, count, device="cuda").flip(0).view(rows, columns)
    near = torch.arange(1, 1 + rows * columns, device="cuda").view(rows, columns)
    assert int(far.min()) * big.words[0].numel() > 2**31
    k = tokens(rows, heads, 512 * columns, d, "cuda", torch.float16)
    q = tokens(rows, heads, 1, d, "cuda", torch.float16)
    length = torch.full((rows,), 512 * columns, device="cuda")
    exact = torch.zeros(rows, heads, 65, d, dtype=torch.float16, device="cuda")
    results, written = [], []
    for table, pools in ((far, (big, value)), (near, small)):
        for pages, one, x in zip(pools, (spec.key, spec.value), (k, k + 1), strict=True):
            run = x.unflatten(2, (columns, 512)).transpose(1, 2)
            triton_ops.quantize_pack(pages, one, run, table, table * 0)
        view = CacheView(*pools, table, length, exact, exact, length)
        position = (length - 1)[:, None].contiguous()
        results.append(triton_ops.decode_attention(q, view, spec, position, d**-0.5))
        written.append([t[table] for pages in pools for t in pages if t is not None])
    for a, b in zip(*written, strict=True):
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b) and a.isfinite().all()
