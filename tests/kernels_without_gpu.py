"""The operators' host code where there is no GPU: what it would launch is compiled, or counted.

`python tests/kernels_without_gpu.py compile TARGET [KERNEL ...]` compiles for "sm_80", "sm_90" or
"gfx942" what a few calls launch, and prints of each kernel the shared memory, how many loads and
stores the compiler sees, and how rows and columns lie in the threads of a warp where its assembly
passes elements among them, as JSON; `variants` makes many calls, compiles nothing, and prints how
many times it would have, and for how many different constants. Must run in a process of its own,
without TRITON_INTERPRET.
"""

import json
import re
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from kivi import KVSpec, LayerCache, QuantSpec
from kivi.kernels import (
    triton_decode,
    triton_extend,
    triton_extend_mapped,
    triton_extend_portable,
    triton_fast,
    triton_mapped,
    triton_portable,
    triton_prompt,
    triton_quantize,
    triton_quantize_mapped,
    triton_write,
)
from kivi.quantize import empty_pages

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
ACCESS = re.compile(r"tt\.(?:load|store)\b")
LAYOUT = re.compile(r"^(#\w+) = #ttg\.blocked<.*threadsPerWarp = \[(.*?)\]", re.MULTILINE)
AMONG = re.compile(r"elementwise_inline_asm \"[^\"]*(?:shfl\.|mma\.|bar\.warp).*(#\w+)>")
Q = QuantSpec
KIVI = KVSpec(Q(2, "channel", 32), Q(2, "token", 32), 32, 4)
PLUMB = Q(2, "token", None, "unbiased", transform="hadamard", center=128, smooth="outliers")


class Driver:
    """Says what GPU there is, and is asked for nothing else."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target


def become(target: GPUTarget) -> None:
    """Let the host code take this machine for one with such a GPU of 132 multiprocessors."""
    driver.set_active(Driver(target))
    nvidia = target.backend == "cuda"
    triton_portable.DENORMAL = triton_portable.FAST = nvidia
    triton_portable._multiprocessors = lambda device: 132
    generation = target.arch // 10 if nvidia else 0
    triton_fast._gpu = lambda device: (132 * nvidia, 163 * 1024, generation)
    triton_quantize_mapped.FAST = nvidia
    triton_quantize_mapped._has_tensor_cores = lambda device: generation >= 9
    triton_quantize._has_pairs = lambda device: nvidia
    here = triton_write.direct
    triton_write.direct = triton_prompt.direct = lambda *x, cpu=False: here(*x, cpu=True)
    torch.cuda.device = lambda device: nullcontext()  # type: ignore[misc, assignment]
    triton_decode._library.impl("decode_attention", triton_decode._decode_attention, "CPU")
    triton_mapped._library.impl("mapped_attention", triton_mapped._mapped_attention, "CPU")
    triton_extend_portable.FAST = nvidia
    triton_extend_portable._multiprocessors = lambda device: 132
    triton_extend.hopper._is_hopper = lambda device: generation == 9
    triton_extend._library.impl("extend_attention", triton_extend._extend_attention, "CPU")
    triton_extend_mapped._library.impl("mapped_extend", triton_extend_mapped._extend, "CPU")


def decode(
    spec: KVSpec,
    batch: int = 2,
    ratio: int = 4,
    t: int = 1,
    d: int = 128,
    dtype: torch.dtype = torch.float16,
    max_length: int = 2000,
    **options: object,
) -> None:
    layer = LayerCache(spec, batch, 2, d, dtype=dtype, max_length=max_length, impl="eager")
    q = torch.empty(batch, 2 * ratio, t, d, dtype=dtype)
    position = torch.zeros(batch, t, dtype=torch.int64)
    triton_decode.decode_attention(q, layer._view(), spec, position, 0.1, **options)


def prompt(spec: KVSpec, batch: int = 2, t: int = 64, max_length: int = 2000) -> None:
    """Many tokens over a packed past."""
    layer = LayerCache(
        spec, batch, 2, 128, dtype=torch.float16, max_length=max_length, impl="eager"
    )
    q, k = (torch.empty(batch, heads, t, 128, dtype=torch.float16) for heads in (8, 2))
    position = torch.zeros(batch, t, dtype=torch.int64)
    triton_extend.extend_attention(q, k, k, layer._view(), spec, position, 0.1)


def pack(
    spec: QuantSpec | None,
    rows: int,
    n: int,
    unit: int,
    dtype: torch.dtype = torch.bfloat16,
    masked: bool = False,
    smooth: bool = False,
) -> None:
    """n runs of a unit in each row, as a prompt or a decode step passes them."""
    x = torch.empty(rows, 2, n * unit, 128, dtype=dtype).unflatten(2, (n, unit)).transpose(1, 2)
    page = torch.zeros(rows, 1 + n, dtype=torch.int64)[:, 1:]
    valid = torch.ones(unit, dtype=torch.bool) if masked else None
    pages = empty_pages(spec, 2, 2, 128, dtype)
    factors = torch.ones(rows, 2, 128) if smooth else None
    triton_quantize.quantize_pack(pages, spec, x, page, page, valid, factors)


def write(rows: int, t: int, dtype: torch.dtype = torch.bfloat16) -> None:
    """New tokens into exact slots, as a model lays keys and values out."""
    exact = torch.zeros(rows, 2, 193, 128, dtype=dtype)
    k = torch.zeros(rows, 2, t, 128, dtype=dtype)
    v = torch.zeros(rows, t, 2, 128, dtype=dtype).transpose(1, 2)
    last = min(t, 192)
    triton_write.write_new(exact, exact.clone(), k, v, [(t - last, 0, last)])


def whole_pages(t: int, n: int) -> None:
    """A prompt's first n pages, and what of it stays exact."""
    layer = LayerCache(KIVI, 1, 2, 128, dtype=torch.bfloat16, impl="eager")
    layer._pages.reserve([512 * n])
    k, page = torch.zeros(1, 2, t, 128, dtype=torch.bfloat16), torch.zeros(1, n, dtype=torch.int64)
    place = [(t - 192, 0, 192)]
    assert triton_prompt.store_pages(layer._view(), KIVI, k, k, 0, page, page, place)


