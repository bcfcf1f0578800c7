"""An ablation as files: CSV and JSON for programs, Markdown and plots for people."""

from __future__ import annotations

import csv
import dataclasses
import json
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kivi.evals.ablation import Ablation, SchemeScores
from kivi.evals.environment import Environment
from kivi.evals.intervals import LEVEL, Interval
from kivi.evals.plots import Point, RecallMap, pareto_figure, passkey_figure, quality_figure
from kivi.evals.rows import COLUMNS, Row, cells, make_row, short_names
from kivi.hf_save import replacing
from kivi.quantizer import KVQuantizer

INCOMPLETE = (
    "**Incomplete**: not all that the command asks for has been run, be it texts, passkeys or "
    "schemes."
)


@dataclass(frozen=True)
class Settings:
    """How an ablation ran: enough to run it again; sequences and tokens are those evaluated."""

    command: str
    model: str
    text: str
    device: str
    dtype: str
    impl: str
    context: int
    prefill: int
    chunk: int
    sequences: int
    batch_size: int
    evaluated_tokens: int
    seed: int
    passkey_lengths: tuple[int, ...]
    passkey_depths: tuple[float, ...]
    passkey_samples: int


def write_report(
    out: Path,
    ablation: Ablation,
    schemes: Sequence[KVQuantizer],
    *,
    settings: Settings,
    environment: Environment,
    head_dim: int,
    plots: bool = True,
) -> list[Path]:
    """Write `ablation.csv`, `.json`, `.md` and the plots into a folder, made if missing.

    Whenever the writing is cut off, each of the three is there whole, as it was or as it is.

    Args:
        out: the folder.
        ablation: the scores.
        schemes: of the scores, in the same order.
        settings: how it ran.
        environment: where it ran.
        head_dim: of the model, for the bits per element.
        plots: whether to draw, which takes seconds.

    Returns:
        The files written.
    """
    out.mkdir(parents=True, exist_ok=True)
    pairs = list(zip(ablation.schemes, schemes, strict=True))
    rows = [make_row(scores, scheme, head_dim) for scores, scheme in pairs]
    write_csv(out / "ablation.csv", rows)
    document = _document(ablation, rows, settings, environment)
    _write(out / "ablation.json", json.dumps(document, indent=2) + "\n")
    pictures = _draw(out, rows, pairs) if plots else []
    text = markdown(ablation, rows, settings, environment, [f.name for f in pictures])
    _write(out / "ablation.md", text)
    return [out / "ablation.csv", out / "ablation.json", out / "ablation.md", *pictures]


def _draw(
    out: Path, rows: Sequence[Row], pairs: Sequence[tuple[SchemeScores, KVQuantizer]]
) -> list[Path]:
    files: list[Path] = []
    points = [
        Point(*short_names(scheme), row.bits_per_element, scores.decode.kl_mean)
        for row, (scores, scheme) in zip(rows, pairs, strict=True)
    ]
    quality = quality_figure(points)
    if quality is not None:
        quality.savefig(out / "quality_vs_bits.png")
        files.append(out / "quality_vs_bits.png")
    sizes = [replace(p, bits=r.cache_bytes_used / 2**20) for p, r in zip(points, rows, strict=True)]
    pareto = pareto_figure(sizes, [row.fused_kernel for row in rows])
    if pareto is not None:
        pareto.savefig(out / "pareto.png")
        files.append(out / "pareto.png")
    maps = [
        RecallMap(
            short_names(scheme)[1],
            {(cell.depth, cell.length): cell.recall.estimate for cell in s.recall.cells},
        )
        for s, scheme in pairs
        if s.recall
    ]
    if maps:
        passkey_figure(maps).savefig(out / "passkey.png")
        files.append(out / "passkey.png")
    return files


