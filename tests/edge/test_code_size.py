"""The bytes of code in each part of a generated file."""

import shutil

import pytest

from adderops.edge import code_size
from adderops.edge.code_size import COMPILER

NETWORK = """\
#include <stdint.h>
// --- first.c ---
const uint32_t weights[2] = {1, 2};
int one(void) { return 1; }
// --- second.c ---
int two(void) { return one() + 1; }
int three(void) { return 3; }
"""
needs_compiler = pytest.mark.skipif(shutil.which(COMPILER) is None, reason=f"install {COMPILER}")


@needs_compiler
@pytest.mark.parametrize("target", ["cortex-m4", "cortex-m33"])
def test_each_function_counts_in_its_part(tmp_path, target):
    (tmp_path / "network.c").write_text(NETWORK)
    # movs r0, #n; bx lr: four bytes each, and no weights
    assert code_size(tmp_path / "network.c", target) == {"second": 8, "first": 4}


@needs_compiler
def test_a_file_that_does_not_compile(tmp_path):
    (tmp_path / "network.c").write_text(NETWORK + "int four(void) { return }\n")
    with pytest.raises(RuntimeError, match="expected expression"):
        code_size(tmp_path / "network.c")


def test_refusals(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="target: expected one of cortex-m4, .* got 'avr'"):
        code_size(tmp_path / "network.c", "avr")
    with pytest.raises(FileNotFoundError, match="network.c"):
        code_size(tmp_path / "network.c")
    (tmp_path / "network.c").write_text(NETWORK)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(FileNotFoundError, match=f"{COMPILER} is not on the PATH"):
        code_size(tmp_path / "network.c")
