"""`python -m adderops.info` reports the facts, even if a part is broken."""

import os
import subprocess
import sys

import pytest
import torch

import adderops
from adderops import _ops
from adderops.info import describe


def test_lines_report_the_facts():
    lines = describe()
    assert lines["adderops"].startswith(f"{adderops.__version__} in ")
    assert lines["torch"].startswith(torch.__version__)
    assert lines["threads"] == str(torch.get_num_threads())
    assert lines["instruction set in use"] in lines["instruction sets here"].split(", ")
    assert lines["CUDA kernels"].startswith("none: " if _ops.CUDA_KERNELS_MISSING else "for ")
    assert (lines["CUDA devices"] == "none") == (not torch.cuda.is_available())
    assert not [line for line in lines.values() if line.startswith("error")]


def test_instruction_set_follows_the_environment(monkeypatch):
    for isa in describe()["instruction sets here"].split(", "):
        monkeypatch.setenv("ADDEROPS_CPU_ISA", isa)
        assert describe()["instruction set in use"] == isa


def test_a_broken_part_hides_no_other(monkeypatch):
    monkeypatch.setenv("ADDEROPS_CPU_ISA", "mmx")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: 1 / 0)
    lines = describe()
    assert lines["instruction set in use"].startswith("error: ")
    assert "'mmx'" in lines["instruction set in use"]
    assert lines["CUDA devices"] == "error: division by zero"
    assert lines["instruction sets here"]


@pytest.mark.parametrize("isa", ["baseline", "neon"])
def test_command_line(isa, tmp_path):
    if isa not in describe()["instruction sets here"]:
        pytest.skip(f"{isa} does not run on this machine")
    run = subprocess.run(
        [sys.executable, "-m", "adderops.info"],
        env={**os.environ, "ADDEROPS_CPU_ISA": isa},
        cwd=tmp_path,  # in the checkout its adderops/ would be imported
        capture_output=True,
        text=True,
        check=True,
    )
    printed = dict(line.split("  ", 1) for line in run.stdout.splitlines())
    assert set(printed) == set(describe())
    assert printed["instruction set in use"].strip() == isa
