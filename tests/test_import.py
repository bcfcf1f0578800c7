"""What importing kivi costs, and how a scheme from another package gets in: in new processes."""

import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = ("triton", "transformers", "matplotlib", "typer")


def run(code: str, path: Path | None = None) -> str:
    setup = f"import sys; sys.path.insert(0, {str(path)!r}); " if path else ""
    done = subprocess.run([sys.executable, "-c", setup + code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "code",
    [
        "import kivi",
        "import kivi; kivi.KVQuantizer.get('kivi', bits=2).bits_per_element()",
        "import kivi; kivi.KVQuantizer.get('kivi').new_layer("
        "batch_size=1, num_kv_heads=1, head_dim=64)",
    ],
)
def test_core_loads_nothing_heavy(code: str) -> None:
    # Against what torch has loaded by itself: some of its releases take a look at triton.
    baseline = run(f"import torch, sys; print([m for m in {HEAVY} if m in sys.modules])")
    loaded = run(f"{code}; import sys; print([m for m in {HEAVY} if m in sys.modules])")
    assert loaded == baseline


def test_module_runs() -> None:
    done = subprocess.run([sys.executable, "-m", "kivi", "--help"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for command in ("ablate", "schemes", "generate"):
        assert command in done.stdout


def test_help_loads_no_transformers() -> None:
    code = """
import sys
from kivi.__main__ import app
try:
    app(["--help"])
except SystemExit as stop:
    assert not stop.code
print("transformers" in sys.modules)
"""
    assert run(code).rstrip().endswith("False")


SCHEME = """
from dataclasses import dataclass
from kivi import KVQuantizer, KVSpec, QuantSpec

@dataclass(frozen=True)
class Third(KVQuantizer, name="third"):
    bits: int = 4

    def spec(self, layer_idx=None):
        return KVSpec(QuantSpec(self.bits, "channel"), None)
"""


@pytest.mark.parametrize("target", ["third_party", "third_party:Third"])
def test_entry_point(tmp_path: Path, target: str) -> None:
    (tmp_path / "third_party.py").write_text(SCHEME)
    info = tmp_path / "third_party-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: third-party\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[kivi.schemes]\nthird = {target}\n")
    code = (
        "from kivi import KVQuantizer; assert 'third' in KVQuantizer.available();"
        "print(KVQuantizer.get('third', bits=2))"
    )
    assert run(code, tmp_path).strip() == "Third(bits=2)"
