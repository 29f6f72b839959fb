"""Fixtures for every room: each test body runs on every backend, and thread counts are restored."""

import platform
from dataclasses import dataclass

import pytest
import torch

from adderops import _ops  # noqa: F401  (registers the operators)


@dataclass(frozen=True)
class Backend:
    """Where an operator runs: a device and, on the CPU, an instruction set."""

    device: str
    isa: str

    def __str__(self) -> str:
        return f"{self.device}-{self.isa}"


def _backends():
    runnable = torch.ops.adderops._cpu_isas()
    sets = {"x86_64": ["baseline", "avx2", "avx512"], "aarch64": ["neon"]}.get(platform.machine(), ["baseline"])
    for isa in dict.fromkeys([*sets, *runnable]):
        reason = f"the instruction set {isa} does not run here: this library and processor have {', '.join(runnable)}"
        yield pytest.param(
            Backend("cpu", isa), id=f"cpu-{isa}", marks=pytest.mark.skipif(isa not in runnable, reason=reason)
        )


@pytest.fixture
def set_threads():
    """torch.set_num_threads, restored after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(params=_backends())
def backend(request, monkeypatch, set_threads):
    """Every instruction set, on one thread unless the test sets more: on small shapes threads mostly wait."""
    monkeypatch.setenv("ADDEROPS_CPU_ISA", request.param.isa)
    set_threads(1)
    return request.param
