"""Size and modelled cycles on a Cortex-M4 of the networks of experiments/edge_accuracy.py in int8.

adderops    the adder network as `adderops.edge.export_c` writes it, compiled by arm-none-eabi-gcc -O2 and run in an
            emulator that counts cycles by the rules of benchmarks/harness/cortex_m_cycles.py
CMSIS-NN    the CNN by `adderops.edge.cmsis_nn`, fitted to counted layers; memory as if no layer wrote over its input
same care   the CNN with a convolution written like the adder kernel (harness/int8_conv.c: SMLAD on weights stored as
            int16), emulated in place of each dense adder layer of the other network. All else stays as there: first
            layer, depthwise layers, pool, classifier, and the planner of its memory

Flash: weights and constants, without code. Cycles do not depend on weights, so the networks are untrained.
"""

import sys
from pathlib import Path

import torch
from torch import fx, nn

from adderops.edge import bytes_of, cmsis_nn, program_of
from adderops.models import create_model, matched_layers
from adderops.quant import Scheme, calibrate, convert, reestimate_batchnorm

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))
from harness import cortex_m, edge_peers, edge_programs  # noqa: E402  (of the folder above)
from harness.edge_layers import EdgeLayer  # noqa: E402

CORE = "cortex-m4"
SHAPE = (1, 32, 32)
COLUMNS = "network kind engine parameters flash arena cycles".split()
_OUTPUTS = (nn.Conv2d, nn.Linear)  # a layer with an output of its own; BatchNorm and ReLU belong to it


def activation_bytes(model: nn.Module, shape: tuple[int, ...] = SHAPE) -> int:
    """The most bytes that the activations of a CNN in int8 need at once, if no layer writes over its input.

    The image counts, and so does a shortcut as long as a sum needs it. The sum itself takes the place of a term.

    >>> activation_bytes(nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU(), nn.Conv2d(2, 3, 1)), (1, 4, 4))
    80
    """
    traced = fx.symbolic_trace(model.eval())
    fx.passes.shape_prop.ShapeProp(traced).propagate(torch.zeros(1, *shape))
    owner: dict[fx.Node, fx.Node] = {}  # of the memory in which a node's value lies
    for node in traced.graph.nodes:
        inputs = node.all_input_nodes
        own = not inputs or (node.op == "call_module" and isinstance(traced.get_submodule(node.target), _OUTPUTS))
        smaller = inputs and _bytes(node) < _bytes(inputs[0]) and not own  # pooling
        owner[node] = node if own or smaller else owner[inputs[0]]
    order = {node: i for i, node in enumerate(traced.graph.nodes)}
    last = dict(order)
    for node in traced.graph.nodes:
        for read in node.all_input_nodes:
            last[owner[read]] = max(last[owner[read]], order[node])
    memories = set(owner.values())
    return max(sum(_bytes(memory) for memory in memories if order[memory] <= i <= last[memory]) for i in order.values())


def _bytes(node: fx.Node) -> int:
    shape = getattr(node.meta.get("tensor_meta"), "shape", None)
    return 0 if shape is None else shape.numel()


def cnn_costs(network: str) -> list[dict[str, object]]:
    """The rows of a CNN, one per engine."""
    model = create_model(network, "cnn", SHAPE[0], 10)
    cost = cmsis_nn.cnn_cost(model, SHAPE)
    row = {"network": network, "kind": "cnn", "engine": "CMSIS-NN"}
    row |= {"parameters": sum(p.numel() for p in model.parameters()), "flash": cost.weights}
    return [row | {"arena": activation_bytes(model) + cost.scratch, "cycles": cost.cycles}]


def adder_layers(model: nn.Module, shape: tuple[int, ...] = SHAPE) -> list[EdgeLayer]:
    """The dense layers that are adder layers in the other network, with the sizes of their inputs."""
    layers = []

    def record(module: nn.Module, inputs: tuple[torch.Tensor, ...], _: torch.Tensor) -> None:
        if module.groups == 1:
            sizes = (module.in_channels, module.out_channels, *inputs[0].shape[2:])
            layers.append(EdgeLayer(*sizes, module.kernel_size[0], module.stride[0]))

    for layer in matched_layers(model).values():
        layer.register_forward_hook(record)
    with torch.no_grad():
        model.eval()(torch.zeros(1, *shape))
    return layers


def emulated_costs(network: str) -> list[dict[str, object]]:
    """The rows of an adder network, and of the CNN with convolutions of the same care."""
    torch.manual_seed(0)
    images = torch.randn(8, *SHAPE)
    model = reestimate_batchnorm(create_model(network, "adder", SHAPE[0], 10), [images]).eval()
    integer = convert(calibrate(model, [images], Scheme(ends="int8")), images)
    tools = cortex_m.toolchain()
    program = program_of(integer, images)
    counted = edge_programs.network_run(program, bytes_of(program, images[:1]), tools, CORE)
    parameters = sum(p.numel() for p in create_model(network, "adder", SHAPE[0], 10).parameters())
    row = {"network": network, "kind": "adder", "engine": "adderops", "parameters": parameters}
    row |= {"flash": counted.weights, "arena": counted.scratch, "cycles": counted.run.cycles}
    swapped = dict.fromkeys(("cycles", "weights", "scratch"), 0)
    for layer in adder_layers(create_model(network, "cnn", SHAPE[0], 10)):
        ours = edge_programs.layer_run(layer, tools, CORE)
        theirs = edge_peers.convolution(layer, "conv_float", tools, CORE)
        swapped["cycles"] += theirs["cycles"] - ours.run.cycles
        swapped["weights"] += theirs["weight_bytes"] - ours.weights
        swapped["scratch"] = max(swapped["scratch"], theirs["scratch_bytes"] - ours.scratch)
    conv = row | {"kind": "cnn", "engine": "same care", "cycles": counted.run.cycles + swapped["cycles"]}
    conv |= {"flash": row["flash"] + swapped["weights"], "arena": row["arena"] + swapped["scratch"]}
    return [row, conv]


def costs_of(network: str) -> list[dict[str, object]]:
    """All rows of a network, in the order of the columns."""
    adder, conv = emulated_costs(network)
    return [{column: row[column] for column in COLUMNS} for row in (adder, *cnn_costs(network), conv)]
