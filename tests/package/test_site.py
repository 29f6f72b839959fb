"""The site builds without a warning and has an entry for every public name; the examples of its pages run."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import adderops

CHECKOUT = Path(__file__).resolve().parents[2]
PAGES = [CHECKOUT / "README.md", CHECKOUT / "CONTRIBUTING.md", *sorted((CHECKOUT / "docs").glob("*.md"))]
MODULES = {"adderops", "adderops.batchnorm", "adderops.dataflow", *(f"adderops.{name}" for name in adderops._LAZY)}
MODULES |= {f"adderops.{name}" for name in ("functional", "nn", "optim", "reference")}

# What a page takes for granted: a trained network, its images
GIVEN = {
    "int8.md": """
import torch
from torch.utils.data import DataLoader, TensorDataset
from adderops.models import lenet5
model, example = lenet5("adder", in_channels=1), torch.randn(1, 1, 32, 32)
loader = DataLoader(TensorDataset(torch.randn(32, 1, 32, 32), torch.arange(32) % 10), batch_size=16)
names, mean, std = [str(i) for i in range(10)], [0.5], [0.25]
""",
    "edge.md": """
import torch
from torch.utils.data import DataLoader, TensorDataset
from adderops.models import lenet5
model, example, mean, std = lenet5("adder", in_channels=1), torch.randn(1, 1, 32, 32), [0.5], [0.25]
loader = DataLoader(TensorDataset(torch.randn(32, 1, 32, 32), torch.arange(32) % 10), batch_size=16)
""",
    "torch.md": """
from torch import nn
from adderops import AdderConv2d
model = nn.Sequential(
    *(nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU()),
    *(AdderConv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
)
""",
}


def public_names(module: str) -> list[str]:
    contents = importlib.import_module(module)
    defined = [n for n, v in vars(contents).items() if n[0] != "_" and getattr(v, "__module__", None) == module]
    return list(getattr(contents, "__all__", defined))


def aliases(module: str, name: str) -> set[str]:
    """The names under which an object may have its entry: its own, or that of the module that defines it."""
    value = getattr(importlib.import_module(module), name)
    home = [getattr(value, "__module__", None), getattr(value, "__name__", None)]  # modules have no __module__
    return {f"{module}.{name}", ".".join(filter(None, home))}


@pytest.fixture(scope="module")
def entries(tmp_path_factory) -> set[str]:
    """Builds the site; its inventory of Python names."""
    pytest.importorskip("furo", reason="the site needs pip install '.[docs]'")
    from sphinx.util.inventory import InventoryFile

    folder = tmp_path_factory.mktemp("site")
    build = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", CHECKOUT / "docs", folder]
    run = subprocess.run(build, capture_output=True, text=True, cwd=CHECKOUT)
    assert run.returncode == 0, run.stderr
    with (folder / "objects.inv").open("rb") as file:
        inventory = InventoryFile.load(file, "", lambda folder, page: page)
    return {name for role in inventory if role.startswith("py:") for name in inventory[role]}


@pytest.mark.slow
@pytest.mark.parametrize("module", sorted(MODULES))
def test_every_public_name_has_an_entry(module, entries):
    names = public_names(module)
    assert names
    assert [name for name in names if not aliases(module, name) & entries] == []


@pytest.fixture
def registries():
    """Undoes registrations after the test."""
    before = [(registry, dict(registry)) for registry in (adderops.models.ARCHITECTURES, adderops.distill.METHODS)]
    yield
    for registry, entries in before:
        registry.clear()
        registry.update(entries)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_examples_of_a_page_run(page, tmp_path, monkeypatch, set_threads, registries):
    """All Python blocks of a page, in order, as one program."""
    blocks = re.findall(r"^```python\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)
    monkeypatch.chdir(tmp_path)
    set_threads(1)
    names = {}
    for block in [GIVEN.get(page.name, ""), *blocks]:
        exec(compile(block, page.name, "exec"), names)


def test_no_example_is_overlooked():
    """A fence of another spelling would go untested."""
    pages = "\n".join(page.read_text() for page in PAGES)
    fences = re.findall(r"^[ \t]*(?:```|~~~)[ \t]*(?:python|py).*", pages, re.MULTILINE | re.IGNORECASE)
    assert set(fences) == {"```python"} and len(fences) >= 11


@pytest.mark.parametrize("page", [*PAGES, CHECKOUT / "csrc" / "README.md"], ids=lambda page: page.name)
def test_files_that_a_page_names_exist(page):
    text = page.read_text()
    links = {link for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text) if "://" not in link}
    assert {link for link in links if not (page.parent / link).exists()} == set()
    named = re.findall(r"(?:csrc|_build|adderops|tests|benchmarks|experiments|docs)/[\w./*{},<>-]+", text)
    pattern = re.compile(r"[*{<]|/X\.|_X\.")  # several files; a file to be written
    named = [path.rstrip(".,") for path in named]
    assert {path for path in named if not pattern.search(path) and not (CHECKOUT / path).exists()} == set()
