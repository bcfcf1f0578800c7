"""A stand-in for Gluon, just enough to run the source of its kernels on the CPU.

Tensors are torch's. Layouts mean nothing, but where inline assembly lets lanes exchange what they
hold. Warp groups are threads and barriers are theirs. Shared memory may only be read once it was
written; asynchronous copies write it when they are waited for, and from their start on it may not
be read. So addresses, masks, rounding to 16 bits, the order of bytes and rows, and who waits for
what are those of the kernel; what the compiler and the hardware make of it is not.
"""

import ast
import functools
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from gluon_memory import (
    Copies,
    Pointer,
    Shared,
    arrive,
    init,
    load,
    memory,
    shared,
    store,
    wait,
)
from ptx_on_cpu import inline_asm, number, rounded
from torch import Tensor

tl = pytest.importorskip("triton.language")

import kivi.kernels  # noqa: E402
from kivi.kernels import triton_tile_dense  # noqa: E402

FOLDER = Path(kivi.kernels.__file__).parent


class Constant(int):
    """`gl.constexpr` of a number."""

    @property
    def value(self) -> int:
        return int(self)


class Layout(SimpleNamespace):
    """Of tensors: the bases of linear ones are known."""

    reg_bases = None

    @property
    def value(self) -> "Layout":
        return self


def cast(x: Any, dtype: Any, bitcast: bool = False) -> Any:
    """The method `to`."""
    if isinstance(x, Pointer):
        return Pointer(x.target.view(dtype), x.at)
    return x.view(dtype) if bitcast else x.to(dtype)


def quotient(a: Any, b: Any) -> Any:
    """`//`: of numbers that run time knows it rounds to zero."""
    plain = not isinstance(a, Tensor) and not isinstance(b, Tensor)
    return a // b if plain else torch.div(a, b, rounding_mode="trunc")


def remainder(a: Any, b: Any) -> Any:
    plain = not isinstance(a, Tensor) and not isinstance(b, Tensor)
    return a % b if plain else torch.fmod(torch.as_tensor(a), b)


def fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    exact = a.double() * b.double() + c.double()
    if a.dtype == torch.float32:
        return exact.float()
    return number(rounded(exact, a.dtype), a.dtype).to(a.dtype)


def convert_layout(x: Tensor, layout: Any, assert_trivial: bool = False) -> Tensor:
    y = x.view(x.shape)
    if layout.reg_bases is not None:
        y.held = layout.reg_bases, layout.lane_bases, layout.shape
    return y


def mma_v2(a: Tensor, b: Tensor, acc: Tensor, input_precision: str | None = None) -> Tensor:
    if input_precision == "tf32":  # what is behind 10 bits of the mantissa is not looked at
        a, b = ((x.view(torch.int32) & -(2**13)).view(torch.float32) for x in (a, b))
    product = a.double() @ b.double()
    assert product.shape == acc.shape and a.dtype == b.dtype
    return acc + product.to(acc.dtype)


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
    a = a.load(None) if isinstance(a, Shared) else a
    product = (a.double() @ b.load(None).double()).float()
    return acc + product if use_acc else product


def tensors(function: Any) -> Any:
    return lambda *x: function(*map(torch.as_tensor, x))


def assume(condition: Any) -> None:
    assert condition


def nothing(*_args: object, **_options: object) -> None:
    return None


def linear(reg_bases: list, lane_bases: list, shape: list[int], **_: object) -> Layout:
    return Layout(reg_bases=reg_bases, lane_bases=lane_bases, shape=shape)


