"""Where and with what an evaluation ran."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from kivi import __version__


@dataclass(frozen=True)
class Environment:
    """Versions and machine, as they go into a report."""

    kivi_version: str
    python: str
    torch: str
    transformers: str
    system: str
    processor: str
    threads: int
    accelerator: str


def environment(device: torch.device | str = "cpu") -> Environment:
    """The environment of a run on a device."""
    device = torch.device(device)
    return Environment(
        kivi_version=__version__,
        python=platform.python_version(),
        torch=torch.__version__,
        transformers=_version("transformers"),
        system=f"{platform.system()} {platform.machine()}",
        processor=_processor(),
        threads=torch.get_num_threads(),
        accelerator=torch.cuda.get_device_name(device) if device.type == "cuda" else "none",
    )


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or "unknown"
    return f"{os.cpu_count()} x {name}"
