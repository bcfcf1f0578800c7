"""Chooses the implementation of the operators; nothing is chosen silently but under "auto"."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, Literal, NamedTuple, get_args

import torch

from kivi.kernels import reference
from kivi.spec import KVSpec, check_choice

Impl = Literal["auto", "eager", "compile", "triton"]


class Ops(NamedTuple):
    """The operators of one implementation, with the signatures of `kernels/reference.py`."""

    quantize_pack: Callable[..., Any]
    decode_attention: Callable[..., Any]
    extend_attention: Callable[..., Any]


_EAGER = Ops(reference.quantize_pack, reference.decode_attention, reference.extend_attention)


@cache
def _compiled() -> Ops:
    return Ops(*(torch.compile(op) for op in _EAGER))


def get_ops(impl: Impl, spec: KVSpec) -> Ops:
    """The operators of an implementation.

    Args:
        impl: "eager" (plain torch), "compile" (the same through torch.compile), "triton", or
            "auto", which alone may choose.
        spec: what the operators must be able to take.

    Raises:
        ValueError: for an unknown implementation, or one that cannot take `spec`.
    """
    check_choice("impl", impl, get_args(Impl))
    if impl == "triton":
        raise ValueError(
            f"impl='triton' cannot serve {spec}: this version has no Triton kernels; "
            "choose from 'auto', 'eager', 'compile'"
        )
    return _compiled() if impl == "compile" else _EAGER
