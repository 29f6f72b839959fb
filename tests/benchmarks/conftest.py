"""benchmarks/ is importable, as it is for its scripts; three small layers."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))


@pytest.fixture
def tiny(set_threads):
    from harness.layers import Layer

    set_threads(1)
    return (Layer("tiny", 2, 16, 16, 6, 3), Layer("tiny", 3, 16, 32, 6, 3, 2), Layer("tiny", 2, 8, 16, 6, 1, 2))
