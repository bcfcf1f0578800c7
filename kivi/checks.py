"""What is asked of the tensors that users hand in: clear ValueErrors before anything changes."""

from __future__ import annotations

import torch
from torch import Tensor

from kivi.spec import KVSpec, check_choice, check_count

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def check_device(device: torch.device | str) -> torch.device:
    """The device, or a ValueError if there is no such kind."""
    try:
        return torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device={device!r} is not allowed: {error}") from None


def check_layer(
    spec: KVSpec,
    batch_size: int,
    num_kv_heads: int,
    head_dims: tuple[int, int],
    dtype: torch.dtype,
    max_length: int | None,
    sliding_window: int | None,
) -> None:
    """Raise a ValueError for what no layer's cache can be (see `kivi.cache.LayerCache`)."""
    check_count("batch_size", batch_size, 1)
    check_count("num_kv_heads", num_kv_heads, 1)
    for name, count in (("max_length", max_length), ("sliding_window", sliding_window)):
        check_count(name, 1 if count is None else count, 1)
    check_choice("dtype", dtype, DTYPES)
    spec.bits_per_element(*head_dims)  # raises where one does not fit


def _describe(x: object) -> str:
    if not isinstance(x, Tensor):
        return f"is {type(x).__name__}"
    return f"has shape {tuple(x.shape)}, dtype {x.dtype} and device {x.device}"


def check_tensor(name: str, x: Tensor, head_dim: int | None = None) -> None:
    """Raise a ValueError unless `x` is a `[B, Hkv, T, D]` float16/bfloat16/float32 tensor."""
    if not isinstance(x, Tensor) or x.dim() != 4 or 0 in (*x.shape[:2], x.shape[3]):
        raise ValueError(
            f"{name} {_describe(x)}; it must be a tensor [B, Hkv, T, D], only T may be 0"
        )
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


def _alike(k: object, v: object, key: Tensor, value: Tensor) -> bool:
    """Whether k and v are tensors that differ from a cache's keys and values in T alone."""
    if not (isinstance(k, Tensor) and isinstance(v, Tensor)) or k.dim() != 4:
        return False
    (b, heads, _, d), shape, dtype, device = key.shape, k.shape, key.dtype, key.device
    t = shape[2]
    fits = shape == (b, heads, t, d) and v.shape == (b, heads, t, value.shape[3])
    return fits and k.dtype == v.dtype == dtype and k.device == v.device == device


def check_new_tokens(
    k: Tensor,
    v: Tensor,
    valid: Tensor | None,
    like: tuple[Tensor, Tensor],
    static: bool,
    finite: bool,
) -> bool:
    """Raise a ValueError unless new keys and values fit a cache, and the call, if it is traced.

    Args:
        k: must be `[B, Hkv, T, D]`.
        v: must be `[B, Hkv, T, Dv]`.
        valid: must be `[B, T]` bool, or None.
        like: the cache's exact keys `[B, Hkv, E, D]` and values `[B, Hkv, E, Dv]`.
        static: whether the cache has a size.
        finite: whether NaN and infinities are refused (reads the device).

    Returns:
        What `tracing` says.
    """
    for name, x, own in (("k", k, like[0]), ("v", v, like[1])):
        if _alike(k, v, *like):
            break  # nothing else is asked for every token in every layer
        if not isinstance(x, Tensor) or x.dim() != 4:
            check_tensor(name, x)
        (b, heads, _, d), t = own.shape, k.shape[2]
        if x.shape == (b, heads, t, d) and x.dtype == own.dtype and x.device == own.device:
            continue
        check_tensor(name, x, d)
        raise ValueError(
            f"{name} {_describe(x)}; it must be {(b, heads, t, d)}, {own.dtype} and {own.device}"
        )
    if valid is not None:
        shape = k.shape[0], k.shape[2]
        if not _is(valid, (shape,), (torch.bool,), k.device):
            raise ValueError(
                f"valid {_describe(valid)}; it must be {shape}, torch.bool and {k.device}"
            )
    traced = tracing()
    if traced and (finite or not static):
        raise ValueError("to compile, give a max_length and leave check_finite=False")
    for name, x in (("k", k), ("v", v)) if finite else ():
        check_finite_tensor(name, x if valid is None else x.transpose(1, 2)[valid])
    return traced


def _is(
    x: object,
    shapes: tuple[tuple[int, ...], ...],
    dtypes: tuple[torch.dtype, ...],
    device: torch.device,
) -> bool:
    fits = isinstance(x, Tensor) and x.dtype in dtypes and x.device == device
    return fits and tuple(x.shape) in shapes  # type: ignore[attr-defined]


def check_query(
    q: Tensor,
    k: Tensor,
    mask: Tensor | None,
    softcap: float | None,
    s_aux: Tensor | None,
) -> None:
    """Raise a ValueError unless queries `[B, Hq, T, D]` and what goes with them fit keys."""
    if softcap is not None and not (isinstance(softcap, int | float) and softcap > 0):
        raise ValueError(f"softcap={softcap!r} is not allowed; it must be a positive number")
    b, hkv, t, d = k.shape
    heads = q.shape[1] if isinstance(q, Tensor) and q.dim() == 4 else 0
    fits = heads > 0 and heads % hkv == 0 and q.shape == (b, heads, t, d)
    if not fits or q.dtype != k.dtype or q.device != k.device:
        raise ValueError(
            f"q {_describe(q)}; "
            f"it must be [{b}, a multiple of {hkv}, {t}, {d}], {k.dtype} and {k.device}"
        )
    masks = ((1, 1, t, t), (b, 1, t, t))
    if mask is not None and not _is(mask, masks, (torch.bool,), k.device):
        raise ValueError(
            f"mask {_describe(mask)}; it must be [{b} or 1, 1, {t}, {t}], torch.bool and {k.device}"
        )
    if s_aux is not None and not _is(s_aux, ((heads,),), DTYPES, k.device):
        raise ValueError(
            f"s_aux {_describe(s_aux)}; it must be ({heads},), one of {DTYPES} and {k.device}"
        )


def check_window(sliding_window: int | None, longest: int | None) -> int | None:
    """The window of queries, by default the longest; a ValueError for one longer than that."""
    if sliding_window is None:
        return longest
    check_count("sliding_window", sliding_window, 1)
    if longest is not None and sliding_window > longest:
        raise ValueError(
            f"sliding_window={sliding_window} is not allowed; this layer keeps {longest} tokens"
        )
    return sliding_window


def check_rows(indices: Tensor | list[int], batch_size: int) -> list[int]:
    """Numbers of rows as a list; a ValueError unless all of them are rows, and there are some."""
    rows = indices.tolist() if isinstance(indices, Tensor) else list(indices)
    if not rows or any(type(r) is not int or not 0 <= r < batch_size for r in rows):
        raise ValueError(f"indices={rows} is not allowed; rows are 0 to {batch_size - 1}")
    return rows


def tracing() -> bool:
    """Whether this call becomes a graph, in which the host can neither count nor check."""
    if torch.compiler.is_compiling():
        return True
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def check_token_ids(name: str, x: Tensor) -> None:
    """Raise a ValueError unless `x` is `[B, T]` int64 and holds a token."""
    if x.dim() != 2 or 0 in x.shape or x.dtype != torch.int64:
        has = f"has shape {tuple(x.shape)} and dtype {x.dtype}"
        raise ValueError(f"{name} {has}; it must be [B, T] int64, T >= 1")


def check_at_least(name: str, value: object, least: float) -> None:
    """Raise a ValueError unless `value` is a number of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not value >= least:
        raise ValueError(f"{name}={value!r} is not allowed; it must be >= {least}")
