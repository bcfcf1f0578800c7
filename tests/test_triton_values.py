"""What no interpreter runs: the PTX that makes numbers of codes, and compiling without a GPU.

The PTX is read and executed by ptx_on_cpu.py, every rounding included.
"""

import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch
from gluon_on_cpu import tl
from ptx_on_cpu import bits_of, number, rounded, run_ptx

from kivi.grids import symmetric_offset, zero_code
from kivi.kernels.triton_tile_dense import below_mantissa, value_asm

HALF, BRAIN = torch.float16, torch.bfloat16
KINDS = {HALF: tl.float16, BRAIN: tl.bfloat16}


def plain(function):
    """The Python function behind a constexpr function."""
    return getattr(function, "fn", function)


@pytest.mark.parametrize("dtype", [HALF, BRAIN])
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_codes_become_numbers_exactly(bits: int, dtype: torch.dtype) -> None:
    top = torch.finfo(dtype).max
    word = torch.arange(2**16)
    scale = (torch.rand(2**16) * 4).to(dtype)
    zero = torch.randn(2**16).to(dtype)
    scale[::5], zero[::5] = 2.0**-14, 0.0
    if dtype == HALF:
        scale[::7], zero[::7] = min(top, 2 * top / (2**bits - 1)), -top
    for plane in range(plain(below_mantissa)(bits, KINDS[dtype])):
        code = (word >> plane * bits) % 2**bits
        offsets = symmetric_offset(bits), zero_code(bits, "midpoint")
        for offset, centered in ((0.0, False), *product(offsets, (False, True))):
            text = plain(value_asm)(bits, plane * bits, KINDS[dtype], offset, centered)
            registers = {"$1": word, "$2": bits_of(scale), "$3": bits_of(zero)}
            run_ptx(text, registers)
            got = number(registers["$0"] & 0xFFFF, dtype)
            exact = (code - offset) * scale.double() + (
                zero.double() if centered or not offset else 0.0
            )
            want = number(rounded(exact, dtype), dtype)
            assert torch.equal(got, want.clamp(-top, top) if dtype == HALF else want)


COMPILE = """
import sys, torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

def build(source, kernel, target, constants, **options):
    names, types = kernel.arg_names, {}
    for n in names:
        if n in constants:
            types[n] = "constexpr"
        elif n in ("table", "packed", "length", "query_position"):
            types[n] = "*i64"
        elif n.endswith("_words"):
            types[n] = "*i16"
        elif n in ("lse", "s_aux", "smooth"):
            types[n] = "*fp32"
        elif n == "valid":
            types[n] = "*i8"
        elif n in ("q", "k", "v", "out") or n.startswith(("exact_", "key_", "value_")):
            types[n] = "*fp16"
        else:
            types[n] = "fp32" if n in ("factor", "cap") else "i32"
    static = {(names.index(n),): x for n, x in constants.items()}
    return triton.compile(source(kernel, types, static), target=target, options=options)

cuda, hip = GPUTarget("cuda", 90, 32), GPUTarget("hip", "gfx942", 64)
from kivi.kernels.triton_flash import extend
for target in (cuda, hip):
    fast = target is cuda
    built = build(ASTSource, extend, target, dict(
        mask=None, key_center=None, value_center=None, K_C=32, V_C=32, PAGES=True, OTHERS=True,
        D=64, DV=64, K_BITS=2, K_CHANNEL=True, K_G=32, K_OFFSET=2.0, V_BITS=4,
        V_CHANNEL=False, V_G=32, V_OFFSET=8.0, ROWS=64, PLANES=2, WINDOW=False, CAP=False,
        FINAL=True, FAST=fast, WIDE=False), num_warps=4)
    assert ("wgmma" in built.asm["ptx"]) if fast else ("mfma" in built.asm["amdgcn"])
from kivi.kernels.triton_hopper import extend_hopper
from kivi.kernels.triton_extend_hopper import tuning
kivi = dict(KG=32, K_CHANNEL=True, K_OFFSET=0.0, K_C=0, K_BLOCK=1, K_SMOOTH=False, VG=32,
    V_OFFSET=0.0, V_C=0, V_BLOCK=1, V_SMOOTH=False)
plumb = dict(KG=128, K_CHANNEL=False, K_OFFSET=1.5, K_C=128, K_BLOCK=128, K_SMOOTH=True, VG=128,
    V_OFFSET=1.5, V_C=128, V_BLOCK=128, V_SMOOTH=True)
for kind in kivi, plumb:
    built = build(GluonASTSource, extend_hopper, cuda, kind | dict(
        D=128, KB=2, VB=2, WINDOW=False, CAP=False, AUX=True, VALID=True, FINAL=True,
        STAGES=tuning.stages, CONSUMER_REGISTERS=tuning.consumer,
        PRODUCER_REGISTERS=tuning.producer), num_warps=4)
    assert built.metadata.shared <= 227 * 1024
    assert built.asm["ptx"].count("setmaxnreg") > 3 and "wgmma" in built.asm["ptx"]
print("compiled")
"""


def test_kernels_compile_without_a_gpu(tmp_path: Path) -> None:
    # A file, since Triton reads the sources of what it compiles; its own process, without
    # interpreter.
    environment = {n: x for n, x in os.environ.items() if n != "TRITON_INTERPRET"}
    script = tmp_path / "build.py"
    script.write_text(COMPILE)
    done = subprocess.run(
        [sys.executable, str(script)],
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.stdout.strip() == "compiled", done.stderr[-2000:]
