"""What is asked of the tensors that users hand in: clear ValueErrors before anything changes."""

from __future__ import annotations

import torch
from torch import Tensor

from kivi.spec import check_count

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def check_tensor(name: str, x: Tensor, head_dim: int | None = None) -> None:
    """Raise a ValueError unless `x` is a `[B, Hkv, T, D]` float16/bfloat16/float32 tensor."""
    if not isinstance(x, Tensor) or x.dim() != 4:
        shape = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"{name} has shape {shape}; it must be a tensor [B, Hkv, T, D]")
    if x.dtype not in DTYPES:
        raise ValueError(f"{name}.dtype={x.dtype} is not allowed; choose from {DTYPES}")
    if head_dim is not None and x.shape[3] != head_dim:
        raise ValueError(f"{name} has head dimension {x.shape[3]}; it must be {head_dim}")


def check_finite_tensor(name: str, x: Tensor) -> None:
    """Raise a ValueError if `x` has a NaN or an infinity (this reads the device)."""
    bad = int(x.numel() - x.isfinite().sum())
    if bad:
        raise ValueError(
            f"{name} has {bad} NaN or infinite elements of {x.numel()}; none is allowed"
        )


def check_new_tokens(
    k: Tensor, v: Tensor, valid: Tensor | None, like: tuple[Tensor, Tensor]
) -> None:
    """Raise a ValueError unless new keys and values fit a cache.

    Args:
        k: must be `[B, Hkv, T, D]`.
        v: must be `[B, Hkv, T, Dv]`.
        valid: must be `[B, T]` bool, or None.
        like: the cache's exact keys `[B, Hkv, E, D]` and values `[B, Hkv, E, Dv]`.
    """
    for name, x, own in (("k", k, like[0]), ("v", v, like[1])):
        check_tensor(name, x, own.shape[3])
        want = (*own.shape[:2], k.shape[2], own.shape[3])
        if x.shape != want or x.dtype != own.dtype or x.device != own.device:
            raise ValueError(
                f"{name} has shape {tuple(x.shape)}, dtype {x.dtype} and device {x.device}; "
                f"it must be {want}, {own.dtype} and {own.device}"
            )
    want_valid = (k.shape[0], k.shape[2])
    if valid is not None and (valid.shape != want_valid or valid.dtype != torch.bool):
        raise ValueError(
            f"valid has shape {tuple(valid.shape)} and dtype {valid.dtype}; "
            f"it must be {want_valid} and torch.bool"
        )


def check_query(
    q: Tensor,
    k: Tensor,
    mask: Tensor | None,
    sliding_window: int | None,
    softcap: float | None,
    s_aux: Tensor | None,
) -> None:
    """Raise a ValueError unless queries `[B, Hq, T, D]` and what goes with them fit keys."""
    if sliding_window is not None:
        check_count("sliding_window", sliding_window, 1)
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap={softcap} is not allowed; it must be positive")
    b, hkv, t, d = k.shape
    fits = q.dim() == 4 and q.shape[0] == b and q.shape[2:] == (t, d)
    if not fits or q.shape[1] == 0 or q.shape[1] % hkv or q.dtype != k.dtype:
        raise ValueError(
            f"q has shape {tuple(q.shape)} and dtype {q.dtype}; "
            f"it must be [{b}, a multiple of {hkv}, {t}, {d}] and {k.dtype}"
        )
    if mask is not None and (
        mask.dim() != 4
        or mask.shape[0] not in (1, b)
        or mask.shape[1:] != (1, t, t)
        or mask.dtype != torch.bool
    ):
        raise ValueError(
            f"mask has shape {tuple(mask.shape)} and dtype {mask.dtype}; "
            f"it must be [{b} or 1, 1, {t}, {t}] and torch.bool"
        )
    if s_aux is not None and s_aux.shape != (q.shape[1],):
        raise ValueError(f"s_aux has shape {tuple(s_aux.shape)}; it must be ({q.shape[1]},)")


def tracing() -> bool:
    """Whether this call becomes a graph, in which the host can neither count nor check."""
    if torch.compiler.is_compiling():
        return True
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
