"""A trained CNN becomes a spiking network without training: thresholds, biases, initial membranes fit its activations.

Source: SNN calibration, arXiv 2106.06984, and its code.
"""

import copy
import math
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any

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

    - all calibrations: V is the `best_threshold` of a, one per channel; the next layer's weights can take it in.
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

    Source: arXiv 2106.06984. There all neurons of a ReLU have one V, V/(2T) is added to the current of each step, the
    same in all, and weights may be tuned, too.

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
    corrections = CALIBRATIONS[calibration]
    network = converted(cnn, steps)
    reference = copy.deepcopy(network)
    exact = _Stages(reference, network.graph, images.split(ROWS))
    spikes = _Stages(network, network.graph, images.split(max(1, ROWS // steps)))
    for name, site in sites(network).items():
        with as_cnn(reference):
            activations = torch.cat(list(exact.run(name, go_on=True)))
        threshold, wanted = best_threshold(activations[:THRESHOLD_IMAGES], steps), _mean([activations])
        neuron, half = site.neuron, threshold / 2
        neuron.threshold, neuron.initial = threshold, half
        if "bias" in corrections:
            error = wanted - _mean(spikes.run(name))
            _bias_before(network, name).add_(error.flatten(1).mean(1))
        if "initial" in corrections:
            initial = half.view(-1, *[1] * (wanted.dim() - 1)) + steps * (wanted - _mean(spikes.run(name)))
            neuron.initial = initial.to(threshold.dtype)
        for _ in spikes.run(name, go_on=True) if corrections else ():
            pass
    return network


class _Stages:
    """Runs a network on parts of some images from neurons to neurons, so that calibrated stages are not run again.

    Args:
        network, graph: the modules, and what they compute.
        parts: of the images.
    """

    def __init__(self, network: nn.Module, graph: fx.Graph, parts: Sequence[Tensor]) -> None:
        self.interpreter = fx.Interpreter(network, graph=graph)
        self.interpreter.args_iter = iter(())  # other arguments have their defaults
        image, *self.nodes = graph.nodes
        self.kept: list[dict[fx.Node, _Kept]] = [{image: _Kept(part)} for part in parts]

    def run(self, name: str, go_on: bool = False) -> Iterator[Tensor]:
        """Yields the output of the neurons of a name for each part; with go_on, the next stage begins there."""
        end = 1 + next(i for i, node in enumerate(self.nodes) if node.target == name)
        stage, later = self.nodes[:end], {*self.nodes[end:]}
        for i, kept in enumerate(self.kept):
            env = self.interpreter.env = {node: value.read() for node, value in kept.items()}
            for node in stage:
                env[node] = self.interpreter.run_node(node)
            if go_on:
                self.kept[i] = {node: _Kept(value) for node, value in env.items() if later & {*node.users}}
            yield env[stage[-1]]
        if go_on:
            self.nodes = self.nodes[end:]


class _Kept:
    """What a later stage reads; spikes take a byte each."""

    def __init__(self, value: Any) -> None:
        self.value, self.spikes = value, None
        if isinstance(value, Tensor) and value.is_floating_point():
            spikes, size = value != 0, value.amax([i for i in range(value.dim()) if i != 1], keepdim=True)
            if torch.equal(spikes * size, value):
                self.value, self.spikes = size, spikes

    def read(self) -> Any:
        if self.spikes is not None:
            return self.spikes * self.value
        return self.value.clone() if isinstance(self.value, Tensor) else self.value  # a stage may change it


def best_threshold(activations: Tensor, steps: int) -> Tensor:
    r"""Returns the thresholds whose spikes come closest to some activations of a ReLU, one per channel.

    .. math:: \operatorname*{argmin}_V \sum_a \left(a - \tfrac{V}{T}\,clip(\lfloor \tfrac{Ta}{V} + \tfrac12 \rfloor, 0,
              T)\right)^2

    over 95 values: 100 %, 99 %, ... 6 % of the channel's largest activation, each rounded to bfloat16, so that sums of
    up to 65,536 spikes are exact. 1 for a channel whose activations are all 0.

    Args:
        activations: (N, C, ...).
        steps: T.

    >>> best_threshold(torch.tensor([[0.0, 0.0], [0.5, 0.0], [1.0, 0.0]]), steps=2)
    tensor([1., 1.])
    """
    a = activations.transpose(0, 1).flatten(1)  # (C, numbers)
    largest = a.amax(1, keepdim=True)
    largest[largest <= 0] = 1
    best, least = largest, torch.full_like(largest, math.inf, dtype=torch.float64)
    for share in torch.linspace(1, 1 - (GRID - 1) / 100, GRID, device=largest.device):
        v = (largest * share).bfloat16().to(largest.dtype)
        rates = (a * (steps / v) + 0.5).floor_().clamp_(0, steps).mul_(v / steps)
        error = rates.sub_(a).square_().sum(1, keepdim=True, dtype=torch.float64)
        best, least = torch.where(error < least, v, best), error.minimum(least)
    return best.flatten()


def _mean(outputs: Iterable[Tensor]) -> Tensor:
    """Returns the mean of outputs (N, ...) over images and steps, per neuron."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for output in outputs:
        total = total.to(output.device) + output.sum(0, dtype=torch.float64)
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
