"""Memory of the stand-in for Gluon: what its kernels load, store, copy, and wait for."""

import threading
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

PATIENCE = 20  # seconds until a wait counts as a deadlock
EMPTY, WRITTEN, ON_ITS_WAY = range(3)


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
    """Shared memory, and what is known of it: EMPTY, WRITTEN, or a copy is ON_ITS_WAY."""

    def __init__(self, target: Tensor, state: Tensor) -> None:
        self.target, self.state, self.dtype = target, state, target.dtype
        self.shape = target.shape

    def _part(self, function: Any) -> "Shared":
        return Shared(function(self.target), function(self.state))

    def index(self, i: Any) -> "Shared":
        return self._part(lambda x: x[int(i)])

    def slice(self, start: int, length: int, dim: int = 0) -> "Shared":
        return self._part(lambda x: x.narrow(dim, start, length))

    def permute(self, order: tuple[int, ...]) -> "Shared":
        return self._part(lambda x: x.permute(order))

    def reinterpret(self, dtype: torch.dtype, shape: list[int], _layout: object) -> "Shared":
        assert dtype == self.dtype
        return self._part(lambda x: x.view(shape))

    _reinterpret = reinterpret

    def store(self, x: Tensor) -> None:
        assert x.shape == self.target.shape and x.dtype == self.dtype
        self.target.copy_(x)
        self.state.fill_(WRITTEN)

    def load(self, _layout: object) -> Tensor:
        assert (self.state == WRITTEN).all(), "read before it was written"
        return self.target.clone()


class Copies:
    """Asynchronous copies of a program into shared memory: late, only when they are waited for."""

    def __init__(self) -> None:
        self.groups: list[list[tuple[Shared, Tensor]]] = []
        self.own: list[tuple[Shared, Tensor]] = []

    def start(self, target: Shared, source: Pointer, mask: Any = True) -> None:
        assert (target.state != ON_ITS_WAY).all()
        target.state.fill_(ON_ITS_WAY)
        self.own.append((target, load(source, mask)))

    def commit_group(self) -> None:
        self.groups.append(self.own)
        self.own = []

    def wait_group(self, pending: int) -> None:
        while len(self.groups) > pending:
            for target, x in self.groups.pop(0):
                target.store(x)


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
    inside = torch.as_tensor(mask)
    shape = torch.broadcast_shapes(at.shape, inside.shape)
    inside, at = inside.expand(shape), at.expand(shape)
    assert not ((at < 0) | (at >= len(flat)))[inside].any(), "out of bounds"
    out = torch.full(shape, other, dtype=flat.dtype)
    out[inside] = flat[at[inside]]
    return out


def store(pointer: Pointer, x: Tensor, mask: Any = True) -> None:
    at, x, inside = torch.broadcast_tensors(pointer.at, x, torch.as_tensor(mask))
    assert not (at < 0)[inside].any(), "out of bounds"
    pointer.target.view(-1)[at[inside]] = x[inside]


def memory(x: Tensor) -> Tensor:
    """What lies from a tensor's address on."""
    size = x.untyped_storage().nbytes() // x.itemsize - x.storage_offset()
    return x.as_strided((size,), (1,))


def shared(dtype: torch.dtype, shape: list[int], layout: object) -> Any:
    if layout == "barriers":
        barriers = [Barrier() for _ in range(shape[0])]
        return SimpleNamespace(index=lambda i: barriers[int(i)])
    return Shared(torch.zeros(shape, dtype=dtype), torch.full(shape, EMPTY))