def _write(path: Path, text: str) -> None:
    with replacing(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """Write rows as CSV, one column for each field of Row."""
    with replacing(path) as new, new.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(field.name for field in dataclasses.fields(Row))
        writer.writerows(dataclasses.astuple(row) for row in rows)


def _document(
    ablation: Ablation, rows: Sequence[Row], settings: Settings, environment: Environment
) -> dict[str, Any]:
    schemes = []
    for row, scores in zip(rows, ablation.schemes, strict=True):
        cells = scores.recall.cells if scores.recall else ()
        schemes.append(
            {
                **dataclasses.asdict(row),
                "passkey_cells": [dataclasses.asdict(cell) for cell in cells],
                "attention_error_by_layer": scores.attention,
            }
        )
    return {
        "environment": dataclasses.asdict(environment),
        "settings": dataclasses.asdict(settings),
        "complete": ablation.complete,
        "confidence_level": LEVEL,
        "full_precision_ppl": ablation.exact_perplexity._asdict(),
        "schemes": schemes,
        "failed": [failure._asdict() for failure in ablation.failed],
    }


def markdown(
    ablation: Ablation,
    rows: Sequence[Row],
    settings: Settings,
    environment: Environment,
    pictures: Sequence[str],
) -> str:
    """The report as Markdown."""
    keys = [key for key, _ in COLUMNS if any(cells(row)[key] for row in rows)]
    headings = dict(COLUMNS)
    table = [[headings[k] for k in keys], ["---", *("---:" for _ in keys[1:])]]
    table += [[cells(row)[k] for k in keys] for row in rows]
    lines = ["| " + " | ".join(line) + " |" for line in table]
    plots = [f"![{name}]({name})" for name in pictures]
    exact = ablation.exact_perplexity
    passkeys = (
        f"Passkeys: lengths {_listed(settings.passkey_lengths)} at depths "
        f"{_listed(settings.passkey_depths)}, {settings.passkey_samples} a cell. "
        if rows[0].passkey is not None and ablation.complete
        else ""
    )
    failed = [f"- `{label}`: {one_line(error)}" for label, error in ablation.failed]
    return "\n".join(
        [
            "# KV-cache ablation",
            "",
            f"Model: {settings.model} ({settings.dtype}, {settings.device}). "
            f"Text: {settings.text}. "
            f"{settings.sequences} sequences: {settings.prefill} tokens of exact prefill, then "
            f"decoding in chunks of {settings.chunk} to {settings.context} tokens; "
            f"{settings.evaluated_tokens} tokens evaluated. {passkeys}Seed {settings.seed}.",
            "",
            *([] if ablation.complete else [INCOMPLETE, ""]),
            f"Full precision: perplexity {_interval(exact)}.",
            "",
            *lines,
            "",
            *(["Failed, and not in the table:", "", *failed, ""] if failed else []),
            "KL is KL(full precision || scheme) of the next-token distribution in nats; top-1 the "
            "share of tokens where both agree on the likeliest; attn error the relative error of "
            "attention outputs, mean over layers; cache what is allocated for "
            f"{min(settings.batch_size, settings.sequences)} sequences, exact window included. "
            "Intervals (95 %) are in the CSV file.",
            "",
            *[line for plot in plots for line in (plot, "")],
            "## Environment",
            "",
            f"`{settings.command}`",
            "",
            f"kivi {environment.kivi_version}, torch {environment.torch}, "
            f"transformers {environment.transformers}, Python {environment.python}, "
            f"{environment.system}, {environment.processor}, {environment.threads} threads, "
            f"accelerator {environment.accelerator}.",
            "",
        ]
    )


def one_line(error: str) -> str:
    """An error of many lines in one that can be read."""
    return textwrap.shorten(error, 300, placeholder=" ...")


def _listed(values: Sequence[float]) -> str:
    return ", ".join(f"{v:g}" for v in values)


def _interval(value: Interval) -> str:
    return f"{value.estimate:.3f} ({value.low:.3f} to {value.high:.3f})"
