"""A scheme's scores as one row of a table, for programs and for people."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kivi.attention import why_not_fused
from kivi.evals.ablation import SchemeScores
from kivi.quantizer import KVQuantizer
from kivi.spec import WORD_BITS, QuantSpec, Spec


@dataclass(frozen=True)
class Row:
    """One scheme in `ablation.csv`; None is an empty cell. Sizes in bytes, KL in nats.

    Columns ending in _low and _high bound the 95 % interval of the column before. Bits and group
    sizes of keys and values as the cache has them; tensors kept unquantized count as 16 bit.
    """

    scheme: str
    key_bits: int
    value_bits: int
    group_size: str
    bits_per_element: float
    ppl: float
    ppl_low: float
    ppl_high: float
    kl_mean: float
    kl_mean_low: float
    kl_mean_high: float
    kl_p999: float
    kl_p999_low: float
    kl_p999_high: float
    top1: float
    top1_low: float
    top1_high: float
    passkey: float | None
    passkey_low: float | None
    passkey_high: float | None
    attention_error: float | None
    cache_bytes: int
    cache_bytes_used: int
    fused_kernel: bool


def make_row(scores: SchemeScores, scheme: KVQuantizer, head_dim: int) -> Row:
    """What a report says of one scheme."""
    spec, decode = scheme.spec(), scores.decode
    recall = scores.recall.recall if scores.recall else None
    layers = scores.attention
    return Row(
        scheme=scores.label,
        key_bits=_bits(spec.key),
        value_bits=_bits(spec.value),
        group_size=_group_size(spec.key, spec.value, head_dim),
        bits_per_element=scheme.bits_per_element(head_dim),
        ppl=decode.perplexity.estimate,
        ppl_low=decode.perplexity.low,
        ppl_high=decode.perplexity.high,
        kl_mean=decode.kl_mean.estimate,
        kl_mean_low=decode.kl_mean.low,
        kl_mean_high=decode.kl_mean.high,
        kl_p999=decode.kl_p999.estimate,
        kl_p999_low=decode.kl_p999.low,
        kl_p999_high=decode.kl_p999.high,
        top1=decode.top1.estimate,
        top1_low=decode.top1.low,
        top1_high=decode.top1.high,
        passkey=recall.estimate if recall else None,
        passkey_low=recall.low if recall else None,
        passkey_high=recall.high if recall else None,
        attention_error=sum(layers) / len(layers) if layers else None,
        cache_bytes=decode.size.allocated,
        cache_bytes_used=decode.size.used,
        fused_kernel=why_not_fused(spec, head_dim, torch.float16) is None,
    )


def _bits(spec: Spec | None) -> int:
    return spec.bits if spec else WORD_BITS


def _group_size(key: Spec | None, value: Spec | None, head_dim: int) -> str:
    """`32`, or `128/32` where keys and values differ, `-` for what has none."""
    both = [str(s.group(head_dim)) if isinstance(s, QuantSpec) else "-" for s in (key, value)]
    return both[0] if both[0] == both[1] else "/".join(both)


def short_names(scheme: KVQuantizer) -> tuple[str, str]:
    """A series and a label for plots: ("kivi least_squares", "kivi least_squares 2 bit G=64").

    Options at their defaults go unsaid; bits and group size do not part a series.
    """
    defaults = KVQuantizer.options(scheme.name)
    chosen = {name: getattr(scheme, name) for name in defaults}
    chosen = {name: value for name, value in chosen.items() if value != defaults[name]}
    size = chosen.pop("group_size", "")
    others = [
        f"{v}" if isinstance(v, str) else f"{n}={v}" for n, v in chosen.items() if "bits" not in n
    ]
    series = " ".join([scheme.name, *others])
    spec = scheme.spec()
    if spec.key is None and spec.value is None:
        return series, series
    bits = f"{_bits(spec.key)} bit"
    if _bits(spec.key) != _bits(spec.value):
        bits = f"K{_bits(spec.key)} V{_bits(spec.value)}"
    return series, " ".join([series, bits, *([f"G={size}"] if size else [])])


COLUMNS = (
    ("scheme", "scheme"),
    ("bits", "K/V bits"),
    ("group_size", "G"),
    ("bits_per_element", "bits per elem."),
    ("ppl", "ppl"),
    ("kl_mean", "KL mean"),
    ("kl_p999", "KL p99.9"),
    ("top1", "top-1"),
    ("passkey", "passkey"),
    ("attention_error", "attn error"),
    ("cache_bytes", "cache MiB"),
    ("fused_kernel", "kernel"),
)
"""Columns for people: key and heading."""


def cells(row: Row) -> dict[str, str]:
    """A row as text for people, by the keys of COLUMNS."""
    return {
        "scheme": row.scheme,
        "bits": f"{row.key_bits}/{row.value_bits}",
        "group_size": row.group_size,
        "bits_per_element": f"{row.bits_per_element:.2f}",
        "ppl": f"{row.ppl:.3f}",
        "kl_mean": small(row.kl_mean),
        "kl_p999": small(row.kl_p999),
        "top1": f"{row.top1:.1%}",
        "passkey": "" if row.passkey is None else f"{row.passkey:.0%}",
        "attention_error": "" if row.attention_error is None else f"{row.attention_error:.2%}",
        "cache_bytes": megabytes(row.cache_bytes),
        "fused_kernel": "fused" if row.fused_kernel else "",
    }


def small(value: float) -> str:
    """A KL: two significant digits, and 0 below what float32 logits can tell."""
    if abs(value) < 1e-6:
        return "0"
    return f"{value:.1e}" if value < 1e-3 else f"{value:.2g}"


def megabytes(size: int) -> str:
    """Bytes as a number of MiB."""
    return f"{size / 2**20:.2f}"
