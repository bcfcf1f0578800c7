"""Short ways from Python to a kernel: past the dispatcher, past Triton's binder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor, is_grad_enabled
from torch._C import (
    _get_tracing_state,
    _is_torch_function_mode_enabled,
    _len_torch_dispatch_stack,
)
from torch._C._functorch import peek_interpreter_stack
from torch.compiler import is_compiling
from triton import knobs
from triton.runtime.driver import driver

_HERE = nullcontext()


def direct(*tensors: Tensor | None, cpu: bool = False) -> bool:
    """Whether an operator's kernels may be launched without the dispatcher, as nobody looks on.

    It takes longer than a short kernel. Compilers, fake tensors, modes, transforms and gradients
    are told of the operator, which is what they know.

    Args:
        tensors: those of the operator's that a caller hands in.
        cpu: serve tensors on the CPU as well.
    """
    if (
        is_compiling()
        or _len_torch_dispatch_stack()
        or _is_torch_function_mode_enabled()
        or peek_interpreter_stack() is not None
        or _get_tracing_state() is not None
    ):
        return False
    for x in tensors:
        if x is None:
            continue
        if type(x) is not Tensor or not (x.is_cuda or (cpu and x.is_cpu)):
            return False
        if x.requires_grad and is_grad_enabled():
            return False
    return True


@cache
def _alone() -> bool:
    """Whether there is one GPU, which is always the current one then."""
    return torch.cuda.device_count() == 1


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Makes a GPU the current one; entering `torch.cuda.device` takes a while even if it is."""
    here = _alone() or driver.active.get_current_device() == device.index
    return _HERE if here else torch.cuda.device(device)


def stream(device: torch.device) -> int:
    """The current stream of a GPU, as `Launch` takes it."""
    found: int = driver.active.get_current_stream(device.index)
    return found


def _hooked() -> bool:
    """Whether a profiler wants to hear of launches. Chains of hooks are always there."""
    runtime = knobs.runtime
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


class Launch:
    """A launch that is made again: by the compiled kernel, which has been told what does not vary.

    Args:
        kernel: the jitted function.
        grid: programs.
        fixed: its last arguments.
        options: of the launch.
    """

    def __init__(
        self, kernel: Any, grid: tuple[int, int, int], fixed: tuple[Any, ...], **options: Any
    ) -> None:
        self.kernel, self.grid, self.fixed, self.options = kernel, grid, fixed, options
        self.compiled: Any = None
        self._launch: Callable[..., Any] | None = None
        self._code: tuple[Any, ...] = ()

    def first(self, *arguments: Any) -> None:
        """Launch through Triton's binder, which compiles; tensors as tensors."""
        self.compiled = self.kernel[self.grid](*arguments, *self.fixed, **self.options)
        self._launch = None

    def again(self, stream: int, arguments: Sequence[Any]) -> None:
        """Launch what `first` compiled; tensors as addresses, aligned as they were then."""
        if _hooked():
            self.compiled[self.grid](*arguments, *self.fixed, stream=stream)
            return
        if self._launch is None:
            self._launch, self._code = _launcher(self.compiled)
        self._launch(*self.grid, stream, *self._code, *arguments, *self.fixed)


def _launcher(compiled: Any) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """What launches a compiled kernel, and its arguments between the stream and the kernel's.

    As triton.JITFunction.run calls it, but for metadata and hooks, which are for who listens. In
    Triton 3.6 that calls a function in C after a look at scratch memory.
    """
    code, unheard = (compiled.function,), (compiled.packed_metadata, None, None, None)
    run = compiled.run
    sizes = [getattr(run, f"{kind}_scratch_size", None) for kind in ("global", "profile")]
    known = triton.__version__.startswith("3.6.") and type(run).__name__ == "CudaLauncher"
    if known and sizes == [0, 0]:
        how = (run.launch_cooperative_grid, run.launch_pdl, None, None)
        return run.launch, (*code, *how, *unheard)
    return run, (*code, *unheard)
