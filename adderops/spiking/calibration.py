"""A trained CNN becomes a spiking network without training: thresholds, biases, initial membranes fit its activations.

Source: SNN calibration, arXiv 2106.06984, and its code.
"""

import copy
from functools import partial

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.optimization import fuse
from torch.nn.modules.batchnorm import _BatchNorm

from adderops.spiking.network import Spikes, as_cnn, sites, spiking
from adderops.spiking.neuron import IntegrateAndFire

# What each calibration corrects, after the thresholds.
CALIBRATIONS = {"none": (), "light": ("bias",), "advanced": ("bias", "initial")}
GRID = 95  # thresholds to choose from, in steps of 1 % of the largest activation
THRESHOLD_IMAGES = 256
ROWS = 512  # images times steps that run at once


def converted(cnn: nn.Module, steps: int) -> fx.GraphModule:
    """Returns the spiking network of a CNN, to be calibrated: BatchNorms are in the convolutions before them, a copy.

    Each neuron emits its threshold and loses it. Max pools choose by the spikes so far, see `spiking`. All convolutions
    and linear layers have a bias.

    Args:
        cnn, steps: see `spiking`.

    >>> from adderops.models import lenet5
    >>> network = converted(lenet5("cnn"), steps=8)
    >>> network.conv1.bias.shape, network.get_submodule("spikes.0.neuron")
    (torch.Size([6]), IntegrateAndFire(threshold=1, decay=1.0, reset='subtract', scaled=True))
    """
    cnn = copy.deepcopy(cnn).eval()
    network = fuse(spiking(cnn, steps, partial(IntegrateAndFire, scaled=True), exact_max_pools=True), no_trace=True)
    for layer in network.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)) and layer.bias is None:
            layer.bias = nn.Parameter(layer.weight.new_zeros(len(layer.weight)))
    assert isinstance(network, fx.GraphModule)
    return network.requires_grad_(False).eval()


@torch.no_grad()
def calibrate(cnn: nn.Module, images: Tensor, steps: int, calibration: str = "advanced") -> fx.GraphModule:
    r"""Returns a calibrated spiking network of a trained CNN, which stays as it is.

    A neuron with a constant input r, initial membrane V/2 and subtraction emits :math:`V\,clip(\lfloor Tr/V + 1/2
    \rfloor, 0, T)` in all: the nearest multiple of V to T r, where without V/2 it would be the one below.

    The neurons are calibrated in the order of the forward pass, so the input of each comes from calibrated ones. With
    a the activation of the CNN, s the mean of the spikes over the steps, both averaged over the images:

    - all calibrations: V is the `best_threshold` of a, one for all neurons of a ReLU.
    - 'light' and 'advanced': bias += a - s, averaged over the neurons of each channel.
    - 'advanced': then initial membrane += T (a - s), for each neuron.

    The bias is that of the last layer that has one; where a shortcut is added, of the layer that it is added to.

    Args:
        cnn: see `spiking`.
        images: (N, C, H, W), of the training set, on the device of the CNN.
        steps: T.
        calibration: 'none', 'light' or 'advanced'.

    Raises:
        ValueError: another calibration, no image, or as `spiking`.

    Source: arXiv 2106.06984. There V/(2T) is added to the current of each step, the same in all; and weights may be
    tuned, too.

    >>> from adderops.models import lenet5
    >>> cnn, images = lenet5("cnn").eval(), torch.randn(8, 1, 32, 32)
    >>> network = calibrate(cnn, images, steps=32)
    >>> (network(images) - cnn(images)).abs().max() < 0.02
    tensor(True)
    """
    if calibration not in CALIBRATIONS:
        raise ValueError(f"calibrate: calibration: expected one of {', '.join(CALIBRATIONS)}, got {calibration!r}")
    if not len(images):
        raise ValueError("calibrate: images: expected at least one, got none")
    network = converted(cnn, steps)
    reference = copy.deepcopy(network)
    parts = images.split(max(1, ROWS // steps))
    for name, site in sites(network).items():
        exact, spikes = _until(reference, name), _until(network, name)
        with as_cnn(exact):
            threshold = best_threshold(exact(images[:THRESHOLD_IMAGES]), steps)
            wanted = _mean(exact, images.split(ROWS))
        neuron = site.neuron
        neuron.threshold, neuron.initial = threshold, threshold / 2
        if "bias" in CALIBRATIONS[calibration]:
            error = wanted - _mean(spikes, parts)
            _bias_before(network, name).add_(error.flatten(1).mean(1))
        if "initial" in CALIBRATIONS[calibration]:
            neuron.initial = (threshold / 2 + steps * (wanted - _mean(spikes, parts))).to(threshold.dtype)
    return network


def best_threshold(activations: Tensor, steps: int) -> Tensor:
    r"""Returns the threshold whose spikes come closest to some activations of a ReLU, a scalar tensor.

    .. math:: \operatorname*{argmin}_V \sum_a \left(a - \tfrac{V}{T}\,clip(\lfloor \tfrac{Ta}{V} + \tfrac12 \rfloor, 0,
              T)\right)^2

    over 95 values: 100 %, 99 %, ... 6 % of the largest activation, each rounded to bfloat16, so that sums of up to
    65,536 spikes are exact. 1 if all activations are 0.

    >>> best_threshold(torch.tensor([0.0, 0.5, 1.0]), steps=2)
    tensor(1.)
    """
    largest = activations.max()
    if not largest > 0:
        return torch.ones_like(largest)
    grid = (largest * torch.linspace(1, 1 - (GRID - 1) / 100, GRID, device=largest.device)).bfloat16().to(largest.dtype)
    errors = []
    for v in grid:
        rates = (activations * (steps / v) + 0.5).floor_().clamp_(0, steps).mul_(v / steps)
        errors.append(rates.sub_(activations).square_().sum(dtype=torch.float64))
    return grid[torch.stack(errors).argmin()].clone()


def _until(network: fx.GraphModule, name: str) -> fx.GraphModule:
    """Returns the part of a network whose output is that of a module; it shares the modules."""
    graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in network.graph.nodes:
        copies[node] = graph.node_copy(node, copies.__getitem__)
        if node.target == name:
            graph.output(copies[node])
            break
    return fx.GraphModule(network, graph)


def _mean(network: nn.Module, parts: tuple[Tensor, ...]) -> Tensor:
    """Returns the mean of the output over images and steps, per neuron."""
    total, count = torch.zeros((), dtype=torch.float64, device=parts[0].device), 0
    for part in parts:
        output = network(part)
        total = total + output.sum(0, dtype=torch.float64)
        count += len(output)
    return total / count


def _bias_before(network: fx.GraphModule, name: str) -> Tensor:
    """Returns the bias of the last layer before the neurons of a name."""
    order = {node: i for i, node in enumerate(network.graph.nodes)}
    [site] = network.graph.find_nodes(op="call_module", target=name)
    waiting, found = [site], dict[int, Tensor]()
    while waiting:
        for node in waiting.pop().all_input_nodes:
            layer = network.get_submodule(str(node.target)) if node.op == "call_module" else None
            if isinstance(layer, (nn.Conv2d, nn.Linear, _BatchNorm)) and layer.bias is not None:
                found[order[node]] = layer.bias
            elif not isinstance(layer, Spikes):
                waiting.append(node)
    if not found:
        raise ValueError(f"calibrate: cnn: expected a layer with a bias before each ReLU, got none before {name}")
    return found[max(found)]
