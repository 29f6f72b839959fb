"""What the CNN and the adder network of an architecture need on a microcontroller, in int8: flash, memory, time."""

from collections.abc import Sequence
from functools import cache

import torch
from torch import nn

from adderops.batchnorm import reestimate_batchnorm
from adderops.distill.runs.tables import KINDS
from adderops.edge import Program, cmsis_nn, program_of
from adderops.edge.cost import network_cycles
from adderops.edge.export import source_of
from adderops.models import create_model
from adderops.quant import Scheme, calibrate, convert

TARGET, MHZ = "cortex-m4", 120
MOST_WEIGHTS = 2**22  # beyond any microcontroller's flash, and slow to convert
CAPTION = (
    f"Both in int8, on a Cortex-M4 at {MHZ} MHz, modelled: no board has confirmed it. The adder network as C by "
    "adderops.edge, the CNN in CMSIS-NN by a fit to counted instructions (adderops.edge.cmsis_nn). Flash: weights and "
    "constants, without code. Memory: activations and scratch, for the CNN at least so much."
)


@cache
def rows_of(arch: str, shape: tuple[int, int, int], classes: int) -> list[dict[str, str]]:
    """Returns a row for the CNN and one for the adder network, for images of a shape (C, H, W).

    The networks have random weights, which none of the numbers depends on.

    Raises:
        ValueError, RuntimeError: the adder network does not become C, for the reason in the first line.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        with torch.device("meta"):
            weights = sum(p.numel() for p in create_model(arch, "adder", shape[0], classes).parameters())
        if weights > MOST_WEIGHTS:
            raise ValueError(f"it has {weights / 2**20:.1f} MiB of weights in int8")
        program = _program(create_model(arch, "adder", shape[0], classes), shape)
    source = source_of(program)
    constants = sum(call.weight_bytes for call in source.calls)
    with torch.device("meta"):
        cnn = cmsis_nn.cnn_cost(create_model(arch, "cnn", shape[0], classes), shape)
    return [
        _row(KINDS["cnn"], cnn.weights, live_bytes(program) + cnn.scratch, cnn.cycles),
        _row(KINDS["adder"], constants, source.arena, network_cycles(source, TARGET)),
    ]


def _row(label: str, flash: int, memory: int, cycles: float) -> dict[str, str]:
    return {
        "network": label,
        "flash, KiB": f"{flash / 1024:.1f}",
        "memory, KiB": f"{memory / 1024:.1f}",
        "cycles, M": f"{cycles / 1e6:.2f}",
        "ms": f"{cycles / MHZ / 1e3:.1f}",
    }


def _program(network: nn.Module, shape: Sequence[int]) -> Program:
    images = torch.randn(4, *shape)
    model = calibrate(reestimate_batchnorm(network, [images]).eval(), [images], Scheme(ends="int8"))
    return program_of(convert(model, images), images)


def live_bytes(program: Program) -> int:
    """Returns the most bytes that live at once if every activation of a program takes one byte a value."""
    size = {name: value.height * value.width * value.channels for name, value in program.values.items()}
    last = {name: i for i, layer in enumerate(program.layers) for name in (*layer.reads, layer.y)}
    alive, most = {program.input}, 0
    for i, layer in enumerate(program.layers):
        alive.add(layer.y)
        most = max(most, sum(size[name] for name in alive))
        alive = {name for name in alive if last[name] > i}
    return most
