"""The wheel, built where there is no toolkit: nvcc comes from PyPI; it loads in the oldest torch, this, and a CPU's.

One architecture only; TORCH_CUDA_ARCH_LIST=all adds the others.
"""

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy
import pytest
import torch

from package.test_install import CHECKOUT, copied_sources

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="manylinux is for Linux")]

PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check")
SHARED = Path(numpy.__file__).parents[1]  # what the environments need beside torch and adderops

ADD = """
import torch, adderops
y = adderops.functional.adder_conv2d(torch.ones(1, 1, 2, 2), torch.zeros(1, 1, 2, 2))
print(torch.__version__, adderops.__file__, y.item())
print(torch._C._dispatch_has_kernel_for_dispatch_key("adderops::adder_conv2d", "CUDA"))
print(adderops.info.describe()["CUDA kernels"])
"""


def run(*command: object, **environ: str) -> str:
    """Returns what a command prints in a world without nvcc; fails with it."""
    hidden = ("ADDEROPS_CUDA", "CUDA_HOME", "CUDA_PATH", "PYTHONPATH")
    kept = {name: value for name, value in os.environ.items() if name not in hidden}
    folders = [str(Path(sys.executable).parent), *kept["PATH"].split(os.pathsep)]
    kept["PATH"] = os.pathsep.join(folder for folder in folders if not Path(folder, "nvcc").exists())
    done = subprocess.run(
        [str(part) for part in command],
        env=kept | environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> tuple[Path, str]:
    """The wheel as it is published, and what its build said."""
    folder = tmp_path_factory.mktemp("wheel")
    probe = subprocess.run([*PIP, "download", "-q", "--no-deps", "-d", folder, "ninja"], capture_output=True, text=True)
    if probe.returncode:
        pytest.skip(f"no package index: {probe.stderr.splitlines()[-1]}")
    tree = copied_sources(folder)
    decides = tree / "_build" / "cuda_toolkit.py"
    decides.write_text(decides.read_text().replace("/usr/local/cuda/bin/nvcc", "/nowhere/nvcc"))
    cuda = {"ADDEROPS_CUDA": "1", "TORCH_CUDA_ARCH_LIST": "8.0", "MAX_JOBS": "2"}
    run(sys.executable, "-m", "build", "--sdist", "-nx", "--outdir", folder, tree, **cuda)
    (sdist,) = folder.glob("*.tar.gz")
    says = run(*PIP, "wheel", "-v", "--no-deps", "-w", folder, sdist, **cuda)
    (wheel,) = folder.glob("adderops-*.whl")
    (repair,) = re.findall(r'^repair-wheel-command = "(.*)"$', (CHECKOUT / "pyproject.toml").read_text(), re.M)
    run(*repair.format(dest_dir=folder / "repaired", wheel=wheel).split())
    (wheel,) = (folder / "repaired").iterdir()
    return wheel, says


def test_nvcc_comes_from_the_index(built):
    _, says = built
    assert re.search("Successfully installed .*nvidia-cuda-nvcc-", says)
    (decision,) = re.findall("adderops: (CPU kernels.*)", says)
    assert re.match(r"CPU kernels and CUDA kernels for 8.0 \(nvcc 1\d\.\d in .*/site-packages/nvidia/cu1\d;", decision)


def test_one_small_wheel_for_every_python_and_linux(built):
    wheel, _ = built
    assert re.fullmatch(r"adderops-[\w.]+-cp310-abi3-(manylinux_2_\d+_\w+\.?)+\.whl", wheel.name)
    assert wheel.stat().st_size * 7 < 40e6  # seven architectures
    binaries = [name for name in zipfile.ZipFile(wheel).namelist() if ".so" in name]
    assert sorted(binaries) == ["adderops/_C.abi3.so", "adderops/_cuda.abi3.so"]  # none of torch's


@pytest.mark.parametrize("requirement", ["torch==2.11.0", "torch", "torch==2.13.0+cpu"])
def test_it_loads(requirement, built, tmp_path):
    """In an environment with this torch, which borrows everything else from the environment of the tests."""
    wheel, _ = built
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path)
    python = tmp_path / "bin" / "python"
    (packages,) = tmp_path.glob("lib/python*/site-packages")
    install = [*PIP, "--python", python, "install", "-q", "--no-deps"]  # they are borrowed, perhaps in other versions
    if "==" in requirement:
        done = subprocess.run([*install, requirement], capture_output=True, text=True)
        if "No matching distribution" in done.stderr:
            pytest.skip(f"the package index has no {requirement}")
        assert done.returncode == 0, done.stderr
    (packages / "borrowed.pth").write_text(f"{SHARED}\n")
    run(*install, "--no-index", "--ignore-installed", wheel)  # an installed adderops is borrowed, too
    used, registered, kernels = run(python, "-I", "-c", ADD).splitlines()[-3:]
    version, file, result = used.split()
    assert version.startswith(requirement.partition("==")[2] or torch.__version__)
    assert (file, result) == (str(packages / "adderops" / "__init__.py"), "-4.0")
    if version.endswith("+cpu"):
        assert registered == "False" and kernels.startswith("none: this torch is built without CUDA")
    else:
        assert (registered, kernels) == ("True", "for 8.0")
