"""Macros by which generated files leave out code: what they say of a network, and that nothing needed is missing."""

import pytest
import torch
from slow import slow_except

from adderops.edge.export import source_of
from adderops.edge.uses import macros

from .emulation import toolchain
from .random_networks import RandomNetworks

from harness import edge_programs  # isort: skip


@pytest.fixture(autouse=True)
def one_thread(set_threads):
    set_threads(1)


def names(program):
    source = source_of(program)
    lines = macros(source.calls, program, source.plan.rings)
    return [{name.strip("()").removeprefix("USES_") for name in line.split()[2:]} - {"|"} for line in lines]


def test_macros_of_resnet8():
    uses, finishes = names(edge_programs.network("resnet8")[0])
    assert finishes == {"FLOATS"}  # of the classifier
    orders, rules = {"TAPS", "ROWS_1", "ROWS_2"}, {"BYTES", "QUANTIZED", "SUMS", "RESIDUALS", "SHORTCUTS"}
    assert uses == finishes | orders | rules | {"BORDERS", "RINGS", "WINDOWS_27"}


def test_macros_of_tiles_that_are_left():
    uses, finishes = names(edge_programs.network("resnet8", shape=(3, 10, 10))[0])
    assert "LEFT_TILES" in uses
    assert {"BYTES", "SUMS", "SHORTCUTS", "FLOATS"} <= finishes


def test_without_layers():
    assert macros([], edge_programs.network("ds_cnn")[0], []) == ["#define ADDER_USES 0", "#define ADDER_FINISHES 0"]


@pytest.mark.filterwarnings("ignore:calibrate")
@pytest.mark.parametrize("seed", slow_except((0,), range(6)))
def test_random_networks_have_what_they_need(seed):
    network, size = RandomNetworks(seed).network()
    program, x, _ = edge_programs.integer_program(network, torch.randn(1, *size))
    edge_programs.network_run(program, x, toolchain(), "cortex-m4", count=False)
