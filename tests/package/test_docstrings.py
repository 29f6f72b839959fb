"""The examples in the docstrings run as written."""

import doctest
import importlib
import pkgutil

import pytest

import adderops

MODULES = ["adderops", *(m.name for m in pkgutil.walk_packages(adderops.__path__, "adderops.") if "_C" not in m.name)]


@pytest.mark.parametrize("name", [n for n in MODULES if not n.endswith("__main__")])
def test_examples(name):
    module = importlib.import_module(name)
    # the examples assume that the reader has imported these
    names = {"torch": importlib.import_module("torch"), "nn": importlib.import_module("torch.nn")}
    result = doctest.testmod(module, extraglobs=names)
    assert result.failed == 0


def test_the_public_functions_have_examples():
    found = set()
    for name in ("functional", "nn", "optim", "reference", "info"):
        for test in doctest.DocTestFinder().find(importlib.import_module(f"adderops.{name}")):
            if test.examples:
                found.add(test.name.removeprefix("adderops."))
    assert found >= {
        "functional.adder_conv2d",
        "reference.adder_conv2d",
        "reference.adder_conv2d_grad_x",
        "reference.adder_conv2d_grad_w",
        "nn.AdderConv2d",
        "nn.AdderLinear",
        "nn.convert",
        "optim.normalize_gradient",
        "optim.normalize_gradients",
        "optim.AdaptiveRate",
        "info.describe",
    }