def language() -> SimpleNamespace:
    gl = SimpleNamespace(
        constexpr=lambda x: Constant(x) if type(x) is int else x,
        shared_memory_descriptor=Shared,
        pointer_type=lambda dtype: dtype,
        arange=lambda a, b, layout: torch.arange(a, b, dtype=torch.int32),
        load=load,
        store=store,
        broadcast=torch.broadcast_tensors,
        convert_layout=convert_layout,
        inline_asm_elementwise=inline_asm,
        allocate_shared_memory=shared,
        warp_specialize=specialize,
        thread_barrier=nothing,
        static_range=range,
        cdiv=lambda a, b: -(-a // b),
        minimum=tensors(torch.minimum),
        maximum=tensors(torch.maximum),
        where=lambda condition, x, y: torch.where(torch.as_tensor(condition), x, y),
        fma=fma,
        max=torch.amax,
        assume=assume,
        reduce=lambda x, axis, function: functools.reduce(function, x.unbind(axis)),
        sum=lambda x, axis: x.sum(axis, dtype=x.dtype),
        associative_scan=lambda x, axis, _add: x.cumsum(axis, dtype=x.dtype),
        join=lambda x, y: torch.stack([x, y], -1),
        split=lambda x: x.unbind(-1),
        zeros=lambda shape, dtype, layout: torch.zeros(shape, dtype=dtype),
        full=lambda shape, value, dtype, layout: torch.full(shape, value, dtype=dtype),
        DistributedLinearLayout=linear,
    )
    for name in ("int8", "int16", "float16", "float32", "int32", "int64"):
        setattr(gl, name, getattr(torch, name))
    for name in ("abs", "exp2", "log2", "permute", "zeros_like", "full_like"):
        setattr(gl, name, getattr(torch, name))
    for name in ("Slice", "Blocked", "NVMMADistributed", "DotOperand", "NVMMAShared"):
        setattr(gl, f"{name}Layout", lambda *_, **__: Layout())
    gl.SwizzledSharedLayout = gl.SliceLayout
    return gl


class Values(ast.NodeTransformer):
    """Gluon's operators where torch's are others: tensors never change, integers are those of C."""

    def visit_AugAssign(self, node: ast.AugAssign) -> ast.AST:
        assert isinstance(node.target, ast.Name)
        before = ast.Name(node.target.id, ast.Load())
        return self.visit(ast.Assign([node.target], ast.BinOp(before, node.op, node.value)))

    def visit_BinOp(self, node: ast.BinOp) -> ast.AST:
        self.generic_visit(node)
        name = {ast.FloorDiv: "quotient", ast.Mod: "remainder"}.get(type(node.op))
        if name is None:
            return node
        return ast.Call(ast.Name(name, ast.Load()), [node.left, node.right], [])

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        if isinstance(node.func, ast.Attribute) and node.func.attr == "to":
            return ast.Call(
                ast.Name("cast", ast.Load()), [node.func.value, *node.args], node.keywords
            )
        return node

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        self.generic_visit(node)
        if node.attr == "layout" and getattr(node.value, "attr", None) == "type":
            return ast.Constant(None)
        return node


@functools.cache
def source(name: str) -> list[ast.stmt]:
    path = FOLDER / f"{name}.py"
    return ast.parse(path.read_text(encoding="utf-8"), str(path)).body


@functools.cache
def code(name: str) -> Any:
    """What a kernel file defines, imports left out."""
    kept = [x for x in source(name) if not isinstance(x, ast.Import | ast.ImportFrom)]
    module = Values().visit(ast.Module(kept, []))
    return compile(ast.fix_missing_locations(module), str(FOLDER / f"{name}.py"), "exec")


def typed(function: Any) -> Any:
    """A constexpr function of the other kernels', with torch's dtypes for Triton's."""
    kinds = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}

    def call(*arguments: Any) -> Any:
        return function.fn(*(kinds[x] if isinstance(x, torch.dtype) else x for x in arguments))

    return call


class Kernel:
    """Stands in for a Gluon kernel of a file: launched in the same way."""

    def __init__(self, file: str, name: str) -> None:
        self.gl = language()
        self.copies = Copies()
        self.stand_ins = {
            "language": self.gl,
            "gluon": SimpleNamespace(
                jit=lambda f=None, **_: f or (lambda g: g), constexpr_function=lambda f: f
            ),
            "async_copy": SimpleNamespace(
                async_copy_global_to_shared=lambda *x, **mask: self.copies.start(*x, **mask),
                commit_group=lambda: self.copies.commit_group(),
                wait_group=lambda pending: self.copies.wait_group(pending),
            ),
            "mma_v2": mma_v2,
            "gdc_launch_dependents": nothing,
            "hopper": SimpleNamespace(
                fence_async_shared=nothing,
                warpgroup_mma=multiply,
                warpgroup_mma_wait=lambda count, deps: deps[0],
            ),
            "mbarrier": SimpleNamespace(
                init=init, wait=wait, arrive=arrive, MBarrierLayout=lambda: "barriers"
            ),
        }
        self.files: dict[str, dict[str, Any]] = {}
        self.function = self.names(file)[name]

    def names(self, file: str) -> dict[str, Any]:
        """What a file of Gluon code defines and imports."""
        if file not in self.files:
            names: dict[str, Any] = {"cast": cast, "quotient": quotient, "remainder": remainder}
            for node in source(file):
                if isinstance(node, ast.ImportFrom):
                    for x in node.names:
                        names[x.asname or x.name] = self.imported(str(node.module), x.name)
            exec(code(file), names)
            self.files[file] = names
        return self.files[file]

    def imported(self, module: str, name: str) -> Any:
        if not module.startswith("kivi."):
            return self.stand_ins[name]
        file = module.rpartition(".")[2]
        if file == "triton_tile_dense":  # plain Triton
            return typed(getattr(triton_tile_dense, name))
        return self.names(file)[name]

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*args: Any, num_warps: int, **options: Any) -> None:
            args = tuple(Pointer(memory(x)) if isinstance(x, Tensor) else x for x in args)
            self.gl.num_programs = lambda _: grid[0]
            for program in range(grid[0]):
                self.gl.program_id = lambda _, program=program: torch.tensor(program).int()
                self.copies = Copies()
                self.function(*args, **options)

        return launch
