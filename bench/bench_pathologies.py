"""Attention error of schemes on synthetic caches with known pathologies.

    python bench/bench_pathologies.py --out bench/results/pathologies.json

Relative error of attention outputs (Frobenius norm), mean over seeds, 1024 tokens of prefill and
512 more in chunks of 16; needs no GPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

from kivi import KVQuantizer, LayerCache
from kivi.cli_schemes import parse_scheme
from kivi.evals.attention_error import AttentionInputs, attention_errors
from kivi.evals.environment import environment
from kivi.evals.pathologies import PATHOLOGIES, pathology

SCHEMES = (
    "kivi",
    "kivi:group_size=128",
    "plumb",
    "plumb:key_bits=3",
    "quarot:bits=2",
    "oscar_omni",
)


def error(scheme: KVQuantizer, name: str, head_dim: int, seeds: int) -> float:
    """Mean relative error of a scheme on a pathology."""

    def make_layer(_: int, x: AttentionInputs) -> LayerCache:
        _, heads, _, d = x.k.shape
        return scheme.new_layer(batch_size=1, num_kv_heads=heads, head_dim=d, dtype=x.k.dtype)

    inputs = [pathology(name, head_dim, seed=seed) for seed in range(seeds)]
    errors = attention_errors(inputs, make_layer, prefill=1024, chunk=16)
    return sum(errors) / len(errors)


def main() -> None:
    """Print a table and write it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scheme", action="append", help="default: " + " ".join(SCHEMES))
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    labels = options.scheme or SCHEMES
    schemes = {label: parse_scheme(label) for label in labels}
    table = {
        name: {s: error(schemes[s], name, options.head_dim, options.seeds) for s in schemes}
        for name in PATHOLOGIES
    }
    bits = {s: scheme.bits_per_element(options.head_dim) for s, scheme in schemes.items()}
    print(" " * 33 + "".join(f"{s:>22.22s}" for s in schemes))
    print(f"{'bits per element':33s}" + "".join(f"{b:22.2f}" for b in bits.values()))
    for name, row in table.items():
        print(f"{name:33s}" + "".join(f"{e:22.3f}" for e in row.values()))
    if options.out:
        found = {
            "environment": dataclasses.asdict(environment("cpu")),
            "head_dim": options.head_dim,
            "seeds": options.seeds,
            "bits_per_element": bits,
            "relative_error": table,
        }
        options.out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
