"""Hypothesis profiles, the same seed for every test, and GPU tests where there is no GPU."""

import os

import pytest
import torch

# Kernels run in Triton's interpreter then, which must be chosen before anything imports triton.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from hypothesis import HealthCheck, settings

# Deadlines say nothing here: the first example of a test may compile or warm up torch.
settings.register_profile(
    "dev", deadline=None, suppress_health_check=[HealthCheck.too_slow], max_examples=50
)
# The same examples on every run; `nox -s tests` chooses it with --hypothesis-profile.
settings.register_profile("ci", settings.get_profile("dev"), derandomize=True, max_examples=30)
settings.load_profile("dev")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