def few_calls() -> None:
    """Every kernel, and of each branch that a spec chooses some."""
    decode(KIVI, d=64)
    decode(KIVI, 1, 1, d=64, max_length=60)
    decode(KIVI, 1, 4, 2, 32, sliding_window=40, softcap=2.0)
    other = KVSpec(Q(8, "token", 16, "symmetric"), Q(4, "channel", 64), 0)
    decode(other, d=48, dtype=torch.bfloat16, s_aux=torch.zeros(8))
    decode(KVSpec(PLUMB, PLUMB), d=128)
    decode(KVSpec(PLUMB, PLUMB), d=256)
    rotated = Q(4, "token", None, "symmetric", transform="hadamard")
    decode(KVSpec(rotated, rotated), 1, 1, 3, d=64, dtype=torch.bfloat16, softcap=2.0)
    mixed = KVSpec(Q(4, "channel", 64), Q(2, "token", 64), 0)
    decode(mixed, d=64)
    decode(KVSpec(Q(2, "channel", 128), Q(2, "token", None), 0), 40)
    decode(KVSpec(None, Q(8, "token", None)), 1, 1, max_length=60, d=32, dtype=torch.float32)
    prompt(KIVI)
    prompt(KVSpec(PLUMB, PLUMB))
    pack(Q(2, "channel", 32), 2, 2, 512)
    pack(Q(3, "token", 16, "least_squares"), 2, 1, 32, torch.float16, masked=True)
    pack(Q(8, "channel", 128, "symmetric"), 2, 1, 128, torch.float32)
    pack(None, 1, 2, 512)
    pack(PLUMB, 2, 2, 512, smooth=True)
    if triton_quantize_mapped.FAST:
        pack(replace(PLUMB, bits=3), 2, 1, 128, smooth=True)
    write(2, 1)
    write(1, 600, torch.float32)
    whole_pages(1024, 2)


def many_calls() -> None:
    """Lengths, batches and numbers of pages, 1 and multiples of 16 among them."""
    for batch in (1, 2, 3, 16, 32):
        for length in (1, 15, 16, 17, 600, 4096, 8192, 100_000):
            decode(KIVI, batch, max_length=length)
            decode(KIVI, batch, max_length=length, sliding_window=100)
        for t in (1, 2, 3):
            decode(KIVI, batch, 1, t)
            decode(KIVI, batch, 1, t, sliding_window=100)
        for t in (33, 64, 417, 2048):
            prompt(KIVI, batch, t, 20 * t)
            prompt(KVSpec(PLUMB, PLUMB), batch, t, 20 * t)
        for n in (1, 2, 3, 15, 16, 32):
            pack(Q(2, "channel", 32), batch, n, 512)
            pack(Q(2, "token", 32), batch, n, 512)
            pack(PLUMB, batch, n, 512, smooth=True)
            pack(None, batch, n, 512)
        pack(Q(2, "channel", 32), batch, 1, 32)
        pack(Q(2, "token", 32), batch, 1, 32)
        pack(PLUMB, batch, 1, 128, smooth=True)
        for t in (1, 2, 15, 16, 17, 600, 1024):
            write(batch, t)


def recorded(calls: Callable[[], None]) -> dict[str, dict[str, tuple]]:
    """By kernel and key: what would be compiled; nothing is, and nothing is launched."""
    seen: dict[str, dict[str, tuple]] = {}

    def hook(*, key, fn, compile, **_):
        seen.setdefault(fn.name, {})[str(key)] = (fn.jit_function, compile)
        return True

    triton.knobs.runtime.jit_cache_hook = hook
    calls()
    triton.knobs.runtime.jit_cache_hook = None
    return seen


def among_threads(ttgir: str) -> set[str]:
    """Threads of a warp by dimension, of tensors whose elements assembly passes among them."""
    layouts = dict(LAYOUT.findall(ttgir))
    return {layouts.get(name, name) for name in AMONG.findall(ttgir)}


def main(mode: str, target: str = "sm_90", *only: str) -> None:
    become(TARGETS[target])
    result: dict[str, object] = {}
    if mode == "compile":
        for name, kinds in recorded(few_calls).items():
            if only and name not in only:
                continue
            built = [f.preload(kind["specialization_data"]) for f, kind in kinds.values()]
            seen = [len(ACCESS.findall(kernel.asm.get("ttir", ""))) for kernel in built]
            layouts = set().union(*(among_threads(kernel.asm.get("ttgir", "")) for kernel in built))
            shared = max(kernel.metadata.shared for kernel in built)
            result[name] = (shared, max(seen), sorted(layouts))
    else:
        for name, kinds in recorded(many_calls).items():
            constants = {str((kind["constants"], kind["num_warps"])) for _, kind in kinds.values()}
            result[name] = (len(kinds), len(constants))
    print(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
