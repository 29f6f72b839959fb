"""benchmarks/ is importable, as it is for its scripts; three small layers; runs with and without register limits."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))


@pytest.fixture
def tiny(set_threads):
    from harness.layers import Layer

    set_threads(1)
    return (Layer("tiny", 2, 16, 16, 6, 3), Layer("tiny", 3, 16, 32, 6, 3, 2), Layer("tiny", 2, 8, 16, 6, 1, 2))


@pytest.fixture
def without_limits(monkeypatch):
    """As on a machine without a compiler: building the loops of register_limits.cpp takes long."""
    from harness import register_limits

    def measure():
        raise register_limits.Unavailable("no C++ compiler found")

    monkeypatch.setattr(register_limits, "measure", measure)


@pytest.fixture(params=(False, pytest.param(True, marks=pytest.mark.slow)), ids=("no-limits", "limits"))
def limits(request) -> bool:
    """Whether the run measures the register limits."""
    if not request.param:
        request.getfixturevalue("without_limits")
    return request.param
