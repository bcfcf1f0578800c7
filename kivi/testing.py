"""Properties that every scheme has, for the tests of kivi and of packages that add schemes.

    from kivi import KVQuantizer
    from kivi.testing import check_scheme

    def test_mine():
        check_scheme(KVQuantizer.get("mine", bits=4))

Nothing here knows a grid or an axis: the properties hold for every format. They need torch alone.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from kivi.cache import LayerCache
from kivi.quantize import PackedTensor
from kivi.quantizer import KVQuantizer
from kivi.spec import PAGE_TOKENS, Spec

__all__ = ["PROPERTIES", "Case", "attention", "check_scheme"]


class Case(NamedTuple):
    """The sizes that properties are checked with."""

    head_dim: int = 64
    dtype: torch.dtype = torch.float16
    device: str = "cpu"
    batch_size: int = 2
    num_kv_heads: int = 2

    def tokens(self, t: int, seed: int) -> tuple[Tensor, Tensor]:
        """Keys and values `[B, Hkv, t, D]` with channels of different size and offset."""
        generator = torch.Generator().manual_seed(seed)
        shape = (2, self.batch_size, self.num_kv_heads, t, self.head_dim)
        x = torch.randn(shape, generator=generator)
        channel = torch.arange(self.head_dim) / self.head_dim
        x = x * (1 + 2 * channel) + 3 * torch.cos(20 * channel)
        k, v = x.to(device=self.device, dtype=self.dtype).unbind(0)
        return k, v

    def layer(self, scheme: KVQuantizer, batch_size: int | None = None) -> LayerCache:
        """An empty layer of the scheme."""
        return scheme.new_layer(
            batch_size=batch_size or self.batch_size,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            dtype=self.dtype,
            device=self.device,
        )


def check_scheme(
    scheme: KVQuantizer,
    *,
    head_dim: int = 64,
    dtype: torch.dtype = torch.float16,
    device: str = "cpu",
) -> None:
    """Check everything that kivi promises of any scheme.

    Args:
        scheme: what to check; a spec whose groups fit `head_dim`.
        head_dim: D of the keys and values that it is checked with.
        dtype: of these keys and values.
        device: where to check.

    Raises:
        AssertionError: if a property does not hold; the message names it and says what was found.
    """
    for check in PROPERTIES:
        check(scheme, Case(head_dim, dtype, device))


def _require(condition: bool, scheme: KVQuantizer, message: str) -> None:
    if not condition:
        raise AssertionError(f"{scheme}: {message}")


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool(torch.equal(a, b))


def attention(q: Tensor, k: Tensor, v: Tensor, past: int, scale: float) -> Tensor:
    """Causal attention in float64; query j sees the first `past + j + 1` keys.

    Args:
        q: `[B, Hq, T, D]`.
        k: `[B, Hkv, past + T, D]`.
        v: `[B, Hkv, past + T, Dv]`.
        past: keys that every query sees.
        scale: factor of the scores.

    Returns:
        `[B, Hq, T, Dv]` float64.
    """
    k, v = (x.double().repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = q.double() @ k.transpose(-1, -2) * scale
    later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(past + 1)
    return scores.masked_fill(later, -math.inf).softmax(-1) @ v


def is_a_declaration(scheme: KVQuantizer, case: Case) -> None:
    """A frozen dataclass that compares, hashes, prints and is found by its name and options."""
    _require(dataclasses.is_dataclass(scheme), scheme, "a scheme is a dataclass")
    names = KVQuantizer.options(scheme.name)
    options = {name: getattr(scheme, name) for name in names}
    again = KVQuantizer.get(scheme.name, **options)
    _require(type(again) is type(scheme), scheme, f"get({scheme.name!r}) is another class")
    _require(again == scheme and hash(again) == hash(scheme), scheme, "equal options, other scheme")
    _require(copy.deepcopy(scheme) == scheme, scheme, "a copy differs")
    for name, value in options.items():
        _require(f"{name}={value!r}" in repr(scheme), scheme, f"repr lacks {name}")
        try:
            setattr(scheme, name, value)
        except dataclasses.FrozenInstanceError:
            continue
        _require(False, scheme, f"{name} can be changed: use @dataclass(frozen=True)")
    _require(scheme.spec() == scheme.spec(), scheme, "spec() differs from call to call")


def bytes_are_told_truthfully(scheme: KVQuantizer, case: Case) -> None:
    """`bits_per_element` is what whole pages take, metadata counted."""
    k, v = case.tokens(2 * PAGE_TOKENS, 1)
    packed = scheme.quantize_key(k), scheme.quantize_value(v)
    # What is not quantized counts as 16 bit in any dtype.
    wide = [max(1, case.dtype.itemsize / 2) if p.spec is None else 1 for p in packed]
    bits = sum(8 * p.nbytes / w for p, w in zip(packed, wide, strict=True)) / (2 * k.numel())
    said = scheme.bits_per_element(case.head_dim)
    _require(math.isclose(bits, said), scheme, f"says {said} bits per element, stores {bits}")


def round_trip_is_close(scheme: KVQuantizer, case: Case) -> None:
    """The mean error is under a step of a grid over everything; shape and dtype come back."""
    for x, quantize, spec in _both(scheme, case.tokens(300, 2)):
        back = scheme.dequantize(quantize(x))
        _require(back.dtype == x.dtype and back.shape == x.shape, scheme, "dtype or shape changed")
        error = (back.double() - x.double()).square().mean().sqrt()
        steps = math.inf if spec is None else 2**spec.bits - 1
        step = (x.double().max() - x.double().min()) / steps + 1e-2 * (spec is not None)
        _require(bool(error <= step), scheme, f"mean error {error:.3g}, step {step:.3g}")


def requantizing_is_stable(scheme: KVQuantizer, case: Case) -> None:
    """Quantizing what was dequantized adds less error than the first time."""
    for x, quantize, spec in _both(scheme, case.tokens(300, 3)):
        if spec is not None and not spec.stable:
            continue
        once = scheme.dequantize(quantize(x))
        twice = scheme.dequantize(quantize(once))
        first = (once.double() - x.double()).norm()
        second = (twice.double() - once.double()).norm()
        _require(bool(second <= 0.75 * first), scheme, f"error {first:.3g}, then {second:.3g} more")


def rows_heads_and_units_are_independent(scheme: KVQuantizer, case: Case) -> None:
    """A row, a head or a unit of tokens is quantized as if it were alone; NaN stays there."""
    unit = scheme.spec().unit
    for x, quantize, _ in _both(scheme, case.tokens(unit + 70, 4)):
        back = scheme.dequantize(quantize(x))
        for name, part in (("row", x[1:]), ("unit", x[:, :, :unit])):
            alone = scheme.dequantize(quantize(part))
            whole = back[1:] if name == "row" else back[:, :, :unit]
            _require(_equal(alone, whole), scheme, f"a {name} alone is quantized differently")
        for value in (math.nan, math.inf, 1e4):
            bad = x.clone()
            bad[1, 1, unit + 3, 5] = value
            new = scheme.dequantize(quantize(bad))
            new[1, 1, unit:] = back[1, 1, unit:]
            _require(_equal(new, back), scheme, f"{value} spreads over its unit, head or row")


def prefill_quantizes_what_leaves_the_window(scheme: KVQuantizer, case: Case) -> None:
    """The cache holds sinks and window exactly, and the rest as `quantize_key` makes it."""
    spec = scheme.spec()
    sinks, n = spec.sink_length, spec.sink_length + spec.residual_length + 2 * spec.unit + 5
    layer, tokens = case.layer(scheme), case.tokens(n, 5)
    layer.prefill(*tokens)
    end = sinks + layer.packed_lengths()[0]
    _require(n - end >= spec.residual_length, scheme, f"the window has {n - end} exact tokens")
    for (x, quantize, _), held in zip(_both(scheme, tokens), layer.dequantize(), strict=True):
        body = scheme.dequantize(quantize(x[:, :, sinks:end]))
        expected = torch.cat([x[:, :, :sinks], body, x[:, :, end:]], 2)
        _require(_equal(held, expected), scheme, "the cache holds something else")


def decode_is_attention_over_what_the_cache_holds(scheme: KVQuantizer, case: Case) -> None:
    """Dequantized past and exact new tokens, against float64; what is stored is what came in.

    A spec whose attention leaves something out says what (`KVSpec.sparse`); that is not checked.
    """
    if scheme.spec().sparse is not None:
        return
    layer, unit = case.layer(scheme), scheme.spec().unit
    eps = max(torch.finfo(case.dtype).eps, 2**-14)
    for i, t in enumerate((unit + 9, 1, 33, unit, 2)):
        (past_k, past_v), (k, v) = layer.dequantize(), case.tokens(t, 6 + i)
        past, q = past_k.shape[2], torch.cat(case.tokens(t, 60 + i), 1)
        out = layer.decode(q, k, v, scale=0.1)
        keys, values = torch.cat([past_k, k], 2), torch.cat([past_v, v], 2)
        expected = attention(q, keys, values, past, 0.1)
        error = ((out.double() - expected).abs() / (1 + expected.abs())).max()
        _require(bool(error <= 2 * eps), scheme, f"{t} tokens after {past}: error {error:.3g}")


def splits_do_not_matter(scheme: KVQuantizer, case: Case) -> None:
    """One prefill, many appends, and rows one by one fill the same cache."""
    spec = scheme.spec()
    n = spec.sink_length + spec.residual_length + 2 * spec.unit + 40
    k, v = case.tokens(n, 7)
    whole = case.layer(scheme)
    whole.prefill(k, v)
    for chunk in (17, 32, spec.unit + 1):
        parts = case.layer(scheme)
        for start in range(0, n, chunk):
            parts.append(k[:, :, start : start + chunk], v[:, :, start : start + chunk])
        same = [_equal(*x) for x in zip(parts.dequantize(), whole.dequantize(), strict=True)]
        _require(all(same), scheme, f"appends of {chunk} tokens differ from a prefill")
    single = case.layer(scheme, 1)
    single.prefill(k[1:], v[1:])
    same = [_equal(a, b[1:]) for a, b in zip(single.dequantize(), whole.dequantize(), strict=True)]
    _require(all(same), scheme, "a row alone differs from the row in a batch")


def history_can_be_cropped_selected_and_forked(scheme: KVQuantizer, case: Case) -> None:
    """What is kept stays what it was; a fork and its origin do not touch each other."""
    spec = scheme.spec()
    layer, twin = case.layer(scheme), case.layer(scheme)
    n = spec.sink_length + spec.residual_length + 3 * spec.unit + 7
    for each in (layer, twin):
        each.prefill(*case.tokens(n, 8))
    before, fork = layer.dequantize(), layer.fork()
    for each in (layer, twin):
        each.append(*case.tokens(spec.unit + 1, 9))
    fork.crop(spec.residual_length + spec.unit + 3)
    kept = n - (spec.residual_length + spec.unit + 3)
    _require(set(fork.lengths()) == {kept}, scheme, f"crop leaves {fork.lengths()} tokens")
    same = [_equal(a, b[:, :, :kept]) for a, b in zip(fork.dequantize(), before, strict=True)]
    _require(all(same), scheme, "a crop changes the tokens that are kept")
    fork.append(*case.tokens(spec.unit + 1, 10))
    held = layer.dequantize()
    same = [_equal(*x) for x in zip(held, twin.dequantize(), strict=True)]
    _require(all(same), scheme, "what is done to a fork changes its origin")
    order = [1, 1, 0]
    layer.select(order)
    same = [_equal(a, b[order]) for a, b in zip(layer.dequantize(), held, strict=True)]
    _require(all(same), scheme, "select changes or mixes rows")
    layer.reset()
    _require(layer.lengths() == [0] * len(order), scheme, "reset leaves tokens behind")


def _both(
    scheme: KVQuantizer, tokens: tuple[Tensor, Tensor]
) -> list[tuple[Tensor, Callable[[Tensor], PackedTensor], Spec | None]]:
    """Keys and values, each with what quantizes it and its spec."""
    spec = scheme.spec()
    return [
        (tokens[0], scheme.quantize_key, spec.key),
        (tokens[1], scheme.quantize_value, spec.value),
    ]


PROPERTIES: tuple[Callable[[KVQuantizer, Case], None], ...] = (
    is_a_declaration,
    bytes_are_told_truthfully,
    round_trip_is_close,
    requantizing_is_stable,
    rows_heads_and_units_are_independent,
    prefill_quantizes_what_leaves_the_window,
    decode_is_attention_over_what_the_cache_holds,
    splits_do_not_matter,
    history_can_be_cropped_selected_and_forked,
)
"""What `check_scheme` checks, one function each."""
