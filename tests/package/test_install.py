"""The package as built and installed; .ci/run installs it into a fresh environment."""

import importlib
import os
import shutil
import subprocess
import sys
import tarfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import pytest

import adderops
from adderops import _C

CHECKOUT = Path(__file__).resolve().parents[2]
INSTALLED = Path(adderops.__file__).resolve().parent


def test_installed_version():
    try:
        installed = version("adderops")
    except PackageNotFoundError:
        pytest.skip("built in place, not installed: there is no metadata to compare with")
    assert installed == adderops.__version__


def test_every_module_is_installed():
    if INSTALLED.is_relative_to(CHECKOUT):
        pytest.skip(f"the tested package is the checkout itself, {INSTALLED}; `pytest` tests the installed one")
    modules = {p.relative_to(CHECKOUT / "adderops") for p in (CHECKOUT / "adderops").rglob("*.py")}
    assert {p.relative_to(INSTALLED) for p in INSTALLED.rglob("*.py")} == modules
    assert (INSTALLED / "py.typed").is_file()
    kernels = {p.name for p in (CHECKOUT / "adderops" / "edge" / "c").iterdir()}
    assert {p.name for p in (INSTALLED / "edge" / "c").iterdir()} == kernels


def test_one_binary_for_every_python_and_torch():
    for library in (_C, sys.modules.get("adderops._cuda", _C)):
        assert Path(library.__file__).name.endswith((".abi3.so", ".pyd"))


@pytest.mark.slow
def test_sources_without_the_library_say_what_to_do(tmp_path):
    shutil.copytree(INSTALLED, tmp_path / "adderops", ignore=shutil.ignore_patterns("_C*", "_cuda*", "__pycache__"))
    run = subprocess.run([sys.executable, "-c", "import adderops"], cwd=tmp_path, capture_output=True, text=True)
    assert "the compiled library adderops/_C.abi3.so does not load" in run.stderr
    assert "build it with `pip install .` in the checkout" in run.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    "value, message",
    [
        ("1", "ADDEROPS_CUDA=1: CUDA_HOME=/nowhere holds no bin/nvcc; set CUDA_HOME to a toolkit of CUDA "),
        ("yes", "ADDEROPS_CUDA: expected auto, 0 or 1, got 'yes'"),
    ],
)
def test_cuda_that_cannot_be_built_is_refused(value, message):
    """It must not silently become a CPU build."""
    run = subprocess.run(
        [sys.executable, "setup.py", "--version"],
        cwd=CHECKOUT,
        env={**os.environ, "ADDEROPS_CUDA": value, "CUDA_HOME": "/nowhere"},
        capture_output=True,
        text=True,
    )
    assert run.returncode != 0
    assert message in run.stderr


class Requirements(NamedTuple):
    """What the build backend asks pip for, per hook, and whether it offers the torch of the interpreter."""

    wheel: list[str]
    editable: list[str]
    sdist: list[str]
    torch_is_found: bool


