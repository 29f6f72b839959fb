"""The closed form of modelled cycles agrees with the emulator."""

import pytest
from slow import slow_except

from adderops.edge import cost
from adderops.edge.cost import TARGETS, call_cycles, network_cycles
from adderops.edge.export import source_of

from .emulation import toolchain

from harness import edge_programs  # isort: skip
from harness.edge_layers import DENSE, DEPTHWISE, EdgeLayer  # isort: skip

FITTED = (*DENSE[2:], *DEPTHWISE)
UNSEEN = (  # not in the fit
    EdgeLayer(32, 48, 8, 12, 3),
    EdgeLayer(48, 32, 10, 10, 1),
    EdgeLayer(24, 24, 12, 12, 3, 2),
    EdgeLayer(24, 32, 10, 10, 3),
    EdgeLayer(48, 48, 10, 12, 3, depthwise=True),
)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("layer", slow_except(UNSEEN, (*FITTED, *UNSEEN)), ids=lambda layer: layer.name)
def test_layers(layer, target):
    program, _ = edge_programs.layer_program(layer)
    (call,) = source_of(program).calls
    emulated = edge_programs.layer_run(layer, toolchain("gcc"), target).run.cycles
    assert call_cycles(call, program, target) == pytest.approx(emulated, rel=0.05)


@pytest.mark.parametrize("target", slow_except(("cortex-m4",), TARGETS))
@pytest.mark.parametrize("name", slow_except(("ds_cnn",), edge_programs.NETWORKS))
def test_networks(name, target):
    program, x, _ = edge_programs.network(name)
    source = source_of(program)
    emulated = edge_programs.calls_run(program, x, toolchain("gcc"), target)
    assert network_cycles(source, target) == pytest.approx(sum(run.cycles for _, run in emulated), rel=0.02)
    for i, (call, run) in enumerate(emulated):
        if call.terms > 100_000:
            modelled = call_cycles(call, program, target, i in source.plan.rings)
            assert modelled == pytest.approx(run.cycles, rel=0.05), call.layer.name


def test_refuses_other_targets():
    program, _ = edge_programs.layer_program(DENSE[7])
    with pytest.raises(ValueError, match="target: expected one of cortex-m4, cortex-m33, got 'cortex-m7'"):
        network_cycles(source_of(program), "cortex-m7")


def test_refuses_kernels_without_constants(monkeypatch):
    program, _ = edge_programs.layer_program(DENSE[7])
    source = source_of(program)
    monkeypatch.delitem(cost._CYCLES["cortex-m33"], "adder_conv")
    with pytest.raises(
        ValueError, match="64-64.1x1@12: expected a kernel with known cycles on cortex-m33, got adder_c"
    ):
        network_cycles(source, "cortex-m33")
