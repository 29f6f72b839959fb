"""The SSE2 kernels on this machine, bit for bit against the operators."""

import platform

import pytest

from .host_kernels import C_TARGET, library, run, source
from .vector_targets import CONTRACTIBLE, CONTRACTING, FMA, assembly, largest, layers, self_test, wrong, zig

pytestmark = pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="needs an x86-64 processor")

FLAGS = ["-std=c99 -O0", "-std=c99 -O2", "-std=gnu99 -O3 -march=native -ffp-contract=fast"]


@pytest.mark.parametrize("flags", FLAGS)
@pytest.mark.parametrize("compiler", ["gcc", "clang"])
def test_adder_conv(compiler, flags, tmp_path):
    kernels = library(tmp_path, compiler, flags)
    for layer in layers(1 if flags == FLAGS[1] else 4):
        assert not wrong(lambda layer: run(kernels, layer), layer)


def test_the_largest_sums(tmp_path):
    kernels = library(tmp_path, "gcc", FLAGS[1])
    for layer, expected in largest():
        assert (run(kernels, layer) == expected).all(), layer.case


@pytest.mark.parametrize(
    "options", ["-std=c99 -O1 -fsanitize=address,undefined -fno-sanitize-recover=all", "-std=c99 -O3"]
)
def test_micro_kernel(options, tmp_path):
    self_test(["gcc"], [], tmp_path, options)


def test_micro_kernel_in_32_bits(tmp_path):
    compiler = zig("x86-linux-none", "-msse2", "-mfpmath=sse", "-static", "-nostdlib", "-ffreestanding", "-DNO_LIBC")
    self_test(compiler, [], tmp_path, "-std=gnu99 -O2")


def test_psadbw_is_used(tmp_path):
    assert assembly(["gcc"], source(), tmp_path, "-std=c99 -O2").count("psadbw") >= 12
    assert "psadbw" not in assembly(["gcc"], source(), tmp_path, f"-std=c99 -O2 {C_TARGET}")


@pytest.mark.parametrize("target", ["", C_TARGET])
@pytest.mark.parametrize("compiler", ["gcc", "clang"])
def test_no_product_is_contracted(compiler, target, tmp_path):
    options = f"{CONTRACTING} -march=haswell {target}"
    assert FMA.search(assembly([compiler], CONTRACTIBLE, tmp_path, options))
    assert not FMA.findall(assembly([compiler], source(), tmp_path, options))
