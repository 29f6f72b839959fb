"""Generated code stays within budgets: modelled cycles a term, bytes of code, instructions of the loop on AArch64.

Counts are exact and repeat, so the budgets are what was measured plus 1 %, with the clang of ziglang, which CI has, and
with arm-none-eabi-gcc where there is one. A change that beats a budget by far should lower it.
"""

import pytest
from slow import slow_except

from .emulation import toolchain

from harness import edge_layers, edge_peers, edge_programs  # isort: skip
from harness.edge_layers import DENSE, DEPTHWISE, EdgeLayer  # isort: skip

CYCLES = {  # a term on Cortex-M4, assembly, float32 epilogue: zig's clang, gcc
    "16-16.3x3@32": (0.651, 0.650),
    "16-32.3x3s2@32": (0.644, 0.644),
    "32-32.3x3@16": (0.563, 0.563),
    "32-64.3x3s2@16": (0.572, 0.572),
    "64-64.3x3@8": (0.526, 0.526),
    "16-32.1x1s2@32": (1.532, 1.525),
    "32-64.1x1s2@16": (1.001, 0.999),
    "64-64.1x1@12": (0.775, 0.775),
    "128-128.1x1@6": (0.652, 0.652),
    "64-64.1x1@25x5": (0.814, 0.816),
    "dw.64.3x3@12": (2.790, 2.889),
    "dw.64.3x3@25x5": (3.491, 3.663),
}
CODE = {  # bytes beside the weights; gcc must stay within 6144, the aim is 4096
    "resnet8": (6_360, 5_520),
    "ds_cnn": (7_120, 6_090),
}
COMPILERS = ("zig", "gcc")
LAYERS = {layer.name: layer for layer in (*DENSE, *DEPTHWISE)}


@pytest.mark.parametrize("compiler", COMPILERS)
@pytest.mark.parametrize("name", slow_except(("32-64.3x3s2@16", "128-128.1x1@6", "dw.64.3x3@12"), CYCLES))
def test_cycles_of_a_layer(name, compiler):
    counted = edge_programs.layer_run(LAYERS[name], toolchain(compiler), "cortex-m4", "assembly")
    assert counted.run.cycles / counted.terms <= CYCLES[name][COMPILERS.index(compiler)]
    assert counted.run.stack_bytes <= 512


@pytest.mark.parametrize("name, most", [("64-64.3x3@8", 0.6), ("32-64.3x3s2@16", 0.65), ("128-128.1x1@6", 0.74)])
def test_cycles_by_intrinsics(name, most):
    """gcc 12 keeps all sums in registers."""
    counted = edge_programs.layer_run(LAYERS[name], toolchain("gcc"), "cortex-m4", "ACLE")
    assert counted.run.cycles / counted.terms <= most


@pytest.mark.parametrize("compiler", COMPILERS)
@pytest.mark.parametrize("network", CODE)
def test_code_of_a_network(network, compiler):
    """Kernels and calls, and what the compiler adds of its own library."""
    linked = edge_programs.network_linked(edge_programs.network(network)[0], toolchain(compiler), "cortex-m4")
    assert linked.code_bytes <= CODE[network][COMPILERS.index(compiler)]


@pytest.mark.parametrize("layer", [EdgeLayer(8, 8, 8, 8, 3), EdgeLayer(16, 8, 8, 8, 3, 2), EdgeLayer(8, 12, 5, 7, 1)])
def test_dense_layers_read_aligned_words(layer):
    """So that the budgets and the benchmark may count without looking at addresses."""
    counted = edge_programs.layer_run(layer, toolchain(), "cortex-m4", alignment=True)
    assert counted.run.unaligned == 0


@pytest.mark.parametrize("compiler", COMPILERS)
def test_loop_on_aarch64(compiler):
    layer = EdgeLayer(64, 64, 8, 8, 3)
    counted = edge_programs.layer_run(layer, toolchain(compiler, "aarch64"), "aarch64", "NEON")
    assert 0.1 < counted.run.loop_instructions / counted.terms <= 0.16


def test_ahead_of_an_int8_convolution():
    """A convolution of the same care takes 1.6 times as long, with weights of twice the bytes; more with int8."""
    layer = LAYERS["64-64.3x3@8"]
    adder = edge_programs.layer_run(layer, toolchain(), "cortex-m4").run.cycles
    wide, narrow = (
        edge_peers.convolution(layer, kind, toolchain())["cycles"] for kind in ("conv_float", "conv_narrow_float")
    )
    assert 1.6 < wide / adder < 2.1 and 2.2 < narrow / adder < 2.7


@pytest.mark.parametrize("kind", edge_peers.KINDS)
@pytest.mark.parametrize("layer", [EdgeLayer(8, 6, 8, 8, 3), EdgeLayer(8, 6, 8, 8, 3, 2), EdgeLayer(4, 4, 5, 5, 1)])
def test_the_convolution_is_right(layer, kind):
    assert edge_peers.convolution(layer, kind, toolchain())["cycles"] > 0


def test_layers_have_their_facts():
    assert set(edge_peers.CMSIS_NN) == set(CYCLES) == set(LAYERS)
    assert edge_layers.DENSE[2].terms == 2_359_296
