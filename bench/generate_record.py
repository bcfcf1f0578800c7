"""The record of `bench_generate.py`: rows merged into it, in one line each, and as a plot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

Row = dict[str, Any]
CASE = ("model", "layers", "batch", "context", "new", "cache", "options", "cap GB")
"""What makes a case, beside the device."""
SHOWN = ("tokens/s", "ms/step", "prefill s", "prefill peak GiB", "peak GiB", "cache GiB")


def merge(out: Path | None, row: Row) -> None:
    """Write a row into a record, in place of the row of the same case."""
    if out is None:
        return
    record = json.loads(out.read_text()) if out.exists() else {"rows": []}

    def case(row: Row) -> str:
        return json.dumps([row["environment"]["device"], *(row.get(name) for name in CASE)])

    held = {case(row): row for row in [*record["rows"], row]}
    whole = out.with_suffix(".part")  # the record is never half written
    whole.write_text(json.dumps({"rows": list(held.values())}, indent=1) + "\n")
    whole.replace(out)


def brief(row: Row) -> str:
    """A row in one line."""
    found = [f"{name} {row[name]:.5g}" for name in SHOWN if row.get(name) is not None]
    case = f"{row['model']} {row['layers']}L {row['batch']}x{row['context']} {row['cache']}"
    capped = f" ({row['cap GB']:g} GB)" if row["cap GB"] else ""
    return f"{case}{capped}: " + (row.get("failed") or ", ".join(found))


def plot(record: Path, picture: Path, along: str, model: str) -> None:
    """Draw tokens/s and peak memory along "context" or "batch"."""
    from matplotlib.figure import Figure

    rows = [row for row in json.loads(record.read_text())["rows"] if "tokens/s" in row]
    rows = [row for row in rows if row["model"] == model]
    other = "batch" if along == "context" else "context"
    kinds = [(row[other], json.dumps([row["cap GB"], row["options"]])) for row in rows]
    kind = max(sorted(set(kinds)), key=kinds.count)
    chosen = [row for row, its in zip(rows, kinds, strict=True) if its == kind]
    fixed, rows = kind[0], sorted(chosen, key=lambda row: int(row[along]))
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for axes, what in zip(figure.subplots(1, 2), ("tokens/s", "peak GiB"), strict=True):
        for name in dict.fromkeys(row["cache"] for row in rows):
            one = [row for row in rows if row["cache"] == name]
            points = [(row[along], row[what] or row["cache GiB"]) for row in one]  # CPU: no peak
            axes.plot(*zip(*points, strict=True), marker="o", label=name)
        axes.set(xscale="log", yscale="log", xlabel=f"{along} ({other} {fixed})", ylabel=what)
        ticks = sorted({row[along] for row in rows})
        axes.set_xticks(ticks, [f"{n // 1024}K" if n % 1024 == 0 else str(n) for n in ticks])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.suptitle(f"{rows[0]['model']}, {rows[0]['environment']['device']}", fontsize=10)
    figure.savefig(picture, dpi=150)
