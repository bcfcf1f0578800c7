"""Chooses the implementation of the operators; nothing is chosen silently but under "auto"."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache
from typing import Any, Literal, NamedTuple, get_args

import torch

from kivi.kernels import reference
from kivi.kernels.sparse import decode_attention as sparse_decode
from kivi.spec import KVSpec, check_choice

Impl = Literal["auto", "eager", "compile", "triton"]


class Ops(NamedTuple):
    """The operators of one implementation, with the signatures of `kernels/reference.py`.

    `write_new` puts new tokens into exact slots, and `store_pages` does that and packs whole pages,
    where they can: see `kivi.store`.
    """

    quantize_pack: Callable[..., Any]
    decode_attention: Callable[..., Any]
    extend_attention: Callable[..., Any]
    write_new: Callable[..., bool] | None = None
    store_pages: Callable[..., bool] | None = None


_EAGER = Ops(reference.quantize_pack, reference.decode_attention, reference.extend_attention)


def _eager(spec: KVSpec) -> Ops:
    """The operators in plain torch."""
    return _EAGER if spec.sparse is None else _EAGER._replace(decode_attention=sparse_decode)


@cache
def _compiled(ops: Ops) -> Ops:
    return Ops(*(torch.compile(op) for op in ops[:3]))


@cache
def _triton() -> Any:
    """The module of the Triton operators, or why there is none."""
    try:
        return importlib.import_module("kivi.kernels.triton_ops")
    except ImportError as error:
        return f"Triton cannot be imported ({error})"


def _triton_ops(
    spec: KVSpec,
    head_dims: tuple[int, int] | None,
    dtype: torch.dtype | None,
    device: torch.device | None,
) -> Ops | str:
    """The Triton operators, plain torch for those that do not take the format, or what is wrong."""
    triton = _triton()
    if isinstance(triton, str):
        return triton
    if spec.sparse is not None:
        return "attention that leaves out bits and values has no kernel"
    if head_dims is not None and dtype is not None and device is not None:
        reason = triton.supports(spec, head_dims, dtype, device)
        if reason is not None:
            return str(reason)
        if device.type != "cuda" or torch.cuda.is_available():
            triton.prepare(spec, head_dims, device)
    fused = head_dims is None or triton.packs(spec, head_dims)
    quantize_pack = triton.quantize_pack if fused else reference.quantize_pack
    attend = triton.decode_attention, triton.extend_attention
    return Ops(quantize_pack, *attend, triton.write_new, triton.store_pages)


def why_not_fused(spec: KVSpec, head_dim: int, dtype: torch.dtype) -> str | None:
    """What keeps the kernels from attending over a cache on a GPU; None if nothing does."""
    ops = _triton_ops(spec, (head_dim, head_dim), dtype, torch.device("cuda"))
    return ops if isinstance(ops, str) else None


def get_ops(
    impl: Impl,
    spec: KVSpec,
    head_dims: tuple[int, int] | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
) -> Ops:
    """The operators of an implementation.

    Args:
        impl: "eager" (plain torch), "compile" (the same through torch.compile), "triton" (kernels),
            or "auto", which alone may choose: kernels on a GPU where they can serve, else eager.
        spec: what the operators must be able to take.
        head_dims: of keys and values; without these three, only `impl` itself is checked.
        dtype: of the cache.
        device: where it lives.

    Raises:
        ValueError: for an unknown implementation, or one that cannot take what is asked.
    """
    check_choice("impl", impl, get_args(Impl))
    if impl == "compile":
        return _compiled(_eager(spec))
    if impl == "triton" or (impl == "auto" and device is not None and device.type == "cuda"):
        ops = _triton_ops(spec, head_dims, dtype, device)
        if impl == "triton" and isinstance(ops, Ops) and ops.quantize_pack is _EAGER.quantize_pack:
            ops = "only attention has kernels for such a format, which 'auto' takes"
        if isinstance(ops, Ops):
            return ops
        if impl == "triton":
            raise ValueError(
                f"impl='triton' cannot serve this cache: {ops}; "
                "choose from 'auto', 'eager', 'compile'"
            )
    return _eager(spec)
