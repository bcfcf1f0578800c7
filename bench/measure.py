"""What the benchmarks share: medians, this machine's copy bandwidth, the record's header."""

from __future__ import annotations

import json
import platform
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch.utils.benchmark import Timer

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def median_ms(run: Callable[[], object]) -> float:
    """Median time of a call in milliseconds, after warm-up; CUDA events on a GPU."""
    if DEVICE == "cuda":
        from triton.testing import do_bench

        return float(do_bench(run, warmup=20, rep=60, return_mode="median"))
    run()
    return Timer("run()", globals={"run": run}).blocked_autorange(min_run_time=0.5).median * 1e3


def copy_bandwidth(nbytes: int = 2**31 if DEVICE == "cuda" else 2**28) -> float:
    """Bytes per second of a large copy on the device, read plus written."""
    source = torch.randn(nbytes // 4, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * nbytes / (median_ms(lambda: target.copy_(source)) * 1e-3)


def environment() -> dict[str, str]:
    """Machine, versions and command."""
    name = torch.cuda.get_device_name() if DEVICE == "cuda" else platform.processor()
    cores = f"{torch.get_num_threads()} threads"
    return {
        "device": name or platform.machine(),
        "cpu": cores,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "command": shlex.join(["python", f"bench/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
    }


def report(title: str, rows: list[dict[str, object]], out: str | None) -> None:
    """Print rows as a table and, if `out` is given, write them there as JSON."""
    if not rows:
        raise SystemExit("no case has a name that contains what was asked for")
    table = Table(*rows[0], title=title)
    for row in rows:
        table.add_row(*(f"{x:.3g}" if isinstance(x, float) else str(x) for x in row.values()))
    Console(width=150).print(table)
    if out:
        record = {"environment": environment(), "rows": rows}
        Path(out).write_text(json.dumps(record, indent=1) + "\n")