def build_requirements(monkeypatch, folder, version=None, cuda=None, **environ) -> Requirements:
    """The requirements if `folder` is the interpreter's only site-packages, with this torch, and nvcc is nowhere."""
    if version:
        (folder / "torch").mkdir()
        lines = (
            f"__version__ = '{version}'",
            "debug = False",
            f"cuda: Optional[str] = {cuda!r}",
            "hip: Optional[str] = None",
        )
        (folder / "torch" / "version.py").write_text("\n".join(lines))
    here = {"ADDEROPS_CUDA": "auto", "CUDA_HOME": "", "CUDA_PATH": "", "PATH": str(folder)}
    for name, value in (here | environ).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("site.getsitepackages", lambda: [str(folder)])
    monkeypatch.setattr("site.ENABLE_USER_SITE", False)
    monkeypatch.setattr("sys.path", list(sys.path))
    monkeypatch.syspath_prepend(CHECKOUT / "_build")
    for name in ("adderops_backend", "cuda_toolkit"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    backend = importlib.import_module("adderops_backend")
    monkeypatch.setattr("cuda_toolkit.USUAL_NVCC", "/nowhere/nvcc")
    monkeypatch.setattr("cuda_toolkit.visible_gpus", frozenset)
    return Requirements(
        backend.get_requires_for_build_wheel(),
        backend.get_requires_for_build_editable(),
        backend.get_requires_for_build_sdist(),
        str(folder) in sys.path,
    )


@pytest.mark.parametrize("installed", ["2.11.0+cpu", "2.100.1", "3.0.0a0+git1234"])
def test_the_build_uses_an_installed_torch(installed, monkeypatch, tmp_path):
    assert build_requirements(monkeypatch, tmp_path, installed) == ([], [], [], True)


@pytest.mark.parametrize("installed", [None, "2.10.1+cu130", "1.99.0"])
def test_the_build_requires_torch_if_none_is_new_enough(installed, monkeypatch, tmp_path):
    torch = ["torch>=2.11", "numpy"]
    assert build_requirements(monkeypatch, tmp_path, installed) == (torch, torch, torch, False)


@pytest.mark.parametrize(
    "installed, cuda, nvcc",
    [
        ("2.15.0+cu132", "13.2", ["cuda-toolkit[nvcc]==13.2.*"]),
        ("2.11.0+cpu", None, ["cuda-toolkit[nvcc]==13.0.*"]),
        ("2.11.0+cu128", "12.8", []),
    ],
)
def test_the_build_requires_nvcc_of_the_cuda_of_torch(installed, cuda, nvcc, monkeypatch, tmp_path):
    asked = build_requirements(monkeypatch, tmp_path, installed, cuda, ADDEROPS_CUDA="1")
    assert asked == (nvcc, nvcc, [], True)


def test_the_build_requires_nvcc_beside_a_torch_to_come(monkeypatch, tmp_path):
    torch, nvcc = ["torch>=2.11", "numpy"], ["cuda-toolkit[nvcc]==13.0.*"]
    asked = build_requirements(monkeypatch, tmp_path, ADDEROPS_CUDA="1")
    assert asked == (torch + nvcc, torch + nvcc, torch, False)


def test_a_mistyped_request_is_refused_before_anything_is_fetched(monkeypatch, tmp_path):
    with pytest.raises(SystemExit, match="ADDEROPS_CUDA: expected auto, 0 or 1, got 'yes'"):
        build_requirements(monkeypatch, tmp_path, ADDEROPS_CUDA="yes")


def copied_sources(folder: Path) -> Path:
    """A copy of the checkout without the results of builds and runs."""
    patterns = shutil.ignore_patterns(".git", "*.so", "*.egg-info", "__pycache__", ".*_cache")

    def ignored(directory: str, names: list[str]) -> set[str]:
        results = {"build", "dist", "runs", "site"} if Path(directory) == CHECKOUT else set()
        return patterns(directory, names) | results

    return Path(shutil.copytree(CHECKOUT, folder / "tree", ignore=ignored))


@pytest.mark.slow
def test_no_compiler_is_one_line(tmp_path):
    run = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        cwd=copied_sources(tmp_path),
        env={**os.environ, "ADDEROPS_CUDA": "0", "CXX": "no-such-compiler -O2"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 1 and "Traceback" not in run.stderr
    last = run.stderr.splitlines()[-1]
    assert last.startswith("adderops: no C++ compiler: expected 'no-such-compiler -O2' on the PATH; install g++")


def test_the_source_distribution_is_whole(tmp_path):
    """It holds whatever a test or a build reads: every file of the repository except .gitignore."""
    tree = copied_sources(tmp_path)
    command = [sys.executable, "setup.py", "-q", "sdist", "--formats=tar", "--dist-dir", str(tmp_path)]
    run = subprocess.run(command, cwd=tree, env={**os.environ, "ADDEROPS_CUDA": "0"}, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    (archive,) = tmp_path.glob("adderops-*.tar")
    with tarfile.open(archive) as tar:
        packed = {Path(*Path(name).parts[1:]) for name in tar.getnames()}
    wanted = {path.relative_to(tree) for path in tree.rglob("*") if path.is_file()}
    missing = {path for path in wanted - packed if not any("egg-info" in part for part in path.parts)}
    assert missing <= {Path(".gitignore")}, sorted(map(str, missing))
