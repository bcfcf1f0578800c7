"""KVQuantizer: what a scheme is, and the registry of schemes."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import pkgutil
from abc import ABC, abstractmethod
from functools import cache
from importlib.metadata import entry_points
from typing import Any, ClassVar

import torch
from torch import Tensor

from kivi.attention import Impl
from kivi.cache import LayerCache
from kivi.quantize import PackedTensor, dequantize, quantize
from kivi.spec import KVSpec, Rope

_SCHEMES: dict[str, type[KVQuantizer]] = {}


class KVQuantizer(ABC):
    """A scheme: a frozen dataclass whose fields are its options and which declares a KVSpec.

    A subclass registers itself: `class Mine(KVQuantizer, name="mine", paper="2402.02750")`. It
    stores no tensors; packing, caching and attention are generic code over its spec.
    """

    name: ClassVar[str]
    paper: ClassVar[str]

    def __init_subclass__(cls, *, name: str, paper: str = "") -> None:
        if name in _SCHEMES and _SCHEMES[name].__module__ != cls.__module__:
            raise ValueError(f"name={name!r} is taken by {_SCHEMES[name].__module__}")
        cls.name, cls.paper = name, paper
        _SCHEMES[name] = cls

    @abstractmethod
    def spec(self, layer_idx: int | None = None) -> KVSpec:
        """How a layer's keys and values are kept.

        Args:
            layer_idx: the layer, for schemes that treat layers differently; None for any.
        """

    @staticmethod
    def get(name: str, **options: Any) -> KVQuantizer:
        """A scheme by name: `KVQuantizer.get("kivi", bits=2)`.

        Args:
            name: one of `available()`.
            options: the scheme's options, see `options(name)`.

        Raises:
            ValueError: for an unknown scheme or option (close matches are listed), or a value or
                combination that the scheme does not allow.
        """
        _choose("scheme", name, KVQuantizer.available())
        for option in options:
            _choose(f"option of {name!r}", option, tuple(KVQuantizer.options(name)))
        scheme = _SCHEMES[name](**options)
        scheme.spec()  # raises where values do not fit together
        return scheme

    @staticmethod
    def available() -> tuple[str, ...]:
        """Names of all schemes: built-in, and from the entry point group "kivi.schemes"."""
        _load_schemes()
        return tuple(sorted(_SCHEMES))

    @staticmethod
    def options(name: str) -> dict[str, Any]:
        """Options of a scheme and their defaults.

        Raises:
            ValueError: for an unknown scheme.
        """
        _choose("scheme", name, KVQuantizer.available())
        return {f.name: f.default for f in dataclasses.fields(_SCHEMES[name])}  # type: ignore[arg-type]

    def bits_per_element(self, head_dim: int = 128) -> float:
        """Bits stored for a packed element, metadata counted; mean of keys and values.

        What no spec quantizes counts as 16.
        """
        return self.spec().bits_per_element(head_dim)

    def quantize_key(
        self, k: Tensor, *, layer_idx: int | None = None, check_finite: bool = False
    ) -> PackedTensor:
        """Quantize keys `[B, Hkv, T, D]`, all of them (the exact window is the cache's).

        Raises:
            ValueError: see `kivi.quantize.quantize`.
        """
        return quantize(k, self.spec(layer_idx).key, name="k", check_finite=check_finite)

    def quantize_value(
        self, v: Tensor, *, layer_idx: int | None = None, check_finite: bool = False
    ) -> PackedTensor:
        """Quantize values `[B, Hkv, T, D]`. Errors as in `quantize_key`."""
        return quantize(v, self.spec(layer_idx).value, name="v", check_finite=check_finite)

    def dequantize(self, packed: PackedTensor) -> Tensor:
        """The tensor `[B, Hkv, T, D]` that a PackedTensor stands for, in its original dtype."""
        return dequantize(packed)

    def new_layer(
        self,
        *,
        batch_size: int,
        num_kv_heads: int,
        head_dim: int,
        value_head_dim: int | None = None,
        max_length: int | None = None,
        sliding_window: int | None = None,
        dtype: torch.dtype = torch.float16,
        device: torch.device | str = "cpu",
        impl: Impl = "auto",
        check_finite: bool = False,
        layer_idx: int | None = None,
        rope: Rope | None = None,
    ) -> LayerCache:
        """An empty cache for one layer. Arguments and errors: see `kivi.cache.LayerCache`.

        `rope`: how the model turns keys, for schemes that quantize them as they were before.
        """
        return LayerCache(
            self.spec(layer_idx).with_rope(rope),
            batch_size,
            num_kv_heads,
            head_dim,
            value_head_dim,
            max_length=max_length,
            sliding_window=sliding_window,
            dtype=dtype,
            device=device,
            impl=impl,
            check_finite=check_finite,
        )


def _choose(what: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        close = difflib.get_close_matches(str(value), allowed, n=3)
        hint = f"did you mean {' or '.join(map(repr, close))}? " if close else ""
        raise ValueError(f"unknown {what}: {value!r}; {hint}Allowed: {', '.join(allowed)}")


@cache
def _load_schemes() -> None:
    package = importlib.import_module("kivi.schemes")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"kivi.schemes.{module.name}")
    for entry in entry_points(group="kivi.schemes"):
        entry.load()
