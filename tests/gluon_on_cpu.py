"""A stand-in for Gluon, just enough to run the source of the Hopper kernel on the CPU.

Tensors are torch's, layouts mean nothing, warp groups are threads and barriers are theirs; shared
memory begins as NaN. So addresses, masks, rounding to 16 bits and the order in which warp groups
wait for each other are those of the kernel; what the compiler and the hardware make of it is not.
"""

import ast
import math
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

tl = pytest.importorskip("triton.language")

import kivi.kernels  # noqa: E402
from kivi.kernels import triton_tile_dense  # noqa: E402

PATIENCE = 20  # seconds until a wait counts as a deadlock


class Constant(int):
    """`gl.constexpr` of a number."""

    @property
    def value(self) -> int:
        return int(self)


class Pointer:
    """Addresses in a tensor."""

    def __init__(self, target: Tensor, at: Any = 0) -> None:
        self.target, self.at = target, at
        self.dtype = SimpleNamespace(element_ty=target.dtype)

    def __add__(self, other: Any) -> "Pointer":
        return Pointer(self.target, self.at + other)

    def __getitem__(self, key: Any) -> "Pointer":
        return Pointer(self.target, self.at[key])


class Shared:
    """Shared memory."""

    def __init__(self, target: Tensor) -> None:
        self.target, self.dtype = target, target.dtype

    def index(self, i: Any) -> "Shared":
        return Shared(self.target[int(i)])

    def slice(self, start: int, length: int) -> "Shared":
        return Shared(self.target[start : start + length])

    def permute(self, order: tuple[int, ...]) -> "Shared":
        return Shared(self.target.permute(order))

    def store(self, x: Tensor) -> None:
        assert x.shape == self.target.shape
        self.target.copy_(x)

    def load(self, _layout: object) -> Tensor:
        return self.target.clone()


class Barrier:
    """An mbarrier."""

    def __init__(self) -> None:
        self.count = self.left = self.phase = 0
        self.changed = threading.Condition()


def init(barrier: Barrier, count: int) -> None:
    barrier.count = barrier.left = count


def wait(barrier: Barrier, parity: Any) -> None:
    with barrier.changed:
        done = barrier.changed.wait_for(lambda: barrier.phase % 2 != int(parity), PATIENCE)
    assert done, "deadlock"


def arrive(barrier: Barrier, count: int = 1) -> None:
    with barrier.changed:
        barrier.left -= count
        assert barrier.left >= 0
        if barrier.left == 0:
            barrier.left, barrier.phase = barrier.count, barrier.phase + 1
            barrier.changed.notify_all()


def load(pointer: Pointer, mask: Any = True, other: float = 0) -> Tensor:
    flat, at = pointer.target.flatten(), torch.as_tensor(pointer.at)
    inside = torch.as_tensor(mask).expand(
        torch.broadcast_shapes(at.shape, torch.as_tensor(mask).shape)
    )
    at = at.expand(inside.shape)
    assert not ((at < 0) | (at >= len(flat)))[inside].any(), "out of bounds"
    out = torch.full(inside.shape, other, dtype=flat.dtype)
    out[inside] = flat[at[inside]]
    return out


def store(pointer: Pointer, x: Tensor, mask: Tensor) -> None:
    at, x, mask = torch.broadcast_tensors(pointer.at, x, mask)
    pointer.target.view(-1)[at[mask]] = x[mask]


def bits_of(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.int16).long() & 0xFFFF


def rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The bits of float64 numbers, rounded once."""
    y = x.float()
    # To odd, where float32 is between: then the second rounding is as if there were no first.
    wrong = (y.double() != x) & y.isfinite() & (y.view(torch.int32) % 2 == 0)
    toward = torch.where(y.double() < x, torch.inf, -torch.inf).float()
    return bits_of(torch.where(wrong, torch.nextafter(y, toward), y).to(dtype))


def run_ptx(text: str, dtype: torch.dtype, **registers: Tensor) -> Tensor:
    """`$0` of instructions on pairs of 16 bits, for one half; registers hold bits."""

    def number(x: Tensor) -> Tensor:
        return x.to(torch.int16).view(dtype).double()

    for line in text.strip("{} ").split(";"):
        name, _, rest = line.strip().partition(" ")
        if name in ("", ".reg"):
            continue
        target, *sources = rest.replace(" ", "").split(",")
        x = [registers[s] if s in registers else torch.tensor(int(s, 16) % 2**16) for s in sources]
        if name == "mov.b32":
            value = x[0]
        elif name == "and.b32":
            value = x[0] & x[1]
        elif name == "lop3.b32":
            assert sources[3] == "0xEA"
            value = x[0] & x[1] | x[2]
        elif name.startswith("fma.rn."):
            a, b, c = map(number, x)
            value = rounded(a * b + c, dtype)
        else:
            a, b = map(number, x)
            limit = {"min.f16x2": torch.minimum, "max.f16x2": torch.maximum}[name]
            value = rounded(limit(a, b), dtype)
        registers[target] = value
    return number(registers["$0"])


def inline_asm(
    text: str,
    _constraints: str,
    args: list[Tensor],
    dtype: torch.dtype,
    is_pure: bool,
    pack: int,
) -> Tensor:
    assert is_pure and pack == 2 and len({x.shape for x in args}) == 1
    registers = {f"${i + 1}": bits_of(x) for i, x in enumerate(args)}
    return run_ptx(text, dtype, **registers).to(dtype)


def move_down(words: Tensor, count: Any) -> Tensor:
    return (bits_of(words) // 2 ** int(count)).to(torch.int16)


def specialize(jobs: list, warps: list[int], registers: list[int]) -> None:
    assert len(jobs) == len(warps) + 1 == len(registers) + 1
    failures: list[BaseException] = []

    def run(function: Any, arguments: tuple) -> None:
        try:
            function(*arguments)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=job) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def multiply(
    a: Any, b: Shared, acc: Tensor, use_acc: bool = True, is_async: bool = False
) -> Tensor:
    a = a.target if isinstance(a, Shared) else a
    product = (a.double() @ b.target.double()).float()
    return acc + product if use_acc else product


def tensors(function: Any) -> Any:
    return lambda *x: function(*map(torch.as_tensor, x))


def shared(dtype: torch.dtype, shape: list[int], layout: object) -> Any:
    if layout == "barriers":
        barriers = [Barrier() for _ in range(shape[0])]
        return SimpleNamespace(index=lambda i: barriers[int(i)])
    return Shared(torch.full(shape, math.nan if dtype.is_floating_point else -1, dtype=dtype))


def nothing(*_args: object, **_options: object) -> None:
    return None


def language() -> SimpleNamespace:
    gl = SimpleNamespace(
        constexpr=lambda x: Constant(x) if type(x) is int else x,
        arange=lambda a, b, layout: torch.arange(a, b),
        load=load,
        store=store,
        broadcast=torch.broadcast_tensors,
        convert_layout=lambda x, layout, assert_trivial=False: x,
        inline_asm_elementwise=inline_asm,
        allocate_shared_memory=shared,
        warp_specialize=specialize,
        thread_barrier=nothing,
        static_range=range,
        cdiv=lambda a, b: -(-a // b),
        minimum=tensors(torch.minimum),
        maximum=tensors(torch.maximum),
        where=torch.where,
        exp2=torch.exp2,
        log2=torch.log2,
        max=torch.amax,
        sum=torch.sum,
        zeros=lambda shape, dtype, layout: torch.zeros(shape, dtype=dtype),
        full=lambda shape, value, dtype, layout: torch.full(shape, value, dtype=dtype),
    )
    for name in ("float16", "float32", "int32", "int64"):
        setattr(gl, name, getattr(torch, name))
    for name in ("Slice", "Blocked", "NVMMADistributed", "DotOperand", "NVMMAShared"):
        setattr(gl, f"{name}Layout", nothing)
    return gl


def definitions(name: str, wanted: tuple[str, ...] = ()) -> list[ast.stmt]:
    """What a kernel file defines, imports left out."""
    path = Path(kivi.kernels.__file__).with_name(f"{name}.py")
    body = ast.parse(path.read_text(encoding="utf-8"), str(path)).body
    kept = [x for x in body if not isinstance(x, ast.Import | ast.ImportFrom)]
    return [x for x in kept if not wanted or getattr(x, "name", None) in wanted]


class Kernel:
    """Stands in for `triton_hopper.extend_hopper`: launched in the same way."""

    def __init__(self) -> None:
        kinds = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}

        def typed(function: Any) -> Any:
            """With torch's dtypes for Triton's."""

            def call(*arguments: Any) -> Any:
                return function.fn(
                    *(kinds[x] if isinstance(x, torch.dtype) else x for x in arguments)
                )

            return call

        self.gl = language()
        self.names = {
            "gl": self.gl,
            "gluon": SimpleNamespace(
                jit=lambda f=None, **_: f or (lambda g: g), constexpr_function=lambda f: f
            ),
            "hopper": SimpleNamespace(
                fence_async_shared=nothing,
                warpgroup_mma=multiply,
                warpgroup_mma_wait=lambda count, deps: deps[0],
            ),
            "mbarrier": SimpleNamespace(
                init=init, wait=wait, arrive=arrive, MBarrierLayout=lambda: "barriers"
            ),
            "move_down": move_down,
            "value_asm": typed(triton_tile_dense.value_asm),
            "below_mantissa": typed(triton_tile_dense.below_mantissa),
            "LOG2_E": math.log2(math.e),
            "NOTHING": -1e30,
            "FLAT": None,
        }
        for name, wanted in (
            ("triton_tile_hopper", ()),
            ("triton_hopper_steps", ()),
            ("triton_hopper", ()),
        ):
            code = compile(ast.Module(definitions(name, wanted), []), name, "exec")
            exec(code, self.names)

    def __getitem__(self, grid: tuple[int]) -> Any:
        def launch(*args: Any, num_warps: int, **options: Any) -> None:
            args = tuple(Pointer(memory(x)) if isinstance(x, Tensor) else x for x in args)
            for program in range(grid[0]):
                self.gl.program_id = lambda _, program=program: torch.tensor(program)
                self.names["extend_hopper"](*args, **options)

        return launch


def memory(x: Tensor) -> Tensor:
    """What lies from a tensor's address on."""
    size = x.untyped_storage().nbytes() // x.itemsize - x.storage_offset()
    return x.as_strided((size,), (1,))
