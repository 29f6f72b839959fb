"""Fixtures: one test body runs on every backend, threads are put back as they were, small training runs."""

import platform
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from distill.runs import write_bars

from adderops import _ops  # noqa: F401  (loads the operators)
from adderops.distill import Data, Options, load_data


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


@pytest.fixture(scope="session")
def folder_of_bars(tmp_path_factory) -> Path:
    """128 and 40 images of four classes, as the files of MNIST."""
    folder = tmp_path_factory.mktemp("bars")
    write_bars(folder)
    return folder


@pytest.fixture
def options(folder_of_bars, set_threads) -> list[str]:
    """Two epochs of eight steps on them, on the command line."""
    set_threads(1)
    return f"--data {folder_of_bars} --epochs 2 --batch-size 16 --threads 1".split()


@pytest.fixture
def data(folder_of_bars) -> Data:
    return load_data(str(folder_of_bars))


@pytest.fixture
def config(folder_of_bars, set_threads) -> Options:
    set_threads(1)
    return Options(data=str(folder_of_bars), method="pkkd", epochs=2, batch_size=16, threads=1)


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
