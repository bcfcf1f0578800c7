"""Files of a KVCache: safetensors with a description, a version and a checksum."""

from __future__ import annotations

import dataclasses
import json
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from kivi.attention import Impl
from kivi.cache_file import describe, fields_of, rebuild, rope_of
from kivi.hf_handles import Columns
from kivi.hf_masks import Shared
from kivi.quantizer import KVQuantizer

FORMAT = f"{__package__}.KVCache"
VERSION = 1
"""Of the file's layout; a file of another version is refused."""


class Saved(NamedTuple):
    """What a file holds.

    `model`: what of a model's config must be equal. `schemes`, one for each layer. `max_length` and
    `check_finite` as `KVCache` takes them. `layers`: the layers' tokens, None for an empty layer.
    """

    model: dict[str, Any]
    schemes: list[KVQuantizer]
    max_length: int | None
    check_finite: bool
    layers: list[Columns | None]


def save(path: str | Path, saved: Saved) -> None:
    """Write a file, or leave what is there as it is.

    Raises:
        ValueError: if a scheme has options that JSON cannot write.
        OSError: if the file cannot be written.
    """
    layers, tensors = list[Any](), dict[str, Tensor]()
    for i, columns in enumerate(saved.layers):
        if columns is None:
            layers.append(None)
            continue
        layer, held = describe(columns.cache)
        layer |= {"seen": int(columns.seen), "padding": [first for first, _ in columns.padding]}
        # Layers share what a mask says, which safetensors refuses.
        held |= {f"padding_{j}": valid.clone() for j, (_, valid) in enumerate(columns.padding)}
        tensors |= {f"{i}.{name}": x for name, x in held.items()}
        layers.append(layer)
    schemes = [(s.name, dataclasses.asdict(s)) for s in saved.schemes]  # type: ignore[call-overload]
    _write(Path(path), {**saved._asdict(), "schemes": schemes, "layers": layers}, tensors)


def load(
    path: str | Path, model: dict[str, Any], *, device: torch.device | str, impl: Impl
) -> Saved:
    """What `save` wrote, with layers on a device.

    Raises:
        ValueError: for a file that is damaged, truncated, of another kind, version or model, or if
            a scheme is missing here or has become another one.
        OSError: if there is no file that can be read.
    """
    description, tensors = _read(Path(path))
    other = {n: x for n, x in description["model"].items() if model.get(n) != x}
    if other:
        own = {name: model.get(name) for name in other}
        raise ValueError(f"path={str(path)!r} is of another model: {other}, this one has {own}")
    schemes = [KVQuantizer.get(name, **fields) for name, fields in description["schemes"]]
    finite, layers, shared = description["check_finite"], list[Columns | None](), Shared()
    for i, (scheme, layer) in enumerate(zip(schemes, description["layers"], strict=True)):
        if layer is None:
            layers.append(None)
            continue
        prefix = f"{i}."
        held = {n.removeprefix(prefix): x for n, x in tensors.items() if n.startswith(prefix)}
        padding = [(n, held.pop(f"padding_{j}")) for j, n in enumerate(layer["padding"])]
        spec = scheme.spec(i).with_rope(rope_of(layer["spec"]))
        if fields_of(spec) != layer["spec"]:
            raise ValueError(
                f"path={str(path)!r} has {scheme.name!r} of another release: {layer['spec']}"
            )
        cache = rebuild(spec, layer, held, device=device, impl=impl, check_finite=finite)
        columns = Columns(cache, cache.sliding_window, shared)
        columns.advance(layer["seen"])
        columns.padding = [(first, valid.to(device)) for first, valid in padding]
        layers.append(columns)
    return Saved(description["model"], schemes, description["max_length"], finite, layers)


def _write(path: Path, description: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    try:
        text = json.dumps(description, sort_keys=True)
    except TypeError as error:
        raise ValueError(f"this cache cannot be saved: {error}") from None
    tensors = {name: x.detach().cpu().contiguous() for name, x in sorted(tensors.items())}
    checksum = str(_checksum(text, tensors))
    metadata = {"format": FORMAT, "version": str(VERSION), "cache": text, "checksum": checksum}
    try:
        with replacing(path) as unfinished:
            save_file(tensors, unfinished, metadata)
    except SafetensorError as error:
        raise OSError(f"{path} cannot be written: {error}") from error


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Where to write a file that takes the place of `path` once it is whole, or never."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield unfinished
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The description and the tensors, on the CPU."""
    with open(path, "rb"):
        pass  # a missing file is no damaged one
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise ValueError(f"path={str(path)!r} is not a saved {FORMAT}")
            if metadata.get("version") != str(VERSION):
                raise ValueError(
                    f"path={str(path)!r} has format version {metadata.get('version')}; "
                    f"this release reads version {VERSION}"
                )
            tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}
    except SafetensorError as error:
        raise ValueError(f"path={str(path)!r} is damaged or no safetensors file: {error}") from None
    text = metadata.get("cache", "")
    if metadata.get("checksum") != str(_checksum(text, tensors)):
        raise ValueError(f"path={str(path)!r} is damaged: its checksum does not match")
    return json.loads(text), tensors


def comparable(config: Any) -> dict[str, Any]:
    """What of two models' configs must be equal for one to go on from the other's cache."""
    decoder = config.get_text_config(decoder=True)
    sizes = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "head_dim")
    kinds = ("model_type", "num_key_value_heads", "sliding_window", "layer_types")
    return {name: getattr(decoder, name, None) for name in sizes + kinds}


def _checksum(text: str, tensors: dict[str, Tensor]) -> int:
    """CRC-32 of the description and of names, kinds and bytes of all tensors."""
    value = zlib.crc32(text.encode())
    for name, x in tensors.items():
        value = zlib.crc32(f"{name} {x.dtype} {tuple(x.shape)}".encode(), value)
        value = zlib.crc32(x.reshape(-1).view(torch.uint8).numpy().data, value)
    return value
