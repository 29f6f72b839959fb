"""Fixtures of the operator tests: one test body runs on every backend, and threads are put back as they were."""

import platform
from dataclasses import dataclass

import pytest
import torch

from adderops import _ops  # noqa: F401  (loads the operators)


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
    """torch.set_num_threads, undone after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(params=_backends())
def backend(request, monkeypatch, set_threads):
    """On one thread, unless the test sets more: on small shapes threads mostly wait for each other."""
    monkeypatch.setenv("ADDEROPS_CPU_ISA", request.param.isa)
    set_threads(1)
    return request.param


_mutants: list[tuple[str, str | None]] = []


@pytest.fixture
def record_mutant():
    """record_mutant(what, detector): a row of the table at the end of the run."""
    return lambda what, detector: _mutants.append((what, detector))


def pytest_terminal_summary(terminalreporter):
    if _mutants:
        terminalreporter.section("deliberate errors in the CUDA kernels, and who caught them")
        for what, detector in _mutants:
            terminalreporter.write_line(f"{detector or 'NOBODY':10}{what}")
