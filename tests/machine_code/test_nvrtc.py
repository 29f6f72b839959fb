"""Every CUDA kernel compiles for every architecture with NVRTC: no GPU, no nvcc, no host headers in the kernels."""

import re
from itertools import product
from pathlib import Path

import cuda_budgets as budgets
import nvrtc
import pytest
from test_budgets import SCOPES

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def has_nvrtc():
    try:
        nvrtc.library()
    except nvrtc.Unavailable as reason:
        pytest.skip(str(reason))


def found_in_sources(pattern: str) -> set[str]:
    return {found for file in (ROOT / "csrc/cuda").glob("*.cu*") for found in re.findall(pattern, file.read_text())}


def test_instances_cover_all_kernels():
    defined = found_in_sources(r"__global__\s+void\s+(?:__launch_bounds__\((?:[^()]|\([^()]*\))*\)\s+)?(\w+)\s*\(")
    assert defined == {re.sub(r"<.*", "", instance.expression).split("::")[-1] for instance in budgets.INSTANCES}


@pytest.mark.parametrize("source", ["forward", "grad_x", "grad_w"])
def test_instances_cover_all_tiles(source):
    text = (ROOT / f"csrc/cuda/{source}.cu").read_text()
    lists = re.findall(r"TileSize \w+\[\] = \{(.*)\};", text)
    chosen = {f"{lanes}x{columns}" for tiles in lists for lanes, columns in re.findall(r"\{(\d+), (\d+)\}", tiles)}
    for element in ("float32", "float16", "bfloat16"):
        label = f"{source} {element} "
        tiles = {i.tile for i in budgets.INSTANCES if i.label.startswith(label)} - {"-"}
        assert tiles == chosen


def test_instances_cover_all_int8_tiles():
    (chosen,) = re.findall(r"TileSize \w+\[\] = \{(.*)\};", (ROOT / "csrc/cuda/int8.cu").read_text())
    chosen = [f"{lanes}x{columns}" for lanes, columns in re.findall(r"\{(\d+), (\d+)\}", chosen)]
    for piece, arch in product((16, 4, 1), (90, 120)):
        instances = [i for i in budgets.INSTANCES if i.label == f"int8 {piece}-byte" and arch in i.architectures]
        assert [i.tile for i in instances] == (chosen if piece == 16 else chosen[1:])


@pytest.mark.parametrize(("arch", "scope"), [*SCOPES, pytest.param(75, "budgets", marks=pytest.mark.slow)])
def test_kernels_compile(has_nvrtc, arch, scope):
    if arch not in nvrtc.architectures():
        pytest.skip(f"NVRTC {'.'.join(map(str, nvrtc.version()))} has no sm_{arch}")
    wanted = budgets.units(arch, scope)
    for unit, compiled in zip(wanted, budgets.compile_all(arch, wanted), strict=True):  # raises with the log
        assert set(compiled.names) == {instance.expression for instance in unit}
        assert compiled.cubin.startswith(b"\x7fELF")


def test_error_has_the_log(has_nvrtc):
    with pytest.raises(nvrtc.CompileError, match=r"broken\.cu\(2\): error: identifier \"nothing\" is undefined"):
        nvrtc.compile("__global__ void kernel(int* p) {\n  *p = nothing; }", "broken.cu", 90)


def test_without_a_library(monkeypatch):
    monkeypatch.setattr(nvrtc, "_candidates", lambda: ["libnvrtc-absent.so"])
    with pytest.raises(nvrtc.Unavailable, match="nvidia-cuda-nvrtc"):
        nvrtc.library.__wrapped__()
