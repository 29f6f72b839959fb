"""`import adderops` provides every public submodule; the expensive ones are imported on first use."""

import pytest
from child import run_python

import adderops

CODE = """
import sys
import torch
before = set(sys.modules)
import adderops
others = {name.split(".")[0] for name in sys.modules if name not in before} - {"adderops"}
assert not others, others
lazy = [name for name in ("distill", "export", "models", "operations", "quant") if f"adderops.{name}" in sys.modules]
assert not lazy, lazy
assert {name} in dir(adderops)
module = adderops.{name}
assert module is sys.modules["adderops.{name}"] and module.__doc__
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["distill", "export", "info", "models", "operations", "quant"])
def test_submodule_of_the_package(name):
    code = CODE.replace("{name} in", f"{name!r} in").replace("{name}", name)
    done = run_python("-c", code)
    assert done.returncode == 0, done.stderr[-2000:]


def test_other_names_are_unknown():
    with pytest.raises(AttributeError, match="module 'adderops' has no attribute 'losses'"):
        _ = adderops.losses
