"""Schemes on the command line: the spec string, the presets and the table of all schemes."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

import torch
from rich.console import Console
from rich.table import Table

from kivi import KVQuantizer
from kivi.attention import why_not_fused
from kivi.spec import BITS, check_count

AXES = ("kivi", "per_token", "per_channel", "crossed")


def every_width() -> tuple[str, ...]:
    """Every scheme that takes `bits`, at all of `spec.BITS` that it accepts."""
    found = []
    for name in KVQuantizer.available():
        for bits in BITS:
            # No such option or width, or a scheme of somebody else's that cannot do it.
            with suppress(Exception):
                KVQuantizer.get(name, bits=bits).spec()
                found.append(f"{name}:bits={bits}")
    return tuple(found)


PRESETS: dict[str, tuple[str, ...]] = {
    "default": (
        "full_precision",
        "int8",
        "flexgen",
        "kivi:bits=4",
        "kivi",
        "kivi:grid=least_squares",
        "kivi_symmetric",
        "per_channel",
        "per_token",
    ),
    "paper-axes": tuple(f"{name}:bits={bits}" for bits in (4, 2) for name in AXES),
    "zoo": (
        "full_precision",
        "fp8",
        "int8",
        "int8:smooth=max",
        "nvfp4",
        "flexgen",
        "atom",
        "qserve",
        "quarot",
        "quarot:bits=2",
        "exllamav3",
        "exllamav3:bits=2",
        "kivi:bits=4",
        "kivi",
        "kivi:group_size=128",
        "streaming_llm",
        "spatten",
        "spatten:values=1.0",
        "asymkv",
        "kvtuner",
        "kitty",
        "kitty:boost=0.25",
        "kvarn",
        "polarquant",
        "oscar_omni",
        "oscar_cov",
        "qjl",
        "turboquant",
        "turboquant:variant=prod",
        "skvq",
        "skvq:group_size=32",
        "gear",
        "gear:bits=4,group_size=none",
        "zipcache",
        "kvquant",
        "kvquant:bits=2",
        "plumb",
        "plumb:value_bits=1",
        "plumb:key_bits=3",
        "plumb:bits=4",
    ),
    "bits": every_width(),
    "flagship": (
        "kivi",
        "kivi:sink_length=4",
        "kivi:group_size=128",
        "plumb:smooth=none,sink_length=0,grid=asymmetric,center=none,transform=none",
        "plumb:smooth=none,sink_length=0,grid=asymmetric,center=none",
        "plumb:smooth=none,sink_length=0,grid=asymmetric",
        "plumb:smooth=none,sink_length=0,grid=midpoint",
        "plumb:smooth=none,sink_length=0",
        "plumb:smooth=none",
        "plumb",
        "plumb:value_bits=1",
        "plumb:key_bits=3",
    ),
    "group-size": tuple(f"kivi:group_size={size}" for size in (16, 32, 64, 128)),
}
WORDS = {"none": None, "true": True, "false": False}

Value = int | float | bool | str | None


def parse_scheme(text: str) -> KVQuantizer:
    """The scheme that a spec string names: `"kivi"` or `"kivi:bits=2,group_size=64"`.

    Values are integers, numbers, true, false, none, or else plain strings.

    Raises:
        ValueError: for a malformed string, and what `KVQuantizer.get` raises.
    """
    name, colon, rest = text.partition(":")
    name = name.strip()
    form = "write name or name:option=value,option=value"
    if not name:
        raise ValueError(f"scheme {text!r} has no name; {form}")
    if colon and not rest.strip():
        raise ValueError(f"scheme {text!r} has no options after the colon; {form}")
    options: dict[str, Value] = {}
    for item in rest.split(",") if colon else ():
        option, equals, value = (part.strip() for part in item.partition("="))
        if not (option and equals and value):
            raise ValueError(f"scheme {text!r}: {item.strip()!r} is not option=value; {form}")
        if option in options:
            raise ValueError(f"scheme {text!r} gives the option {option!r} twice")
        options[option] = parse_value(value)
    return KVQuantizer.get(name, **options)


def parse_value(text: str) -> Value:
    """The value of an option, from its text."""
    if text.lower() in WORDS:
        return WORDS[text.lower()]
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            continue
    return text


def choose_schemes(preset: str | None, texts: Sequence[str]) -> dict[str, KVQuantizer]:
    """Schemes by label: of the preset, then those given; the default preset if there are none.

    Raises:
        ValueError: for an unknown preset, and what `parse_scheme` raises.
    """
    if preset is None and not texts:
        preset = "default"
    if preset is not None and preset not in PRESETS:
        raise ValueError(f"preset={preset!r} is not allowed; choose from {', '.join(PRESETS)}")
    labels = [*(PRESETS[preset] if preset else ()), *texts]
    return {label: parse_scheme(label) for label in dict.fromkeys(labels)}


def fitting(
    schemes: dict[str, KVQuantizer], named: Sequence[str], head_dim: int, console: Console
) -> dict[str, KVQuantizer]:
    """The schemes that fit a head dimension; those of a preset that do not are left out, aloud.

    Raises:
        ValueError: for one that was named and does not fit, or if none is left.
    """
    kept = {}
    for label, scheme in schemes.items():
        try:
            scheme.bits_per_element(head_dim)
            kept[label] = scheme
        except ValueError as error:
            if label in named:
                raise ValueError(f"scheme={label!r} does not fit this model: {error}") from error
            console.print(f"[dim]{label} is left out: {error}[/dim]", highlight=False)
    if not kept:
        raise ValueError(f"no scheme of the preset fits this model, of head_dim={head_dim}")
    return kept


def schemes_table(head_dim: int) -> Table:
    """All schemes with their options, size ("-" where the head dimension does not fit) and paper.

    Raises:
        ValueError: for a head dimension below 1.
    """
    check_count("head_dim", head_dim, 1)
    table = Table(title=f"Schemes (bits per element at head dimension {head_dim})")
    table.add_column("scheme", style="bold", no_wrap=True)
    table.add_column("options = defaults")
    table.add_column("bits/elem", justify="right", no_wrap=True)
    table.add_column("kernel", no_wrap=True)
    table.add_column("paper", no_wrap=True)
    for name in KVQuantizer.available():
        scheme = KVQuantizer.get(name)
        options = ", ".join(f"{k}={v}" for k, v in KVQuantizer.options(name).items())
        paper = f"arXiv:{scheme.paper}" if scheme.paper else ""
        try:
            bits = f"{scheme.bits_per_element(head_dim):.2f}"
            fused = why_not_fused(scheme.spec(), head_dim, torch.float16) is None
        except ValueError:
            bits, fused = "-", False
        table.add_row(name, options, bits, "fused" if fused else "", paper)
    return table
