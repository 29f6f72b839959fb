"""The examples in the docstrings run as written."""

import doctest
import importlib
import inspect
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


LISTED = ("adderops", "adderops.models", "adderops.quant")  # `__all__` lists what is public
OTHERS = ("export", "functional", "info", "nn", "operations", "optim", "reference")  # names without an underscore are


def public_names() -> dict[str, object]:
    """The public functions and classes by qualified name."""
    found = {}
    for name in (*LISTED, *(f"adderops.{other}" for other in OTHERS)):
        module = importlib.import_module(name)
        names = module.__all__ if name in LISTED else [n for n in vars(module) if not n.startswith("_")]
        for value in (getattr(module, n) for n in names):
            if (inspect.isfunction(value) or inspect.isclass(value)) and value.__module__.startswith("adderops"):
                found[f"{value.__module__}.{value.__qualname__}"] = value
    return found


@pytest.mark.parametrize("name", public_names())
def test_public_names_have_examples(name):
    value = public_names()[name]
    assert doctest.DocTestFinder(recurse=False).find(value, name)[0].examples, f"{name}: no example"
