"""A trained CNN becomes a spiking network without training: it is fitted to the CNN's activations.

Source: SNN calibration, arXiv 2106.06984, and its code.
"""

import copy
import math
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.experimental.optimization import fuse
from torch.nn.modules.batchnorm import _BatchNorm

from adderops.spiking.network import as_cnn, sites, spiking
from adderops.spiking.neuron import IntegrateAndFire

# What each calibration corrects, after the thresholds.
CALIBRATIONS = {"none": (), "light": ("bias",), "advanced": ("weights", "initial")}
GRID = 95  # thresholds to choose from, in steps of 1 % of the largest activation
THRESHOLD_IMAGES = 256
ROWS = 64  # images times steps that run at once
RIDGE = 0.1  # of the mean square of a layer's inputs
COLUMNS = 1 << 24  # numbers of a layer's inputs, as a convolution reads them, that are multiplied at once


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
    - 'light': bias += a - s, averaged over the neurons of each channel.
    - 'advanced': weights and bias += what `add_least_squares` finds for a - s of each image and neuron. Then initial
      membrane += T (a - s), for each neuron.

    The layer is the last one that has a bias; where a shortcut is added, the layer that it is added to. If that is a
    BatchNorm, or a pool follows, 'advanced', too, moves the bias alone.

    Args:
        cnn: see `spiking`.
        images: (N, C, H, W), of the training set, on the device of the CNN.
        steps: T.
        calibration: 'none', 'light' or 'advanced'.

    Raises:
        ValueError: another calibration, no image, or as `spiking`.

    Source: arXiv 2106.06984. There all neurons of a ReLU have one V, V/(2T) is added to the current of each step, the
    same in all, and weights are tuned by thousands of steps of Adam, as an option.

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
    network, rows = converted(cnn, steps), max(1, ROWS // steps)
    reference = copy.deepcopy(network)
    exact = _Stages(reference, network.graph, images.split(ROWS))
    spikes = _Stages(network, network.graph, images.split(rows))
    for name, neurons in sites(network).items():
        [site] = network.graph.find_nodes(op="call_module", target=name)
        last = _last_with_bias(network, spikes.nodes, site) if corrections else site
        with as_cnn(reference):
            parts, shapes = zip(*((a, output.shape) for a, output in exact.run(site, last, go_on=True)), strict=True)
        activations, pooled = torch.cat(parts), parts[0].shape != shapes[0]
        del parts  # a second copy
        threshold, wanted = best_threshold(activations[:THRESHOLD_IMAGES], steps), _mean([activations])
        neuron, half = neurons.neuron, threshold / 2
        neuron.threshold, neuron.initial = threshold, half
        if corrections:
            layer, x = network.get_submodule(str(last.target)), last.all_input_nodes[0]
            if "weights" in corrections and isinstance(layer, (nn.Conv2d, nn.Linear)) and not pooled:
                runs = zip(activations.split(rows), spikes.run(site, x), strict=True)
                add_least_squares(layer, ((_rates(x, len(a)), a - _rates(s, len(a))) for a, (s, x) in runs))
            else:
                error = wanted - _mean(s for [s] in spikes.run(site))
                layer.get_parameter("bias").add_(error.flatten(1).mean(1))
        if "initial" in corrections:
            shift = steps * (wanted - _mean(s for [s] in spikes.run(site)))
            neuron.initial = (half.view(-1, *[1] * (wanted.dim() - 1)) + shift).to(threshold.dtype)
        for _ in spikes.run(site, go_on=True) if corrections else ():
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

    def run(self, site: fx.Node, *others: fx.Node, go_on: bool = False) -> Iterator[list[Tensor]]:
        """Yields what neurons and nodes before them give for each part; with go_on, the next stage begins there."""
        end = 1 + self.nodes.index(site)
        stage, later = self.nodes[:end], {*self.nodes[end:]}
        for i, kept in enumerate(self.kept):
            env = self.interpreter.env = {node: value.read() for node, value in kept.items()}
            for node in stage:
                env[node] = self.interpreter.run_node(node)
            if go_on:
                self.kept[i] = {node: _Kept(value) for node, value in env.items() if later & {*node.users}}
            yield [env[node] for node in (site, *others)]
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


def add_least_squares(layer: nn.Conv2d | nn.Linear, samples: Iterable[tuple[Tensor, Tensor]]) -> None:
    r"""Adds to weights and bias of a layer the D and d that explain best what its outputs lack.

    .. math:: \operatorname*{argmin}_{D, d} \sum \lVert D x + d - y \rVert^2 + 0.1\,\overline{x^2}\,\lVert D \rVert^2

    The sum is over samples and positions; the ridge has the mean square of the numbers that a neuron reads.

    Args:
        layer: has a bias.
        samples: inputs x of the layer, and y, of the shape of its outputs.

    >>> layer, x = nn.Linear(2, 1), torch.tensor([[0.0, 1.0], [0.0, -1.0]])
    >>> weight = layer.weight.detach().clone()
    >>> with torch.no_grad():
    ...     add_least_squares(layer, [(x, 2 * x[:, 1:])])
    >>> (layer.weight.detach() - weight).round(decimals=2)  # without the ridge 0 and 2
    tensor([[0.0000, 1.9000]])
    """
    groups, taps = (layer.groups if isinstance(layer, nn.Conv2d) else 1), math.prod(layer.weight.shape[2:])
    gram = moment = torch.zeros((), dtype=torch.float64, device=layer.weight.device)
    for sample in samples:
        size = max(1, COLUMNS // (sample[0][0].numel() * taps))
        for x, y in zip(*(part.split(size) for part in sample), strict=True):
            if isinstance(layer, nn.Conv2d):
                mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
                x = F.pad(x, layer._reversed_padding_repeated_twice, mode)
                x = F.unfold(x, layer.kernel_size, layer.dilation, stride=layer.stride)
            columns, lacking = _rows(x, groups), _rows(y, groups)
            columns = torch.cat([columns, torch.ones_like(columns[..., :1])], -1)  # the last one is of the bias
            gram = gram + columns.mT @ columns
            moment = moment + columns.mT @ lacking
    square = gram.diagonal(dim1=1, dim2=2)[:, :-1].mean(1, keepdim=True)
    ridge = torch.cat([(RIDGE * square + (square == 0)).expand(-1, gram.size(1) - 1), torch.zeros_like(square)], 1)
    change = torch.linalg.solve(gram + ridge.diag_embed(), moment).mT.flatten(0, 1)
    layer.weight.add_(change[:, :-1].reshape(layer.weight.shape))
    layer.get_parameter("bias").add_(change[:, -1])


def _rows(x: Tensor, groups: int) -> Tensor:
    """(N, groups·K) or (N, groups·K, ...) -> (groups, rows, K): a row per image and position."""
    return x.reshape(len(x), groups, x.size(1) // groups, -1).permute(1, 0, 3, 2).flatten(1, 2)


def _rates(outputs: Tensor, count: int) -> Tensor:
    """Returns the mean over the steps (count, ...) of outputs (steps·count, ...), or of constant ones (count, ...)."""
    return outputs.unflatten(0, (-1, count)).mean(0)


def _mean(outputs: Iterable[Tensor]) -> Tensor:
    """Returns the mean of outputs (N, ...) over images and steps, per neuron."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for output in outputs:
        total = total.to(output.device) + output.sum(0, dtype=torch.float64)
        count += len(output)
    return total / count


def _last_with_bias(network: fx.GraphModule, nodes: list[fx.Node], site: fx.Node) -> fx.Node:
    """Returns the last of some nodes, before some neurons, that is a layer with a bias."""
    order = {node: i for i, node in enumerate(nodes)}
    waiting, found = [site], set[fx.Node]()
    while waiting:
        for node in order.keys() & waiting.pop().all_input_nodes:
            layer = network.get_submodule(str(node.target)) if node.op == "call_module" else None
            if isinstance(layer, (nn.Conv2d, nn.Linear, _BatchNorm)) and layer.bias is not None:
                found.add(node)
            else:
                waiting.append(node)
    if not found:
        raise ValueError(
            f"calibrate: cnn: expected a layer with a bias before each ReLU, got none before {site.target}"
        )
    return max(found, key=order.__getitem__)
