"""Inline assembly in Triton's interpreter, which has none: for all elements at once."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from ptx_on_cpu import run_ptx
from torch import Tensor

interpreter = pytest.importorskip("triton.runtime.interpreter")
UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32}


class Memory:
    """That of this process."""

    def load(self, address: Tensor, size: int) -> Tensor:
        at = address.numpy().astype(np.uint64)
        every, nothing = np.ones(at.shape, bool), np.zeros(at.shape, UNSIGNED[size])
        return torch.from_numpy(
            interpreter._interpreter.load(at, every, nothing, nothing.dtype).astype(int)
        )

    def store(self, address: Tensor, size: int, value: Tensor) -> None:
        address, value = torch.broadcast_tensors(address, value)
        at = address.numpy().astype(np.uint64)
        interpreter._interpreter.store(
            at, value.numpy().astype(UNSIGNED[size]), np.ones(at.shape, bool)
        )


def _register(x: np.ndarray) -> Tensor:
    """Addresses as they are, else 32 bits."""
    if x.dtype.itemsize == 8:
        return torch.from_numpy(x.astype(np.int64))
    assert x.dtype.itemsize == 4
    return torch.from_numpy(x.view(np.uint32).astype(np.int64))


def _create_inline_asm(
    _: Any, text: str, constraints: str, values: Any, types: Any, _is_pure: bool, pack: int
) -> Any:
    """Stands in for `InterpreterBuilder.create_inline_asm`."""
    assert pack == 1
    types = types if isinstance(types, list | tuple) else [types]
    count, shape = constraints.count("="), np.broadcast_shapes(*(x.data.shape for x in values))
    assert len(types) == count and constraints.count(",") + 1 == count + len(values)
    registers = {
        f"${count + i}": _register(np.ascontiguousarray(np.broadcast_to(x.data, shape)))
        for i, x in enumerate(values)
    }
    run_ptx(text, registers, Memory())
    out = []
    for i, kind in enumerate(types):
        bits = np.broadcast_to(registers[f"${i}"].numpy(), shape).astype(np.uint32)
        floats = kind.scalar.is_fp32()
        out.append(
            interpreter.TensorHandle(bits.view(np.float32 if floats else np.int32), kind.scalar)
        )
    return SimpleNamespace(get_result=lambda i: out[i])


def serve_assembly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let kernels with inline assembly run in the interpreter, in a test."""
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_inline_asm", _create_inline_asm)
