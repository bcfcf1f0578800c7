"""The record of `bench_generate.py`: rows merged into it, in one line each, and as a plot."""

from __future__ import annotations

import json
from itertools import cycle
from pathlib import Path
from typing import Any

from kivi.evals.plots import COLORS

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


def _short(n: int) -> str:
    return f"{n // 2**20}M" if n % 2**20 == 0 else f"{n // 1024}K" if n % 1024 == 0 else str(n)


def _draw(axes: Any, rows: list[Row], along: str, what: str, colors: dict[str, str]) -> None:
    """One panel; a cross where a cache is out of memory."""
    for i, (name, color) in enumerate(colors.items()):
        one = [row for row in rows if row["cache"] == name]
        points = [(r[along], r[what] or r["cache GiB"]) for r in one if "tokens/s" in r]
        if points:  # without a GPU there is no peak
            axes.plot(*zip(*points, strict=True), marker="o", ms=4, color=color)
        crosses = [r[along] for r in one if r.get("failed") == "out of memory"]
        height = [0.96 - 0.05 * i] * len(crosses)  # of the panel: crosses stand below each other
        axes.plot(crosses, height, "x", color=color, transform=axes.get_xaxis_transform())
    axes.set(xscale="log", yscale="log", ylabel=what)
    ticks = sorted({row[along] for row in rows})
    axes.set_xticks(ticks, [_short(n) for n in ticks])
    axes.minorticks_off()
    if what != "tokens/s":
        low, high = axes.get_ylim()
        ticks = [n for n in (2**k for k in range(-4, 12)) if low <= n <= high]
        axes.set_yticks(ticks, [f"{n:g}" for n in ticks])
    axes.grid(alpha=0.3)


def plot(
    record: Path, picture: Path, model: str, names: list[str], batch: int, context: int
) -> None:
    """Draw tokens/s and peak memory along contexts at `batch`, and along batches at `context`."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    rows = [row for row in json.loads(record.read_text())["rows"] if row["model"] == model]
    if not rows:
        raise ValueError(f"model {model!r}: {record} has no rows of it")
    # How most cases were run: compiled by layers, no cap, no prompt.
    kinds = [json.dumps([row["cap GB"], row["options"]]) for row in rows]
    kind = max(sorted(set(kinds)), key=kinds.count)
    rows = [row for row, its in zip(rows, kinds, strict=True) if its == kind]
    colors = dict(zip(names, cycle(COLORS), strict=False))
    figure = Figure(figsize=(9, 6.4), layout="constrained")
    lines = ("context", "batch", batch), ("batch", "context", context)
    for pair, (along, other, fixed) in zip(figure.subplots(2, 2), lines, strict=True):
        chosen = [row for row in rows if row[other] == fixed and row["cache"] in names]
        if not chosen:
            held = sorted({row[other] for row in rows if row["cache"] in names})
            raise ValueError(f"{other} {fixed}: {record} has rows of these caches at {held}")
        chosen.sort(key=lambda row: row[along])
        for axes, what in zip(pair, ("tokens/s", "peak GiB"), strict=True):
            _draw(axes, chosen, along, what, colors)
            axes.set_xlabel(f"{along}, at {other} {_short(fixed)}")
    marks = [Line2D([], [], marker="o", ms=4, color=color) for color in colors.values()]
    marks.append(Line2D([], [], marker="x", ls="", color="black"))
    figure.legend(marks, [*colors, "out of memory"], loc="outside lower center", ncols=5)
    figure.suptitle(f"{model}, random weights, {rows[0]['environment']['device']}", fontsize=10)
    figure.savefig(picture, dpi=150)
